//! The C layouts, from the library's own binding, which the oracle compares with the header.

#![allow(
    dead_code,
    unreachable_pub,
    unexpected_cfgs,
    reason = "the binding's own files"
)]

#[path = "../../../src/fabric/verbs/sys/consts.rs"]
mod consts;
#[path = "../../../src/fabric/verbs/sys/cq.rs"]
mod cq;
#[path = "../../../src/fabric/verbs/sys/device.rs"]
mod device;
#[path = "../../../src/fabric/verbs/sys/mr.rs"]
mod mr;
#[path = "../../../src/fabric/verbs/sys/qp.rs"]
mod qp;
#[path = "../../../src/fabric/verbs/sys/wr.rs"]
mod wr;

pub use self::{consts::*, cq::*, device::*, mr::*, qp::*, wr::*};
