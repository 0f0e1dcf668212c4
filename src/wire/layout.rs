//! The layout of a pool in a message. Layers repeat: a run of layers that differ only by a constant step of each
//! plane's region and offset is one entry with a repeat count.
//!
//! Steps are modulo 2^16 and 2^64, so falling regions and offsets need no sign; what comes out is checked like any
//! other layout before use.

use super::codec::{Reader, WireError, WireErrorKind, Writer};
use crate::kv::{Dtype, HeadRange, KvLayout, LayerLayout, Plane, PlaneRole};

/// Most layers of one layout.
pub(super) const MAX_LAYERS: usize = 4096;
/// Most planes of one layer: more than there are roles.
pub(super) const MAX_PLANES: usize = 8;

/// From one layer to the next.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Step {
    region: u16,
    offset: u64,
}

pub(super) fn write(writer: &mut Writer, layout: &KvLayout) -> Result<(), WireError> {
    writer.u32(layout.pages);
    writer.count("layers", layout.layers.len(), MAX_LAYERS)?;
    let mut rest = layout.layers.as_slice();
    while let Some((first, after)) = rest.split_first() {
        let steps = after.first().and_then(|next| steps(first, next));
        let run = 1 + steps.as_ref().map_or(0, |steps| repeats(rest, steps));
        writer.u16(run as u16);
        write_layer(writer, first)?;
        for step in steps.iter().flatten() {
            writer.u16(step.region);
            writer.u64(step.offset);
        }
        rest = rest.get(run..).unwrap_or_default();
    }
    Ok(())
}

pub(super) fn read(reader: &mut Reader<'_>) -> Result<KvLayout, WireError> {
    let pages = reader.u32("layout pages")?;
    let count = reader.count("layers", MAX_LAYERS)?;
    let mut layers = Vec::new();
    while layers.len() < count {
        let run = reader.count("layer run", count - layers.len())?;
        if run == 0 {
            let kind = WireErrorKind::TooSmall {
                value: 0,
                minimum: 1,
            };
            return Err(reader.error("layer run", kind));
        }
        let mut layer = read_layer(reader)?;
        let mut steps = Vec::with_capacity(MAX_PLANES);
        if run > 1 {
            for _ in &layer.planes {
                steps.push(Step {
                    region: reader.u16("region step")?,
                    offset: reader.u64("offset step")?,
                });
            }
        }
        for _ in 1..run {
            let next = advance(&layer, &steps);
            layers.push(std::mem::replace(&mut layer, next));
        }
        layers.push(layer);
    }
    Ok(KvLayout { pages, layers })
}

/// How many layers of `layers` after the first follow from the one before by `steps`.
fn repeats(layers: &[LayerLayout], steps: &[Step]) -> usize {
    layers
        .windows(2)
        .take_while(|pair| matches!(pair, [a, b] if advance(a, steps) == *b))
        .count()
}

/// The steps that lead from `a` to `b`, if they differ in nothing else.
fn steps(a: &LayerLayout, b: &LayerLayout) -> Option<Vec<Step>> {
    if a.planes.len() != b.planes.len() {
        return None;
    }
    let steps: Vec<Step> = a
        .planes
        .iter()
        .zip(&b.planes)
        .map(|(a, b)| Step {
            region: b.region.wrapping_sub(a.region),
            offset: b.offset.wrapping_sub(a.offset),
        })
        .collect();
    (advance(a, &steps) == *b).then_some(steps)
}

fn advance(layer: &LayerLayout, steps: &[Step]) -> LayerLayout {
    let mut next = layer.clone();
    for (plane, step) in next.planes.iter_mut().zip(steps) {
        plane.region = plane.region.wrapping_add(step.region);
        plane.offset = plane.offset.wrapping_add(step.offset);
    }
    next
}

fn write_layer(writer: &mut Writer, layer: &LayerLayout) -> Result<(), WireError> {
    writer.u32(layer.tokens_per_page);
    writer.list("planes", MAX_PLANES, &layer.planes, |w, plane| {
        w.u8(plane.role as u8);
        w.u8(plane.dtype as u8);
        w.u16(plane.region);
        w.u64(plane.offset);
        w.u64(plane.page_stride);
        w.u64(plane.token_stride);
        w.u64(plane.head_stride);
        w.u32(plane.head_bytes);
        w.u32(plane.heads.first);
        w.u32(plane.heads.count);
        Ok(())
    })
}

fn read_layer(reader: &mut Reader<'_>) -> Result<LayerLayout, WireError> {
    Ok(LayerLayout {
        tokens_per_page: reader.u32("tokens per page")?,
        planes: reader.list("planes", MAX_PLANES, |r| {
            let role = r.u8("plane role")?;
            let dtype = r.u8("plane dtype")?;
            Ok(Plane {
                role: r.known("plane role", role, PlaneRole::from_wire)?,
                dtype: r.known("plane dtype", dtype, Dtype::from_wire)?,
                region: r.u16("plane region")?,
                offset: r.u64("plane offset")?,
                page_stride: r.u64("page stride")?,
                token_stride: r.u64("token stride")?,
                head_stride: r.u64("head stride")?,
                head_bytes: r.u32("head bytes")?,
                heads: HeadRange {
                    first: r.u32("heads")?,
                    count: r.u32("heads")?,
                },
            })
        })?,
    })
}
