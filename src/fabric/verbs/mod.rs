//! The real one: RDMA verbs over RoCE v2 or InfiniBand, through libibverbs opened at run time.
//!
//! | file | holds |
//! |---|---|
//! | `inventory`, `host`, `facts` | what this host has, asked and as data |
//! | `doctor` | what is wrong with it |
//! | `gid`, `link` | choice of GID; link layer, state, MTU, speed |
//! | `device`, `objects` | an opened port: protection domain, memory regions |
//! | `context` | the data path: lanes; `progress` of what the device reports, `fence` of what ends |
//! | `lane`, `attributes`, `address` | one queue pair: its account, its states; how a peer reaches it |
//! | `post`, `poll` | requests to work requests, work completions to completions |
//! | `windows` | memory windows of type 2, bound and taken back |
//! | `events` | completion channel and asynchronous events |
//! | `sys` | the raw binding |

mod address;
mod attributes;
mod config;
mod context;
mod device;
mod doctor;
mod error;
mod events;
mod facts;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gid;
mod host;
mod inventory;
mod lane;
mod link;
mod objects;
mod poll;
mod post;
pub(crate) mod sys;
mod windows;

pub use config::VerbsConfig;
pub use device::{Skipped, VerbsDevice};
pub use doctor::{Finding, Severity, diagnose};
pub use facts::{
    DeviceCaps, DeviceFacts, DmabufSupport, HostFacts, Inventory, KernelModule, LibraryFacts,
    Memlock, NetdevFacts, PortFacts, Transport, UnopenedDevice, UverbsNode,
};
pub use gid::{Gid, GidEntry, GidType, NoGid, choose_gid};
pub use inventory::inventory;
pub use link::{LinkLayer, Mtu, PortState, link_bits_per_second, physical_state_word};
