//! Slots are reserved before they are used: send-queue slots and the peer's receives on the writer, replenishment on
//! the reader. A full queue is back-pressure, never an error.

/// What a writer may post to one lane: send-queue slots, and immediates that the peer has receives for.
#[derive(Debug)]
pub(crate) struct SendCredits {
    slots: u32,
    depth: u32,
    /// Receives the peer has ever posted, as it announced.
    announced: u64,
    /// Immediates ever sent.
    consumed: u64,
}

impl SendCredits {
    pub(crate) fn new(depth: u32, receives: u32) -> Self {
        Self {
            slots: depth,
            depth,
            announced: u64::from(receives),
            consumed: 0,
        }
    }

    /// Free send-queue slots.
    #[cfg(test)]
    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// Whether the peer has a receive for one more immediate.
    #[cfg(test)]
    pub(crate) fn has_receive(&self) -> bool {
        self.consumed < self.announced
    }

    /// Takes `slots` send-queue slots and `immediates` receives. Returns whether there were enough; takes nothing
    /// otherwise.
    #[must_use]
    pub(crate) fn take(&mut self, slots: u32, immediates: u32) -> bool {
        let free = self.announced - self.consumed;
        if slots > self.slots || u64::from(immediates) > free {
            return false;
        }
        self.slots -= slots;
        self.consumed += u64::from(immediates);
        true
    }

    /// Takes as many of `wanted` send-queue slots as there are, and returns how many. If `ends`, the last of all that are
    /// wanted carries an immediate: with that slot goes a receive, and without a receive that slot is not taken.
    #[must_use]
    pub(crate) fn take_some(&mut self, wanted: u32, ends: bool) -> u32 {
        let mut taken = wanted.min(self.slots);
        if ends && taken == wanted {
            match self.announced - self.consumed {
                0 => taken = taken.saturating_sub(1),
                _ => self.consumed += 1,
            }
        }
        self.slots -= taken;
        taken
    }

    /// Gives back the slots of retired requests.
    pub(crate) fn retire(&mut self, slots: u32) {
        self.slots = (self.slots + slots).min(self.depth);
    }

    /// The peer announces `total` receives posted so far. Announcements are cumulative, so a repeated or overtaken one
    /// changes nothing. Returns `false` if the peer claims more than can be outstanding at `limit` receives.
    #[must_use]
    pub(crate) fn announce(&mut self, total: u64, limit: u32) -> bool {
        if total > self.consumed + u64::from(limit) {
            return false;
        }
        self.announced = self.announced.max(total);
        true
    }
}

/// When a reader replenishes the receives of one lane: in batches of a quarter of their number, so that the
/// announcement costs little and the writer never runs dry.
#[derive(Debug)]
pub(crate) struct ReceiveCredits {
    depth: u32,
    consumed: u32,
    total: u64,
}

impl ReceiveCredits {
    pub(crate) fn new(depth: u32) -> Self {
        Self {
            depth,
            consumed: 0,
            total: u64::from(depth),
        }
    }

    /// One receive was consumed. Returns the number to post now, if it is time.
    pub(crate) fn consume(&mut self) -> Option<u32> {
        self.consumed += 1;
        (self.consumed >= (self.depth / 4).max(1)).then_some(self.consumed)
    }

    /// `count` receives have been posted. Returns the total to announce.
    pub(crate) fn posted(&mut self, count: u32) -> u64 {
        self.consumed -= count.min(self.consumed);
        self.total += u64::from(count);
        self.total
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the schedule, the writer never sends an immediate for which no receive is posted, never has more
        /// than `depth` requests outstanding, and is never stuck when everything has been processed.
        #[test]
        fn nothing_overflows(
            depth in 1u32..40,
            receives in 1u32..40,
            schedule in prop::collection::vec((0u8..5, 1u32..9), 0..400),
        ) {
            let mut writer = SendCredits::new(depth, receives);
            let mut reader = ReceiveCredits::new(receives);
            let (mut outstanding, mut in_flight, mut posted) = (0u32, 0u32, receives);
            let mut announcements = Vec::new();
            for (step, amount) in schedule {
                match step {
                    0 => if writer.take(amount, 1) { outstanding += amount; in_flight += 1; }
                    1 => { let n = amount.min(outstanding); outstanding -= n; writer.retire(n); }
                    2 => for _ in 0..amount.min(in_flight) {
                        in_flight -= 1;
                        prop_assert!(posted > 0, "an immediate met no receive");
                        posted -= 1;
                        if let Some(count) = reader.consume() {
                            posted += count;
                            announcements.push(reader.posted(count));
                        }
                    }
                    3 => {
                        let (had, could) = (writer.slots(), writer.has_receive());
                        let taken = writer.take_some(amount, true);
                        prop_assert_eq!(taken, if could { amount.min(had) } else { (amount - 1).min(had) });
                        outstanding += taken;
                        in_flight += u32::from(taken == amount);
                    }
                    _ => if let Some(total) = announcements.pop() { prop_assert!(writer.announce(total, receives)); }
                }
                prop_assert!(outstanding <= depth);
                prop_assert!(in_flight <= posted);
                prop_assert_eq!(writer.slots() + outstanding, depth);
            }
            while in_flight > 0 {
                in_flight -= 1;
                if let Some(count) = reader.consume() { announcements.push(reader.posted(count)); }
            }
            for total in announcements { prop_assert!(writer.announce(total, receives)); }
            prop_assert!(writer.has_receive(), "the writer is stuck for good");
        }
    }

    #[test]
    fn an_inflated_announcement_is_refused() {
        let mut writer = SendCredits::new(4, 4);
        assert!(!writer.announce(5, 4));
        assert!(writer.take(1, 1));
        assert!(writer.announce(5, 4));
    }
}
