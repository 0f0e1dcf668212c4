//! Whole cores under simulated time: every message, completion and deadline happens when the schedule says.

mod deadlines;
mod garbage;
mod hostile;
mod recovery;
mod schedules;
mod unfenced;
mod world;
