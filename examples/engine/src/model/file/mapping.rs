//! Files mapped for reading.

use std::{fs::File, path::Path};

use memmap2::Mmap;

use crate::model::ModelError;

/// Maps a file. Its bytes are copied before the model runs; the mapping ends with loading.
pub(crate) fn map(path: &Path) -> Result<Mmap, ModelError> {
    let open = |source| ModelError::Open {
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(open)?;
    // SAFETY: the contract is that nobody changes or cuts off the file while it is mapped. That is what whoever names a
    // model file promises, as with any program that maps model files; the mapping is kept only while it is loaded.
    unsafe { Mmap::map(&file) }.map_err(open)
}
