//! What can go wrong in a schedule, and how much of it a seed takes.
//!
//! Each seed draws its own menu: some faults often, some rarely, most not at all. Runs that leave things out reach
//! states that a run with everything in it never does, because one fault hides another (Groce et al., "Swarm testing",
//! ISSTA 2012).

use super::super::world::Random;

/// An enumeration whose values can be listed and named.
macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($(#[$of:meta])* $value:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) enum $name { $($(#[$of])* $value,)* }

        impl $name {
            pub(super) const ALL: &[Self] = &[$(Self::$value,)*];

            pub(super) fn name(self) -> &'static str {
                match self { $(Self::$value => $text,)* }
            }
        }
    };
}
pub(super) use named;

named! {
    /// Something that happens to a schedule.
    Fault {
        /// A share of all packets is lost.
        Loss = "packet-loss",
        /// Some packets are late, and with them those behind them on their lane.
        Spikes = "delay-spikes",
        /// "Receiver not ready" though there are receives.
        FalseNotReady = "false-not-ready",
        /// A post is accepted in part.
        PostFails = "post-fails",
        /// A queue pair of a reader goes to the error state.
        ReaderLaneError = "reader-lane-error",
        /// A queue pair of a writer does.
        WriterLaneError = "writer-lane-error",
        /// No packet passes between two rails.
        LinkDown = "link-down",
        /// A rail is gone for good, the node's others are not.
        RailLoss = "rail-loss",
        /// A port goes down.
        PortDown = "port-down",
        /// One that is down comes back.
        PortUp = "port-up",
        /// A port gets another address.
        AddressChange = "address-change",
        /// What a device acknowledges is lost; what it sends otherwise is not.
        LostAnswers = "lost-answers",
        /// A node does not run, as after `SIGSTOP`; its devices do.
        Stop = "stop",
        /// A node acts late and seldom.
        Slow = "slow-driver",
        /// One control connection is cut.
        ControlCut = "control-cut",
        /// Control messages take long.
        ControlDelay = "control-delay",
        /// A process dies and its kernel closes its connections.
        Kill = "kill",
        /// A machine dies and nobody is told.
        SilentDeath = "silent-death",
        /// A dead node starts again under its name.
        Restart = "restart",
        /// A device refuses to destroy queue pairs.
        RefusedFence = "refused-fence",
        /// A port gets another speed.
        UnevenSpeed = "uneven-speed",
        /// The reader takes a grant back.
        Revoke = "revoke",
        /// The writer cancels.
        Cancel = "cancel",
        /// Both at once.
        RevokeAndCancel = "revoke-and-cancel",
        /// The reader drops its handle.
        DropArrival = "drop-arrival",
        /// The writer drops its handle.
        DropPush = "drop-push",
        /// A grant that has ended is used.
        StaleGrant = "stale-grant",
        /// A grant of an incarnation that is gone is used.
        OldIncarnation = "old-incarnation-grant",
        /// A live grant is used by two.
        SharedGrant = "grant-used-twice",
        /// All that is wrong is put right, but for what is gone.
        Heal = "heal",
    }
}

/// The faults of one schedule, each with a weight.
#[derive(Debug)]
pub(super) struct Menu {
    weights: Vec<(Fault, u64)>,
    total: u64,
    /// Of a thousand actions, how many are faults.
    pub(super) rate: u64,
}

impl Menu {
    pub(super) fn draw(random: &mut Random) -> Self {
        let share = [150, 300, 500][random.below(3) as usize];
        let mut weights: Vec<_> = Fault::ALL
            .iter()
            .filter_map(|&fault| {
                let weight = match fault {
                    Fault::Heal => 2 + random.below(6),
                    _ if random.chance(share) => 1 + random.below(8),
                    _ => 0,
                };
                (weight > 0).then_some((fault, weight))
            })
            .collect();
        // Who can die should be able to come back.
        let dies = |&(fault, _): &(Fault, u64)| matches!(fault, Fault::Kill | Fault::SilentDeath);
        if weights.iter().any(dies) && weights.iter().all(|(fault, _)| *fault != Fault::Restart) {
            weights.push((Fault::Restart, 1 + random.below(8)));
        }
        let goes = |&(fault, _): &(Fault, u64)| fault == Fault::PortDown;
        if weights.iter().any(goes) && weights.iter().all(|(fault, _)| *fault != Fault::PortUp) {
            weights.push((Fault::PortUp, 1 + random.below(8)));
        }
        let total = weights.iter().map(|(_, weight)| weight).sum();
        let rate = [0, 30, 100, 100, 250, 400][random.below(6) as usize];
        Self {
            weights,
            total,
            rate,
        }
    }

    pub(super) fn pick(&self, random: &mut Random) -> Fault {
        let mut at = random.below(self.total);
        for &(fault, weight) in &self.weights {
            if at < weight {
                return fault;
            }
            at -= weight;
        }
        Fault::Heal
    }
}
