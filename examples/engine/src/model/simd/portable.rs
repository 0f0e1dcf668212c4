//! Lanes without any instruction set: loops over arrays.

use half::f16;

use super::{Bytes64, F16x16, F32x16, Lanes};

/// Works everywhere.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn zip(a: [f32; 16], b: [f32; 16], f: impl Fn(f32, f32) -> f32) -> [f32; 16] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Lanes for Portable {
    type F = [f32; 16];
    type I = [i32; 16];
    type B = [u8; 64];
    const TILE: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 16] {
        [value; 16]
    }
    #[inline(always)]
    fn load(self, from: &F32x16) -> [f32; 16] {
        from.0
    }
    #[inline(always)]
    fn store(self, value: [f32; 16], to: &mut F32x16) {
        to.0 = value;
    }
    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| a / b)
    }
    // As the instructions do: the second if either is not a number.
    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn exp2_int(self, a: [f32; 16]) -> [f32; 16] {
        a.map(|a| f32::from_bits(((a as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn half(self, from: &F16x16) -> [f32; 16] {
        from.0.map(|bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn splat_int(self, value: i32) -> [i32; 16] {
        [value; 16]
    }
    #[inline(always)]
    fn to_float(self, value: [i32; 16]) -> [f32; 16] {
        value.map(|value| value as f32)
    }
    #[inline(always)]
    fn bytes(self, from: &Bytes64) -> [u8; 64] {
        from.0
    }
    #[inline(always)]
    fn nibbles(self, value: [u8; 64]) -> ([u8; 64], [u8; 64]) {
        (value.map(|byte| byte & 15), value.map(|byte| byte >> 4))
    }
    #[inline(always)]
    fn dot(self, mut sum: [i32; 16], weights: [u8; 64], values: i32) -> [i32; 16] {
        let values = values.to_le_bytes().map(|byte| i32::from(byte as i8));
        for (lane, sum) in sum.iter_mut().enumerate() {
            for (j, value) in values.iter().enumerate() {
                *sum += i32::from(weights[4 * lane + j]) * value;
            }
        }
        sum
    }
}
