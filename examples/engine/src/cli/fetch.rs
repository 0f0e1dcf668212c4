//! `fetch`.

use std::process::ExitCode;

use kvpush_engine::model::fetch::fetch;

use super::Result;

/// Downloads the model and says where it is.
pub(crate) fn run() -> Result<ExitCode> {
    let path = fetch(&mut |progress| tracing::info!("{progress:?}"))?;
    println!("{}", path.display());
    Ok(ExitCode::SUCCESS)
}
