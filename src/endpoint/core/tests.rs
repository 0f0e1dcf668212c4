//! Whole cores under simulated time: every message, completion and deadline happens when the schedule says.

mod deadlines;
mod drain;
mod garbage;
mod grants;
mod hostile;
mod limits;
mod liveness;
mod rails;
mod recovery;
mod recovery_ends;
mod recovery_words;
mod schedules;
mod swarm;
mod telemetry;
mod unfenced;
mod windows;
mod world;
