//! FP8 (OCP e4m3) with one scale for each token and head.
//!
//! The largest magnitude of a vector becomes 448, the format's largest. Bound: each element comes back within
//! `max(|x| / 16, largest / 448 / 1024)` (half a unit in the last of three mantissa bits; half a unit of the
//! subnormals), and a vector of zeros exactly.

use std::sync::LazyLock;

/// The largest finite value.
const MAX: f32 = 448.0;

static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|bits| decode(bits as u8)));

/// Writes one byte for each value; returns the scale.
pub(crate) fn quantise(values: &[f32], out: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let scale = largest / MAX;
    if scale <= 0.0 || !scale.is_normal() {
        out.fill(0);
        return 0.0;
    }
    let inverse = 1.0 / scale;
    for (out, value) in out.iter_mut().zip(values) {
        *out = encode(value * inverse);
    }
    scale
}

pub(crate) fn dequantise(bytes: &[u8], scale: f32, out: &mut [f32]) {
    let values = &*VALUES;
    for (out, bits) in out.iter_mut().zip(bytes) {
        *out = values[usize::from(*bits)] * scale;
    }
}

/// Nearest, ties to even; more than 448 becomes 448.
fn encode(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24) as u8 & 128;
    let magnitude = value.abs().min(MAX);
    if magnitude < 1.0 / 64.0 {
        // Subnormal: units of 2^-9. Eight of them are the smallest normal number, whose bits follow.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    // Rounds the mantissa from 23 bits to 3; a carry goes into the exponent, as it should.
    let bits = magnitude.to_bits();
    let rounded = (bits + 0x0007_ffff + (bits >> 20 & 1)) >> 20;
    // The exponent's bias is 7 instead of 127.
    sign | (rounded - (120 << 3)).min(0x7e) as u8
}

fn decode(bits: u8) -> f32 {
    let mantissa = f32::from(bits & 7);
    let magnitude = match bits >> 3 & 15 {
        15 if bits & 7 == 7 => f32::NAN,
        0 => mantissa / 512.0,
        exponent => (1.0 + mantissa / 8.0) * 2f32.powi(i32::from(exponent) - 7),
    };
    if bits & 128 > 0 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_number_survives() {
        for bits in 0..=255u8 {
            let value = decode(bits);
            if !value.is_nan() {
                assert_eq!(encode(value), bits, "{value}");
            }
        }
        assert_eq!(decode(0x7e), MAX);
        assert_eq!(encode(1e9), 0x7e);
    }

    #[test]
    fn each_number_goes_to_the_nearest() {
        let mut finite: Vec<f32> = (0..0x7f).map(decode).collect();
        finite.sort_by(f32::total_cmp);
        for step in 0..100_000 {
            let x = step as f32 * 448.0 / 100_000.0;
            let error = (decode(encode(x)) - x).abs();
            let best = finite.iter().map(|y| (y - x).abs()).fold(f32::MAX, f32::min);
            assert_eq!(error, best, "{x}");
        }
    }

    #[test]
    fn vectors_come_back_within_the_bound() {
        let mut state = 1u32;
        for round in 0..1000 {
            let values: Vec<f32> = (0..64)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let x = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
                    x.powi(1 + round % 5) * 10f32.powi(round % 7 - 3)
                })
                .collect();
            let (mut bytes, mut back) = ([0; 64], [0.0; 64]);
            let scale = quantise(&values, &mut bytes);
            dequantise(&bytes, scale, &mut back);
            let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            for (x, y) in values.iter().zip(back) {
                // A little more for the two roundings of the scale.
                let bound = (x.abs() / 16.0).max(largest / 448.0 / 1024.0) * 1.0001;
                assert!((x - y).abs() <= bound, "{x} came back as {y}");
            }
        }
        let mut back = [1.0; 64];
        let mut bytes = [1; 64];
        let scale = quantise(&[0.0; 64], &mut bytes);
        dequantise(&bytes, scale, &mut back);
        assert_eq!(back, [0.0; 64]);
    }
}
