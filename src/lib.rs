//! kvpush
