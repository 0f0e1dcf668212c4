use crate::{cli::HostArgs, error::Result};
pub(crate) fn devices(_: &HostArgs) -> Result<()> { Ok(()) }
pub(crate) fn doctor(_: &HostArgs) -> Result<()> { Ok(()) }
pub(crate) fn why_no_rdma() -> String { "not built yet".into() }
