//! Deaths, restarts, and what else happens to a node as a whole.

use super::{ConnId, ControlEvent, Node, World};
use crate::endpoint::control::CloseReason;

impl World {
    /// The name of a node's rail on the simulated net.
    pub(in super::super) fn rail_name(node: usize, rail: usize) -> String {
        format!("sim{node}-{rail}")
    }

    /// How many rails `node` has.
    pub(in super::super) fn rails(&self, node: usize) -> usize {
        self.nodes[node].rails
    }

    /// Ends `node` as `SIGKILL` ends a process: its devices are gone and, if `heard`, its connections are closed by
    /// its kernel. If not, its machine is gone, and nobody is told anything.
    pub(in super::super) fn kill(&mut self, node: usize, heard: bool) {
        for rail in 0..self.nodes[node].rails {
            self.net.kill_device(&Self::rail_name(node, rail));
        }
        if heard {
            self.cut(node);
        } else {
            for conn in self.conns_of(node) {
                if let Some((peer, other)) = self.ends.remove(&(node, conn)) {
                    self.ends.remove(&(peer, other));
                    self.half_open.push((node, peer, other));
                }
            }
        }
        let node = &mut self.nodes[node];
        node.dead = true;
        node.inbox.clear();
    }

    /// Starts `node` again after [`World::kill`]: the same name and address, another incarnation, nothing of its past.
    pub(in super::super) fn restart(&mut self, node: usize) {
        let old = &self.nodes[node];
        let (life, rails) = (old.life + 1, old.rails);
        self.nodes[node] = Node::new(&self.net, node, life, rails, &self.config, self.seed);
        // Whoever still speaks to the old process is told by the new one's kernel that there is no such connection.
        let (told, kept) = std::mem::take(&mut self.half_open)
            .into_iter()
            .partition::<Vec<_>, _>(|(dead, ..)| *dead == node);
        self.half_open = kept;
        for (_, peer, conn) in told {
            let reason = CloseReason::PeerClosed;
            self.deliver(peer, conn, ControlEvent::Closed { conn, reason });
        }
    }

    /// Cuts one connection of `node`: both sides are told.
    pub(in super::super) fn cut_one(&mut self, node: usize, conn: ConnId) {
        let Some((peer, other)) = self.ends.remove(&(node, conn)) else {
            return;
        };
        self.ends.remove(&(peer, other));
        for (node, conn) in [(node, conn), (peer, other)] {
            let reason = CloseReason::PeerClosed;
            self.deliver(node, conn, ControlEvent::Closed { conn, reason });
        }
    }
}
