//! Vectors of 16 lanes, for the instruction set that the machine has: the only unsafe code of the kernels.
//!
//! A kernel is written once, over [`Lanes`], in safe code. [`Isa::run`] compiles and runs it for the instruction set
//! found at run time. Invariant: every operation gives the same bits on every instruction set (the multiply-add rounds
//! once, integer sums are exact), so what a kernel computes does not depend on the machine. Any thread may call.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

/// 16 floats in one cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct F32x16(pub(crate) [f32; 16]);

/// 64 bytes in one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Bytes64(pub(crate) [u8; 64]);

/// 16 half-precision floats.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct F16x16(pub(crate) [u16; 16]);

/// Operations on 16 lanes. Values exist only inside of [`Isa::run`].
pub(crate) trait Lanes: Copy {
    /// 16 floats.
    type F: Copy;
    /// 16 signed 32-bit integers.
    type I: Copy;
    /// 64 bytes: four for each lane.
    type B: Copy;
    /// Rows that a tile of a matrix product keeps in registers.
    const TILE: usize;

    fn splat(self, value: f32) -> Self::F;
    fn load(self, from: &F32x16) -> Self::F;
    fn store(self, value: Self::F, to: &mut F32x16);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Two to the power of `a`, which holds integers from -126 to 127.
    fn exp2_int(self, a: Self::F) -> Self::F;
    /// From half precision.
    fn half(self, from: &F16x16) -> Self::F;
    fn splat_int(self, value: i32) -> Self::I;
    fn to_float(self, value: Self::I) -> Self::F;
    fn bytes(self, from: &Bytes64) -> Self::B;
    /// The low and the high four bits of each byte.
    fn nibbles(self, value: Self::B) -> (Self::B, Self::B);
    /// Adds to each lane the products of its four unsigned bytes of `weights` with the four signed bytes of `values`.
    fn dot(self, sum: Self::I, weights: Self::B, values: i32) -> Self::I;
}

/// Something to compute with any instruction set. `run` and all it calls with lanes must be `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Lanes>(self, lanes: S) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best that this machine has.
    pub(crate) fn detect() -> Self {
        Self::all().pop().unwrap_or(Self(Level::Portable))
    }

    /// All that this machine has, the best last.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if x86::has_avx2() {
                all.push(Self(Level::Avx2));
            }
            if x86::has_avx512() {
                all.push(Self(Level::Avx512));
            }
        }
        all
    }

    /// As logs show it.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512-vnni",
        }
    }

    /// Runs a kernel.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Level::Portable => kernel.run(portable::Portable),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level is only made by `all`, after the features were found.
            Level::Avx2 => unsafe { x86::run_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { x86::run_avx512(kernel) },
        }
    }
}

/// The sum of all lanes, in a fixed order.
pub(crate) fn sum(lanes: &[f32; 16]) -> f32 {
    let mut width = 8;
    let mut v = *lanes;
    while width > 0 {
        for i in 0..width {
            v[i] += v[i + width];
        }
        width /= 2;
    }
    v[0]
}

/// e to the power of `x`, within 2 units of the last place from -87 to 88; less counts as -87, more as 88.
#[inline(always)]
pub(crate) fn exp<S: Lanes>(s: S, x: S::F) -> S::F {
    let x = s.min(s.max(x, s.splat(-87.0)), s.splat(88.0));
    // Rounds to an integer, half to even: from there on the format has no fraction.
    let magic = s.splat(12_582_912.0);
    let n = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), magic), magic);
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.add(s.fma(s.mul(p, r), r, r), s.splat(1.0));
    s.mul(p, s.exp2_int(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Everything<'a> {
        floats: &'a [F32x16; 3],
        bytes: &'a Bytes64,
        halves: &'a F16x16,
        values: i32,
    }

    impl Kernel for Everything<'_> {
        type Output = Vec<F32x16>;

        #[inline(always)]
        fn run<S: Lanes>(self, s: S) -> Vec<F32x16> {
            let [a, b, c] = [0, 1, 2].map(|i| self.floats[i]);
            let (a, b, c) = (s.load(&a), s.load(&b), s.load(&c));
            let bytes = s.bytes(self.bytes);
            let (low, high) = s.nibbles(bytes);
            let all = [
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.max(a, b),
                s.min(a, b),
                s.fma(a, b, c),
                exp(s, a),
                s.half(self.halves),
                s.to_float(s.dot(s.splat_int(-77), bytes, self.values)),
                s.to_float(s.dot(s.splat_int(1), low, self.values)),
                s.to_float(s.dot(s.splat_int(2), high, self.values)),
            ];
            let mut out = vec![F32x16::default(); all.len()];
            for (value, to) in all.into_iter().zip(&mut out) {
                s.store(value, to);
            }
            out
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let mut state = 7u64;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        for _ in 0..500 {
            let floats = [(); 3]
                .map(|()| F32x16([0; 16].map(|_| (next() as f32 / (1u64 << 31) as f32 - 0.5) * 40.0)));
            let bytes = Bytes64([0; 64].map(|_| next() as u8));
            let halves =
                F16x16([0; 16].map(|_| half::f16::from_f32(next() as f32 / 1e8).to_bits()));
            let values = next() as i32 ^ (next() as i32) << 8;
            let run = |isa: Isa| {
                isa.run(Everything {
                    floats: &floats,
                    bytes: &bytes,
                    halves: &halves,
                    values,
                })
            };
            let bits = |v: &[F32x16]| -> Vec<u32> {
                v.iter().flat_map(|x| x.0.map(f32::to_bits)).collect()
            };
            let expected = run(Isa(Level::Portable));
            for isa in Isa::all() {
                assert_eq!(bits(&run(isa)), bits(&expected), "{}", isa.name());
            }
        }
    }

    #[test]
    fn exp_is_close() {
        struct Exp(F32x16);
        impl Kernel for Exp {
            type Output = F32x16;
            #[inline(always)]
            fn run<S: Lanes>(mut self, s: S) -> F32x16 {
                let value = exp(s, s.load(&self.0));
                s.store(value, &mut self.0);
                self.0
            }
        }
        for step in -8700..8800 {
            let x = step as f32 / 100.0;
            let y = Isa::detect().run(Exp(F32x16([x; 16]))).0[3];
            let exact = f64::from(x).exp();
            assert!(
                ((f64::from(y) - exact) / exact).abs() < 2.4e-7,
                "exp({x}) = {y}, not {exact}"
            );
        }
    }
}
