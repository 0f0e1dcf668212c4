//! Pure knowledge of KV caches: where the bytes of a page lie, and which bytes of one cache correspond to which of
//! another. No I/O, no memory access, no clock; every type may be used from any thread.
//!
//! * [`KvLayout`] says where a cache's bytes are; [`KvLayout::validate`] says whether that is possible.
//! * [`presets`] makes the layouts of known engines, [`models`] the shapes of known models.
//! * [`shard`] says which ranks of two tensor-parallel groups have heads in common.
//! * [`Planner`] turns pages of one cache into few large writes to another.

mod cover;
mod dtype;
mod layout;
pub mod models;
mod overlap;
pub mod pages;
pub mod plan;
pub mod presets;
pub mod shard;
#[cfg(test)]
mod testing;
mod validate;
#[cfg(test)]
mod validate_tests;

pub(crate) use cover::{Range, cover};
pub use dtype::Dtype;
pub use layout::{HeadRange, KvLayout, LayerLayout, Plane, PlaneRole};
pub use plan::{Plan, PlanError, PlanLimits, PlannedWrite, Planner, Side, SourceRun};
pub use validate::{Dimension, LayoutError, limits, region_lengths};
