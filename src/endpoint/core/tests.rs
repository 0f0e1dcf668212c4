//! Whole cores under simulated time.
