//! Pure knowledge of KV caches: where the bytes of a page lie, and which bytes of one cache correspond to which of
//! another. No I/O, no memory access, no clock.

mod dtype;
mod layout;

pub use dtype::Dtype;
pub use layout::{HeadRange, KvLayout, LayerLayout, Plane, PlaneRole};
