//! What an endpoint has registered.
//!
//! Rules:
//!
//! * The same range registered again for the same access, while it is registered, is one registration with one more
//!   user. "The same" is (address, length, access, [`Memory::generation`]): where memory can be freed and come back at
//!   its old address behind the library's back, the generation tells the two apart.
//! * Ranges may overlap in any other way. They are registrations of their own; devices allow it.
//! * A registration ends when its last user has given it up. A user is a pool or an exported region, and those live as
//!   long as a caller, a grant, a push or an access needs them.
//! * A registration holds the memory of its first user, every user its own. So its range stays mapped in any case.
//!
//! Any thread may call. The lock is held for a lookup, never while memory is pinned: two threads that register the same
//! range at the same time may make two registrations of it.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{
    AddressIndex, Entry, Exports, Policy, Region, RegionId, Registration, Unreachable,
    report::Located,
};
use crate::{
    fabric::{Access, Device},
    memory::Memory,
};

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// By name, because names only grow.
    live: Vec<User>,
    /// Made when it is first asked for after a change.
    index: Option<AddressIndex>,
}

#[derive(Debug)]
struct User {
    registration: Arc<Registration>,
    users: usize,
}

/// What makes two registrations the same.
fn key(memory: &dyn Memory, access: Access) -> (u64, u64, Access, u64) {
    (
        memory.address(),
        memory.length(),
        access,
        memory.generation(),
    )
}

impl Registry {
    /// Registers `memory` with all of `rails`, or shares the registration that there is.
    ///
    /// # Errors
    ///
    /// As [`Region::register`].
    pub(crate) fn register(
        self: &Arc<Self>,
        memory: Arc<dyn Memory>,
        access: Access,
        rails: &[Arc<dyn Device>],
        policy: &Policy,
        exports: &mut Exports<'_>,
    ) -> Result<Region, Box<(Unreachable, Region)>> {
        let wanted = key(&*memory, access);
        let id = {
            let mut state = self.0.lock();
            let same = state.live.iter_mut().find(|user| {
                let registration = &user.registration;
                key(&*registration.memory, registration.access) == wanted
            });
            if let Some(user) = same {
                user.users += 1;
                return Ok(Region {
                    registration: Arc::clone(&user.registration),
                    memory,
                    registry: Some(Arc::clone(self)),
                });
            }
            state.next += 1;
            RegionId(state.next)
        };
        let mut region = Region::make(id, memory, access, rails, policy, exports)?;
        region.registry = Some(Arc::clone(self));
        let mut state = self.0.lock();
        let at = state.live.partition_point(|user| user.registration.id < id);
        let user = User {
            registration: Arc::clone(&region.registration),
            users: 1,
        };
        state.live.insert(at, user);
        state.index = None;
        Ok(region)
    }

    /// One user less. Returns whether that was the last one.
    pub(super) fn release(&self, registration: &Arc<Registration>) -> bool {
        let mut state = self.0.lock();
        let found = state
            .live
            .binary_search_by_key(&registration.id, |user| user.registration.id);
        let Ok(at) = found else {
            debug_assert!(false, "{} is released once too often", registration.id);
            return false;
        };
        state.live[at].users -= 1;
        if state.live[at].users > 0 {
            return false;
        }
        state.live.remove(at);
        state.index = None;
        true
    }

    /// The shortest registration that holds `address`.
    pub(crate) fn locate(&self, address: u64) -> Option<Located> {
        let mut state = self.0.lock();
        let State { live, index, .. } = &mut *state;
        let index = index.get_or_insert_with(|| {
            let entries: Vec<Entry> = live
                .iter()
                .map(|user| Entry {
                    address: user.registration.memory.address(),
                    length: user.registration.memory.length(),
                    rank: user.registration.id.0,
                })
                .collect();
            AddressIndex::new(&entries)
        });
        let registration = &live.get(index.find(address)?)?.registration;
        let offset = address - registration.memory.address();
        Some(Located {
            id: registration.id,
            offset,
            left: registration.memory.length() - offset,
        })
    }

    /// Whether `id` is registered.
    pub(crate) fn is_live(&self, id: RegionId) -> bool {
        let state = self.0.lock();
        state
            .live
            .binary_search_by_key(&id, |user| user.registration.id)
            .is_ok()
    }

    /// Registrations that there are.
    pub(crate) fn len(&self) -> usize {
        self.0.lock().live.len()
    }
}
