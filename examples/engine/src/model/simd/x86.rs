//! Lanes of AVX2 with FMA and F16C, and of AVX-512 with VNNI.
//!
//! Every block below that calls intrinsics has the same contract: `Avx2` and `Avx512` are made only by `run_avx2` and
//! `run_avx512`, whose callers have found the features on this machine; loads and stores go through references to
//! 32 or 64 bytes.

use std::arch::x86_64::*;

use super::{Bytes64, F16x16, F32x16, Kernel, Lanes};

pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

pub(super) fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
}

/// # Safety
///
/// [`has_avx2`] was true.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// # Safety
///
/// [`has_avx512`] was true.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// Proof that AVX2, FMA and F16C are here.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Proof that AVX-512 F, BW, VL, DQ and VNNI are here.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// Defines methods that are one expression of intrinsics.
macro_rules! methods {
    ($(fn $name:ident($self:ident $(, $arg:ident: $ty:ty)*) -> $out:ty $body:block)*) => {
        $(
            #[inline(always)]
            fn $name($self $(, $arg: $ty)*) -> $out {
                // SAFETY: see the module: `self` proves the features, references prove the memory.
                unsafe { $body }
            }
        )*
    };
}

impl Lanes for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    const TILE: usize = 8;

    methods! {
        fn splat(self, value: f32) -> __m512 { _mm512_set1_ps(value) }
        fn load(self, from: &F32x16) -> __m512 { _mm512_load_ps(from.0.as_ptr()) }
        fn store(self, value: __m512, to: &mut F32x16) -> () { _mm512_store_ps(to.0.as_mut_ptr(), value) }
        fn add(self, a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(self, a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(self, a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn max(self, a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn min(self, a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn exp2_int(self, a: __m512) -> __m512 {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))
        }
        fn half(self, from: &F16x16) -> __m512 {
            _mm512_cvtph_ps(_mm256_load_si256(from.0.as_ptr().cast()))
        }
        fn splat_int(self, value: i32) -> __m512i { _mm512_set1_epi32(value) }
        fn to_float(self, value: __m512i) -> __m512 { _mm512_cvtepi32_ps(value) }
        fn bytes(self, from: &Bytes64) -> __m512i { _mm512_load_si512(from.0.as_ptr().cast()) }
        fn nibbles(self, value: __m512i) -> (__m512i, __m512i) {
            let mask = _mm512_set1_epi8(15);
            (
                _mm512_and_si512(value, mask),
                _mm512_and_si512(_mm512_srli_epi16(value, 4), mask),
            )
        }
        fn dot(self, sum: __m512i, weights: __m512i, values: i32) -> __m512i {
            _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(values))
        }
    }
}

/// Applies an intrinsic to both halves.
macro_rules! both {
    ($f:ident, $($x:ident),*) => { ($f($($x.0),*), $f($($x.1),*)) };
}

impl Lanes for Avx2 {
    type F = (__m256, __m256);
    type I = (__m256i, __m256i);
    type B = (__m256i, __m256i);
    const TILE: usize = 2;

    methods! {
        fn splat(self, value: f32) -> Self::F { (_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        fn load(self, from: &F32x16) -> Self::F {
            (_mm256_load_ps(from.0.as_ptr()), _mm256_load_ps(from.0[8..].as_ptr()))
        }
        fn store(self, value: Self::F, to: &mut F32x16) -> () {
            _mm256_store_ps(to.0.as_mut_ptr(), value.0);
            _mm256_store_ps(to.0[8..].as_mut_ptr(), value.1);
        }
        fn add(self, a: Self::F, b: Self::F) -> Self::F { both!(_mm256_add_ps, a, b) }
        fn sub(self, a: Self::F, b: Self::F) -> Self::F { both!(_mm256_sub_ps, a, b) }
        fn mul(self, a: Self::F, b: Self::F) -> Self::F { both!(_mm256_mul_ps, a, b) }
        fn div(self, a: Self::F, b: Self::F) -> Self::F { both!(_mm256_div_ps, a, b) }
        fn max(self, a: Self::F, b: Self::F) -> Self::F { both!(_mm256_max_ps, a, b) }
        fn min(self, a: Self::F, b: Self::F) -> Self::F { both!(_mm256_min_ps, a, b) }
        fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F { both!(_mm256_fmadd_ps, a, b, c) }
        fn exp2_int(self, a: Self::F) -> Self::F {
            let bias = _mm256_set1_epi32(127);
            let n = (
                _mm256_add_epi32(_mm256_cvtps_epi32(a.0), bias),
                _mm256_add_epi32(_mm256_cvtps_epi32(a.1), bias),
            );
            (
                _mm256_castsi256_ps(_mm256_slli_epi32(n.0, 23)),
                _mm256_castsi256_ps(_mm256_slli_epi32(n.1, 23)),
            )
        }
        fn half(self, from: &F16x16) -> Self::F {
            (
                _mm256_cvtph_ps(_mm_loadu_si128(from.0.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.0[8..].as_ptr().cast())),
            )
        }
        fn splat_int(self, value: i32) -> Self::I { (_mm256_set1_epi32(value), _mm256_set1_epi32(value)) }
        fn to_float(self, value: Self::I) -> Self::F { both!(_mm256_cvtepi32_ps, value) }
        fn bytes(self, from: &Bytes64) -> Self::B {
            (
                _mm256_load_si256(from.0.as_ptr().cast()),
                _mm256_load_si256(from.0[32..].as_ptr().cast()),
            )
        }
        fn nibbles(self, value: Self::B) -> (Self::B, Self::B) {
            let mask = _mm256_set1_epi8(15);
            let high = (_mm256_srli_epi16(value.0, 4), _mm256_srli_epi16(value.1, 4));
            (
                (_mm256_and_si256(value.0, mask), _mm256_and_si256(value.1, mask)),
                (_mm256_and_si256(high.0, mask), _mm256_and_si256(high.1, mask)),
            )
        }
        // By 16-bit products, which cannot saturate.
        fn dot(self, sum: Self::I, weights: Self::B, values: i32) -> Self::I {
            let values = _mm256_set1_epi32(values);
            let even = _mm256_srai_epi16(_mm256_slli_epi16(values, 8), 8);
            let odd = _mm256_srai_epi16(values, 8);
            let mask = _mm256_set1_epi16(255);
            let low = (_mm256_and_si256(weights.0, mask), _mm256_and_si256(weights.1, mask));
            let high = (_mm256_srli_epi16(weights.0, 8), _mm256_srli_epi16(weights.1, 8));
            let a = (_mm256_madd_epi16(low.0, even), _mm256_madd_epi16(low.1, even));
            let b = (_mm256_madd_epi16(high.0, odd), _mm256_madd_epi16(high.1, odd));
            let ab = both!(_mm256_add_epi32, a, b);
            both!(_mm256_add_epi32, sum, ab)
        }
    }
}
