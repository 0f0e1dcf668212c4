//! What each fault of the menu does. One that finds nothing to act on is not counted.

use std::sync::atomic::Ordering;

use super::{
    super::world::World,
    menu::Fault,
    run::{Stray, Users},
};

/// A node that goes on may find only now that deadlines have passed, and then waits for its peers as long as it would
/// have waited then: the longest of its graces, in nanoseconds.
const CATCH_UP: u64 = 5_500_000;

impl Users {
    /// Draws a fault and lets it happen.
    pub(super) fn inject(&mut self, world: &mut World) {
        let fault = self.menu.pick(&mut world.random);
        if self.cause(world, fault) {
            self.coverage.fault(fault);
        }
    }

    fn cause(&mut self, world: &mut World, fault: Fault) -> bool {
        let node = world.random.below(world.nodes.len() as u64) as usize;
        let rail = world.random.below(world.rails(node) as u64) as usize;
        let alive = !world.nodes[node].dead;
        match fault {
            Fault::Loss => {
                let level = [0.005, 0.02, 0.1, 0.3][world.random.below(4) as usize];
                world.net.set_loss(level);
            }
            Fault::Spikes => {
                let extra = 1000 << world.random.below(12);
                world.net.set_delay_spikes(0.05, extra);
            }
            Fault::FalseNotReady => world.net.set_not_ready(0.2),
            Fault::PostFails => {
                let index = world.random.below(4) as usize;
                world.net.post_fails_at(index);
            }
            Fault::ReaderLaneError | Fault::WriterLaneError => {
                return self.lane_error(world, fault == Fault::ReaderLaneError);
            }
            Fault::LinkDown => return self.link_down(world, node, rail),
            Fault::RailLoss => {
                return world.rails(node) > 1
                    && alive
                    && world.net.kill_device(&World::rail_name(node, rail));
            }
            Fault::PortDown => {
                let device = World::rail_name(node, rail);
                if !alive || !world.net.set_port(&device, false) {
                    return false;
                }
                self.ports_down.push(device);
            }
            Fault::PortUp => return self.port_up(world),
            Fault::AddressChange => {
                return alive && world.net.change_address(&World::rail_name(node, rail));
            }
            Fault::LostAnswers => {
                let device = World::rail_name(node, rail);
                world.net.lose_answers(&device, true);
                self.mute.push(device);
            }
            Fault::Stop => {
                world.nodes[node].running = false;
                self.late_until[node] = u64::MAX;
            }
            Fault::Slow => {
                world.nodes[node].pace = 1000 << world.random.below(9);
            }
            Fault::ControlCut => {
                let conns = world.conns_of(node);
                let which = world.random.below(conns.len() as u64) as usize;
                let Some(&conn) = conns.get(which) else {
                    return false;
                };
                world.cut_one(node, conn);
            }
            Fault::ControlDelay => world.control_delay = 200_000 << world.random.below(6),
            Fault::Kill | Fault::SilentDeath => {
                if !alive {
                    return false;
                }
                world.kill(node, fault == Fault::Kill);
            }
            Fault::Restart => {
                let dead = |&node: &usize| world.nodes[node].dead;
                let Some(node) = (0..world.nodes.len()).find(dead) else {
                    return false;
                };
                self.revive(world, node);
            }
            Fault::RefusedFence => {
                // Seldom: each costs pages for good.
                if !world.random.chance(100) {
                    return false;
                }
                world.nodes[node].unfenceable[rail].store(true, Ordering::Relaxed);
            }
            Fault::UnevenSpeed => {
                let speed = 1_000_000_000u64 << world.random.below(9);
                return alive && world.net.set_speed(&World::rail_name(node, rail), speed);
            }
            Fault::Revoke
            | Fault::Cancel
            | Fault::RevokeAndCancel
            | Fault::DropArrival
            | Fault::DropPush => return self.interfere(world, fault),
            Fault::StaleGrant | Fault::OldIncarnation | Fault::SharedGrant => {
                return self.stray(world, fault);
            }
            Fault::Heal => self.heal(world),
        }
        true
    }

    /// A queue pair of the reader or the writer of a live transfer fails.
    fn lane_error(&self, world: &mut World, reader: bool) -> bool {
        let live = self.transfers.iter().filter(|transfer| {
            let push = transfer.push.as_ref();
            transfer.arrival_end.is_none()
                && push.is_some_and(|push| push.poll_opened() == Some(Ok(())))
        });
        let live: Vec<_> = live.collect();
        let which = world.random.below(live.len() as u64) as usize;
        let Some(transfer) = live.get(which) else {
            return false;
        };
        let side = match reader {
            true => transfer.destination,
            false => transfer.source,
        };
        let node = self.sides[side].node;
        let rail = world.random.below(world.rails(node) as u64) as usize;
        let device = World::rail_name(node, rail);
        let lanes = world.net.lanes_of(&device);
        let which = world.random.below(lanes.len() as u64) as usize;
        let lane = lanes.get(which);
        lane.is_some_and(|&lane| world.net.fail_lane(&device, lane))
    }

    fn port_up(&mut self, world: &mut World) -> bool {
        let which = world.random.below(self.ports_down.len() as u64) as usize;
        let Some(device) = self.ports_down.get(which) else {
            return false;
        };
        // Of a node that is dead it stays down.
        let up = world.net.set_port(device, true);
        if up {
            self.ports_down.swap_remove(which);
        }
        up
    }

    fn link_down(&mut self, world: &mut World, node: usize, rail: usize) -> bool {
        let others = world.nodes.len() as u64 - 1;
        let other = (node + 1 + world.random.below(others) as usize) % world.nodes.len();
        let there = world.random.below(world.rails(other) as u64) as usize;
        let link = (World::rail_name(node, rail), World::rail_name(other, there));
        world.net.partition(&link.0, &link.1, true);
        self.links_down.push(link);
        true
    }

    /// A user changes its mind.
    fn interfere(&mut self, world: &mut World, fault: Fault) -> bool {
        let live = (0..self.transfers.len()).filter(|&index| {
            let transfer = &self.transfers[index];
            transfer.arrival_end.is_none()
                && !transfer.dropped
                && self.acts(world, transfer.destination)
                && self.acts(world, transfer.source)
        });
        let live: Vec<usize> = live.collect();
        let which = world.random.below(live.len() as u64) as usize;
        let Some(&index) = live.get(which) else {
            return false;
        };
        let transfer = &mut self.transfers[index];
        let revoke = matches!(fault, Fault::Revoke | Fault::RevokeAndCancel);
        let cancel = matches!(fault, Fault::Cancel | Fault::RevokeAndCancel);
        if let (true, Some(arrival)) = (revoke, &transfer.arrival) {
            arrival.start_revoke();
        }
        if cancel {
            let Some(push) = &transfer.push else {
                return false;
            };
            push.start_cancel();
        }
        match fault {
            Fault::DropArrival => {
                transfer.arrival = None;
                transfer.dropped = true;
            }
            // Its source pages may be read until it has ended, which nobody can tell any more: they stay as they are.
            Fault::DropPush => {
                transfer.own.clear();
                return transfer.push.take().is_some();
            }
            _ => {}
        }
        true
    }

    /// Somebody uses a grant that is not theirs.
    fn stray(&mut self, world: &mut World, fault: Fault) -> bool {
        let fits: Vec<usize> = (0..self.transfers.len())
            .filter(|&index| {
                let transfer = &self.transfers[index];
                let gone = !self.lives(world, transfer.destination);
                match fault {
                    Fault::OldIncarnation => gone,
                    Fault::StaleGrant => !gone && transfer.arrival_end.is_some(),
                    _ => !gone && transfer.arrival_end.is_none() && !transfer.dropped,
                }
            })
            .collect();
        let which = world.random.below(fits.len() as u64) as usize;
        let Some(&index) = fits.get(which) else {
            return false;
        };
        let writer = world.random.below(world.nodes.len() as u64) as usize;
        let (source, _) = self.current[writer];
        let reader = self.sides[self.transfers[index].destination].node;
        if !self.acts(world, source) || writer == reader {
            return false;
        }
        let grant = self.transfers[index].grant.clone();
        let pool = &self.sides[source].pool;
        let push = world.nodes[writer].shared.start_push(pool, grant, None);
        let Ok(push) = push else { return false };
        self.strays.push(Stray {
            push,
            source,
            stale: fault != Fault::SharedGrant,
        });
        true
    }

    /// Starts a dead node again, with new pools.
    pub(super) fn revive(&mut self, world: &mut World, node: usize) {
        world.restart(node);
        self.late_until[node] = world.now;
        self.current[node] = self.new_sides(world, node);
    }

    /// Puts right what can be.
    pub(super) fn heal(&mut self, world: &mut World) {
        world.net.set_loss(0.0);
        world.net.set_delay_spikes(0.0, 0);
        world.net.set_not_ready(0.0);
        world.control_delay = 200_000;
        for (here, there) in self.links_down.drain(..) {
            world.net.partition(&here, &there, false);
        }
        self.ports_down
            .retain(|device| !world.net.set_port(device, true));
        for device in self.mute.drain(..) {
            world.net.lose_answers(&device, false);
        }
        for (node, late_until) in world.nodes.iter_mut().zip(&mut self.late_until) {
            node.running = true;
            node.pace = 0;
            if *late_until == u64::MAX {
                *late_until = world.now + CATCH_UP;
            }
            for refuses in &node.unfenceable {
                refuses.store(false, Ordering::Relaxed);
            }
        }
    }
}
