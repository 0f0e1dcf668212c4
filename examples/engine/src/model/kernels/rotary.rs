//! The rotary embedding, and storing keys and values.
//!
//! Element `i` of a head turns with element `i + head_dim / 2` ("half-split" order; files with pairs side by side are
//! put into this order when they are loaded).

use parking_lot::Mutex;

use super::product::Panels;
use crate::{
    model::{
        ModelError,
        forward::{batch::Place, team::Team},
        kv::{Cache, MAX_HEAD_DIM, Role},
        simd::F32x16,
    },
};

/// Sines and cosines of every position.
pub(crate) struct Rotary {
    /// `[position][head_dim / 2 / 16]`.
    turns: Vec<(F32x16, F32x16)>,
    /// `head_dim / 2 / 16`.
    width: usize,
}

impl Rotary {
    /// `factors` divides the frequencies, one for each (1 where there are none).
    pub(crate) fn new(theta: f32, head_dim: usize, context: usize, factors: &[f32]) -> Self {
        let width = head_dim / 32;
        let mut turns = vec![(F32x16::default(), F32x16::default()); context * width];
        for (position, turns) in turns.chunks_mut(width.max(1)).enumerate() {
            for i in 0..head_dim / 2 {
                let factor = factors.get(i).copied().unwrap_or(1.0);
                let frequency = f64::from(theta).powf(-2.0 * i as f64 / head_dim as f64);
                let (sin, cos) = (position as f64 * frequency / f64::from(factor)).sin_cos();
                turns[i / 16].0.0[i % 16] = sin as f32;
                turns[i / 16].1.0[i % 16] = cos as f32;
            }
        }
        Self { turns, width }
    }

    fn turn(&self, position: usize, low: &mut F32x16, high: &mut F32x16, i: usize) {
        let (sin, cos) = &self.turns[position * self.width + i];
        for lane in 0..16 {
            let (a, b) = (low.0[lane], high.0[lane]);
            low.0[lane] = a * cos.0[lane] - b * sin.0[lane];
            high.0[lane] = b * cos.0[lane] + a * sin.0[lane];
        }
    }

    /// `values` has a rank's queries, keys and values side by side. Turns queries in place (and divides them by the
    /// square root of the head's size), turns and stores keys, stores values.
    pub(crate) fn turn_and_store(
        &self,
        team: &mut Team,
        values: &mut Panels,
        (heads, kv_heads): (usize, usize),
        places: &[Place],
        (cache, layer): (&Cache, usize),
    ) -> Result<(), ModelError> {
        let rows = values.rows;
        let width = 2 * self.width;
        let scale = 1.0 / ((width * 16) as f32).sqrt();
        let failure = Mutex::new(None);
        let work = Mutex::new(values.data.chunks_mut(width * rows).enumerate());
        let section = || {
            loop {
                let next = work.lock().next();
                let Some((head, values)) = next else { break };
                if head < heads {
                    self.turn_head(rows, values, places);
                    values.iter_mut().for_each(|x| x.0.iter_mut().for_each(|x| *x *= scale));
                    continue;
                }
                let (role, head) = match head - heads {
                    key if key < kv_heads => {
                        self.turn_head(rows, values, places);
                        (Role::Key, key)
                    }
                    value => (Role::Value, value - kv_heads),
                };
                let mut vector = [0.0; MAX_HEAD_DIM];
                let vector = &mut vector[..width * 16];
                for (row, place) in places.iter().enumerate() {
                    for (i, to) in vector.chunks_mut(16).enumerate() {
                        to.copy_from_slice(&values[i * rows + row].0);
                    }
                    let result = cache.store((layer, role, head), (place.block, place.slot), vector);
                    if let Err(error) = result {
                        *failure.lock() = Some(error);
                    }
                }
            }
        };
        if rows == 1 {
            section();
        } else {
            team.run(&section);
        }
        failure.into_inner().map_or(Ok(()), Err)
    }

    fn turn_head(&self, rows: usize, values: &mut [F32x16], places: &[Place]) {
        let (low, high) = values.split_at_mut(self.width * rows);
        for i in 0..self.width {
            let pairs = low[i * rows..][..rows].iter_mut().zip(&mut high[i * rows..][..rows]);
            for ((low, high), place) in pairs.zip(places) {
                self.turn(place.position, low, high, i);
            }
        }
    }
}
