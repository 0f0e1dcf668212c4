//! What is moved: plain data that travels from pusher to server, its limits, its layouts and its memory.
//!
//! A server takes a workload from whoever reaches its port, so everything is checked before it is used:
//! [`Workload::check`] first, then the memory it needs against the limit.

use kvpush::{
    Grant,
    kv::{
        Dtype, KvLayout,
        models::Model,
        presets::{HeadOrder, KvShape},
        region_lengths,
        shard::{Pair, pairing, shard_heads},
    },
};
use serde::{Deserialize, Serialize};

use crate::{
    cli::{LayoutChoice, Op},
    error::{Context, Error, Result},
    measure::bytes_text,
};

/// Most ranks of one side: each is an endpoint with threads of its own.
const MAX_RANKS: u32 = 64;
const MAX_REQUESTS: u32 = 4096;

/// Bytes of a push that is large enough for its beginning and its end not to matter.
pub(crate) const LARGE_BATCH: u32 = 2 << 20;

/// An element type by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Element {
    F32,
    F16,
    Bf16,
    Fp8,
    I8,
}

impl Element {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::Bf16,
            Self::Fp8 => Dtype::F8E4M3,
            Self::I8 => Dtype::I8,
        }
    }

    fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::F8E4M3Fnuz => Self::Fp8,
            _ => Self::I8,
        }
    }
}

/// Reads an element type from the command line.
pub(crate) fn parse_dtype(text: &str) -> Result<Element, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "f32" | "float32" => Element::F32,
        "f16" | "float16" => Element::F16,
        "bf16" | "bfloat16" => Element::Bf16,
        "fp8" | "f8" | "fp8_e4m3" => Element::Fp8,
        "i8" | "int8" => Element::I8,
        _ => return Err("known are bf16, f16, f32, fp8 and i8".to_owned()),
    })
}

/// One row of the result: a KV cache, who holds it, and how much of it moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Workload {
    /// The model's name, or `raw`.
    pub(crate) model: String,
    pub(crate) op: Op,
    pub(crate) layers: u32,
    pub(crate) kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) element: Element,
    pub(crate) mla: bool,
    pub(crate) layout: LayoutChoice,
    pub(crate) tokens_per_page: u32,
    pub(crate) tp_prefill: u32,
    pub(crate) tp_decode: u32,
    pub(crate) requests: u32,
    /// Of one request.
    pub(crate) pages: u32,
    /// Neighbouring pages of a request; 0 for none.
    pub(crate) run_length: u32,
    pub(crate) lanes: u16,
    pub(crate) timeout_seconds: u32,
}

/// Which side of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Prefill,
    Decode,
}

impl Workload {
    /// A model's cache with defaults everywhere else.
    pub(crate) fn of_model(model: &Model, tp_prefill: u32, tp_decode: u32) -> Self {
        Self {
            model: model.name.to_owned(),
            op: Op::Push,
            layers: model.layers,
            kv_heads: model.kv_heads,
            head_dim: model.head_dim,
            element: Element::of(model.dtype),
            mla: model.mla,
            layout: if tp_prefill == tp_decode {
                LayoutChoice::Flash
            } else {
                LayoutChoice::Hnd
            },
            tokens_per_page: if model.mla { 64 } else { 16 },
            tp_prefill,
            tp_decode,
            requests: 4,
            pages: if model.mla { 32 } else { 64 },
            run_length: 4,
            lanes: 2,
            timeout_seconds: 120,
        }
    }

    /// Opaque pages of one size, one layer, all apart.
    pub(crate) fn raw(op: Op, page_bytes: u32) -> Self {
        // About 64 MiB a round, so that small pages are measured over many batches.
        let batch = u64::from(page_bytes) * 128;
        Self {
            model: "raw".to_owned(),
            op,
            layers: 1,
            kv_heads: 1,
            head_dim: page_bytes,
            element: Element::I8,
            mla: true,
            layout: LayoutChoice::Flash,
            tokens_per_page: 1,
            tp_prefill: 1,
            tp_decode: 1,
            requests: u32::try_from(((64 << 20) / batch).clamp(2, 100)).unwrap_or(2),
            pages: 128,
            run_length: 0,
            lanes: 2,
            timeout_seconds: 120,
        }
    }

    /// Refuses what makes no sense or is beyond all bounds.
    pub(crate) fn check(&self) -> Result<()> {
        let ranges = [
            ("ranks of the prefill side", self.tp_prefill, MAX_RANKS),
            ("ranks of the decode side", self.tp_decode, MAX_RANKS),
            ("requests", self.requests, MAX_REQUESTS),
            ("pages", self.pages, Grant::MAX_PAGES as u32),
            ("layers", self.layers, kvpush::kv::limits::LAYERS as u32),
            ("lanes", self.lanes.into(), 16),
            ("timeout", self.timeout_seconds, 86_400),
        ];
        for (what, value, most) in ranges {
            if value == 0 || value > most {
                return Err(Error::usage(format!(
                    "{what}: {value} is not within 1 to {most}"
                )));
            }
        }
        if self.model.len() > 64 || self.model.chars().any(char::is_control) {
            return Err(Error::usage("the model's name is not a name"));
        }
        if self.op != Op::Push
            && (self.tp_prefill, self.tp_decode, self.layers, self.mla) != (1, 1, 1, true)
        {
            return Err(Error::usage(
                "one-sided access moves raw pages between two ranks only",
            ));
        }
        self.pairs()?;
        self.pool_pages()?;
        for (side, ranks) in [
            (Side::Prefill, self.tp_prefill),
            (Side::Decode, self.tp_decode),
        ] {
            self.layout(side, ranks - 1)?;
        }
        Ok(())
    }

    /// Who sends which heads to whom.
    pub(crate) fn pairs(&self) -> Result<Vec<Pair>> {
        let usage = |error| Error::usage(format!("{}: {error}", self.model));
        pairing(self.kv_heads, self.tp_prefill, self.tp_decode).map_err(usage)
    }

    pub(crate) fn ranks(&self, side: Side) -> u32 {
        match side {
            Side::Prefill => self.tp_prefill,
            Side::Decode => self.tp_decode,
        }
    }

    /// Pages of each pool: those of all requests and some that nobody may write.
    pub(crate) fn pool_pages(&self) -> Result<u32> {
        let used = u64::from(self.requests) * u64::from(self.pages);
        let pages = match self.run_length {
            // Every second page, and one more at the end.
            0 => used * 2 + 1,
            _ => used + (used / 16).max(1),
        };
        u32::try_from(pages)
            .map_err(|_| Error::usage(format!("{pages} pages are more than a pool can count")))
    }

    /// The pool of one rank.
    pub(crate) fn layout(&self, side: Side, rank: u32) -> Result<KvLayout> {
        let tp = self.ranks(side);
        let shape = KvShape {
            layers: self.layers,
            tokens_per_page: self.tokens_per_page,
            heads: shard_heads(self.kv_heads, tp, rank)
                .map_err(|error| Error::usage(error.to_string()))?,
            head_dim: self.head_dim,
            dtype: self.element.dtype(),
        };
        let pages = self.pool_pages()?;
        let layout = match (self.mla, self.layout) {
            (true, _) => shape.mla(pages),
            (_, LayoutChoice::Flash) => shape.vllm_flash(pages),
            (_, LayoutChoice::Hnd) => shape.vllm_flashinfer(pages, HeadOrder::HeadMajor),
            (_, LayoutChoice::Sglang) => shape.sglang(pages),
        };
        layout.map_err(|error| Error::usage(format!("the pool of rank {rank}: {error}")))
    }

    /// Bytes of one page of one layer: all heads, keys and values.
    pub(crate) fn page_bytes(&self) -> u64 {
        let planes = if self.mla { 1 } else { 2 };
        [
            self.tokens_per_page,
            self.kv_heads,
            self.head_dim,
            self.element.dtype().bytes(),
        ]
        .into_iter()
        .fold(planes, |bytes: u64, factor| {
            bytes.saturating_mul(factor.into())
        })
    }

    /// Bytes that one round moves: heads replicated over decode ranks count as often as they are sent.
    pub(crate) fn round_bytes(&self, requests: u32) -> Result<u64> {
        let heads: u64 = self
            .pairs()?
            .iter()
            .map(|pair| u64::from(pair.heads.count))
            .sum();
        let head = self.page_bytes() / u64::from(self.kv_heads.max(1));
        let factors = [
            heads,
            self.layers.into(),
            self.pages.into(),
            requests.into(),
        ];
        let product = factors.into_iter().try_fold(head, u64::checked_mul);
        product.ok_or_else(|| Error::usage("the workload has more than 2^64 bytes"))
    }

    /// Bytes of the pools of one side, and of the largest region among them (each filling or verifying thread needs
    /// one such buffer).
    pub(crate) fn pool_memory(&self, side: Side) -> Result<(u64, u64)> {
        let (mut total, mut largest) = (0u64, 0u64);
        for rank in 0..self.ranks(side) {
            for length in region_lengths(&self.layout(side, rank)?).context("the pool's regions")? {
                total = total.saturating_add(length);
                largest = largest.max(length);
            }
        }
        Ok((total, largest))
    }

    /// All bytes that `side` needs, with the arithmetic.
    pub(crate) fn memory(&self, side: Side) -> Result<(u64, String)> {
        let (pools, region) = self.pool_memory(side)?;
        let threads = crate::content::threads();
        let buffers = region.saturating_mul(threads);
        let name = match side {
            Side::Prefill => "prefill",
            Side::Decode => "decode",
        };
        let text = format!(
            "{name}: {} rank(s) with {} pages of {} layers = {}, and {threads} buffers of {}",
            self.ranks(side),
            self.pool_pages()?,
            self.layers,
            bytes_text(pools),
            bytes_text(region),
        );
        Ok((pools.saturating_add(buffers), text))
    }

    /// Refuses a workload that needs more than `limit` for the given sides.
    pub(crate) fn check_memory(&self, sides: &[Side], limit: Option<u64>) -> Result<()> {
        let (mut needed, mut terms) = (0u64, Vec::new());
        for &side in sides {
            let (bytes, text) = self.memory(side)?;
            needed = needed.saturating_add(bytes);
            terms.push(text);
        }
        match limit {
            Some(limit) if needed > limit => Err(Error::failed(format!(
                "{} needs {} of memory, {} are to be had\n  {}\n  take fewer --pages, --requests or --layers",
                self.title(),
                bytes_text(needed),
                bytes_text(limit),
                terms.join("\n  "),
            ))),
            _ => Ok(()),
        }
    }

    /// For tables and messages.
    pub(crate) fn title(&self) -> String {
        if self.model == "raw" {
            return format!("{} pages", bytes_text(self.page_bytes()));
        }
        format!("{} TP {}→{}", self.model, self.tp_prefill, self.tp_decode)
    }

    /// The page table of each request on one side: position to page. Both processes compute it from the seed.
    pub(crate) fn page_tables(&self, side: Side, seed: u64) -> Result<Vec<Vec<u32>>> {
        let pool = self.pool_pages()?;
        let salt = match side {
            Side::Prefill => 0x70,
            Side::Decode => 0xd0,
        };
        let mut random = crate::content::Random::new(seed ^ salt);
        let mut runs: Vec<Vec<u32>> = match self.run_length {
            0 => (0..pool / 2).map(|index| vec![index * 2 + 1]).collect(),
            length => {
                let all: Vec<u32> = (0..pool).collect();
                all.chunks(length as usize).map(<[u32]>::to_vec).collect()
            }
        };
        random.shuffle(&mut runs);
        let order: Vec<u32> = runs.concat();
        Ok(order
            .chunks(self.pages as usize)
            .take(self.requests as usize)
            .map(<[u32]>::to_vec)
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvpush::kv::models;
    use std::collections::HashSet;

    #[test]
    fn page_tables_share_no_page_and_keep_their_runs() {
        let mut workload = Workload::of_model(&models::LLAMA_3_1_8B, 1, 1);
        for (run_length, requests, pages) in [(4, 3, 32), (1, 5, 7), (64, 2, 100)] {
            (workload.run_length, workload.requests, workload.pages) =
                (run_length, requests, pages);
            let tables = workload.page_tables(Side::Decode, 9).unwrap();
            assert_eq!(tables.len(), requests as usize);
            let all: Vec<_> = tables.concat();
            assert_eq!(all.len(), (requests * pages) as usize);
            assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
            assert!(
                all.iter()
                    .all(|&page| page < workload.pool_pages().unwrap())
            );
            assert_ne!(tables, workload.page_tables(Side::Prefill, 9).unwrap());
            assert_eq!(tables, workload.page_tables(Side::Decode, 9).unwrap());
        }
    }

    #[test]
    fn raw_pages_have_no_neighbours() {
        let workload = Workload::raw(Op::Push, 4096);
        for table in workload.page_tables(Side::Decode, 1).unwrap() {
            assert_eq!(table.len(), 128);
            assert!(table.iter().all(|page| !table.contains(&(page + 1))));
        }
    }

    #[test]
    fn bytes_of_known_workloads() {
        let mut llama = Workload::of_model(&models::LLAMA_3_1_8B, 4, 2);
        llama.pages = 10;
        // 128 KiB a token, 16 tokens a page.
        assert_eq!(llama.round_bytes(3).unwrap(), 3 * 10 * 16 * (128 << 10));
        assert_eq!(llama.page_bytes(), 64 << 10);
        // Every decode rank takes a copy of the latent.
        let mla = Workload::of_model(&models::DEEPSEEK_R1, 1, 2);
        assert_eq!(mla.round_bytes(1).unwrap(), 2 * 61 * 64 * 1152 * 32);
        assert_eq!(Workload::raw(Op::Read, 4096).page_bytes(), 4096);
    }

    #[test]
    fn absurd_workloads_are_refused() {
        let good = Workload::of_model(&models::LLAMA_3_1_8B, 2, 4);
        good.check().unwrap();
        let refuse = |change: &dyn Fn(&mut Workload)| {
            let mut bad = good.clone();
            change(&mut bad);
            assert!(bad.check().is_err(), "{bad:?}");
        };
        refuse(&|w| w.tp_decode = 3);
        refuse(&|w| w.tp_prefill = 0);
        refuse(&|w| w.tp_prefill = 1 << 15);
        refuse(&|w| w.requests = u32::MAX);
        refuse(&|w| w.pages = 0);
        refuse(&|w| w.layers = 5000);
        refuse(&|w| w.tokens_per_page = u32::MAX);
        refuse(&|w| w.head_dim = 0);
        refuse(&|w| w.kv_heads = 0);
        refuse(&|w| w.op = Op::Read);
        refuse(&|w| w.model = "\n".into());
        refuse(&|w| w.timeout_seconds = 0);
    }

    #[test]
    fn too_much_memory_is_refused_with_the_arithmetic() {
        let workload = Workload::of_model(&models::LLAMA_3_1_70B, 1, 1);
        let error = workload
            .check_memory(&[Side::Prefill, Side::Decode], Some(1 << 20))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("llama-3.1-70b") && error.contains("272 pages of 80 layers"),
            "{error}"
        );
        workload
            .check_memory(&[Side::Decode], Some(1 << 40))
            .unwrap();
    }
}
