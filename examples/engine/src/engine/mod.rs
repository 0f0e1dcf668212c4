//! The step loop: blocks, prefix cache, scheduler, sampling.
