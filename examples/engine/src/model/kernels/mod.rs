//! What a layer is made of: products, norms, gates, rotary embedding, attention.
//!
//! Invariant, for each file: what is computed for a row depends on nothing but that row's own inputs. Threads of a
//! [`Team`](super::forward::team::Team) share the work; who does what is no part of the result.

pub(crate) mod attention;
pub(crate) mod matrix;
pub(crate) mod product;
pub(crate) mod rotary;
pub(crate) mod rows;
