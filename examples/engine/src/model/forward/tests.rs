//! The guarantee of the forward pass on the built-in models: what bits depend on, and what not.

use std::ops::Range;

use crate::{
    model::{
        BuiltIn, Chunk, KvDtype, LoadOptions, Logits, Memory, Model, ModelError, Observer, Part,
        Source, Wanted, WeightMode, load,
    },
    request::{BlockId, TokenId},
};

fn options(tp: u32) -> LoadOptions {
    LoadOptions {
        tp,
        memory: Memory::Blocks(64),
        threads: 2,
        ..LoadOptions::default()
    }
}

fn model(options: &LoadOptions) -> Box<dyn Model> {
    load(options).unwrap()
}

fn tokens(seed: u32, count: usize) -> Vec<TokenId> {
    let next = |i: usize| (i as u32 * 7 + seed * 13 + (i * i) as u32 % 31) % 256;
    (0..count).map(next).collect()
}

fn chunk<'a>(tokens: &'a [TokenId], start: usize, blocks: &'a [BlockId]) -> Chunk<'a> {
    Chunk {
        tokens,
        start,
        blocks,
        logits: Wanted::All,
    }
}

fn run(model: &mut dyn Model, batch: &[Chunk<'_>]) -> Logits {
    model.forward(batch, &mut ()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// All kinds of weights and caches, with some ranks.
fn variants() -> Vec<LoadOptions> {
    let mut all = Vec::new();
    for tp in [1, 2] {
        for weights in [WeightMode::F32, WeightMode::Q8_0] {
            for kv_dtype in [KvDtype::F32, KvDtype::Fp8E4m3] {
                all.push(LoadOptions {
                    weights,
                    kv_dtype,
                    ..options(tp)
                });
            }
        }
    }
    all
}

#[test]
fn bits_do_not_depend_on_chunks_blocks_or_the_batch() {
    let prompt = tokens(1, 70);
    let other = tokens(2, 41);
    for options in variants() {
        let mut model = model(&options);
        let blocks: Vec<BlockId> = (0..5).collect();
        let expected = run(&mut *model, &[chunk(&prompt, 0, &blocks)]);
        // Token by token, over other blocks; then in chunks that do not end where blocks do, beside another sequence.
        let scattered = [63, 7, 31, 9, 40];
        for (i, token) in prompt.iter().enumerate() {
            let row = run(&mut *model, &[chunk(&[*token], i, &scattered)]);
            assert_eq!(bits(row.row(0)), bits(expected.row(i)), "{options:?}: token {i}");
        }
        let third = [20, 21, 22, 23, 24];
        let others = [50, 51, 52];
        for (first, end) in [(0, 3), (3, 20), (20, 53), (53, 70)] {
            let part = chunk(&prompt[first..end], first, &third);
            let beside = chunk(&other, 0, &others);
            let rows = run(&mut *model, &[beside, part]);
            for i in first..end {
                let row = rows.row(other.len() + i - first);
                assert_eq!(bits(row), bits(expected.row(i)), "{options:?}: token {i}");
            }
        }
        // A prefix that is there already.
        let rows = run(&mut *model, &[chunk(&prompt[48..], 48, &scattered)]);
        assert_eq!(bits(rows.row(21)), bits(expected.row(69)));
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_on_overlap() {
    let prompts = [tokens(1, 33), tokens(2, 9), tokens(3, 1)];
    let blocks = [[0, 1, 2], [3, 4, 5], [6, 7, 8]];
    for tp in [1, 2, 4] {
        let mut expected = None;
        for (threads, tbo) in [(1, false), (4, false), (1, true), (8, true)] {
            let mut model = model(&LoadOptions {
                threads,
                tbo,
                ..options(tp)
            });
            let batch = [0, 1, 2].map(|i| chunk(&prompts[i], 0, &blocks[i]));
            let logits = bits(&run(&mut *model, &batch).values);
            assert_eq!(*expected.get_or_insert_with(|| logits.clone()), logits);
        }
    }
}

#[test]
fn ranks_agree_within_rounding() {
    let prompt = tokens(5, 50);
    let blocks = [3, 1, 2, 0];
    for (built_in, ranks) in [(BuiltIn::Tiny, &[2, 4][..]), (BuiltIn::TinyThree, &[3])] {
        let of = |tp, weights| LoadOptions {
            source: Source::BuiltIn(built_in),
            weights,
            ..options(tp)
        };
        for (weights, bound) in [(WeightMode::F32, 1e-4), (WeightMode::Q8_0, 0.1)] {
            let one = run(&mut *model(&of(1, weights)), &[chunk(&prompt, 0, &blocks)]);
            for tp in ranks {
                let many = run(&mut *model(&of(*tp, weights)), &[chunk(&prompt, 0, &blocks)]);
                let difference = largest_difference(&one, &many);
                assert!(difference < bound, "{built_in:?} {weights:?} {tp}: {difference}");
            }
        }
    }
}

fn largest_difference(a: &Logits, b: &Logits) -> f32 {
    let both = a.values.iter().zip(&b.values);
    both.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn fp8_stays_near_f32() {
    let prompt = tokens(5, 60);
    let blocks = [3, 1, 2, 0];
    let [exact, fp8] = [KvDtype::F32, KvDtype::Fp8E4m3].map(|kv_dtype| {
        let options = LoadOptions {
            kv_dtype,
            ..options(1)
        };
        run(&mut *model(&options), &[chunk(&prompt, 0, &blocks)])
    });
    let spread = exact.values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    let difference = largest_difference(&exact, &fp8);
    assert!(difference > 0.0, "FP8 changes nothing: is it used?");
    assert!(difference < 0.1 * spread, "{difference} of {spread}");
}

/// Writes down what it hears.
#[derive(Default)]
struct Heard(Vec<String>);

impl Observer for Heard {
    fn layer_written(&mut self, layer: usize, chunks: Range<usize>) {
        self.0.push(format!("written {layer} {chunks:?}"));
    }
    fn layer_computed(&mut self, layer: usize, chunks: Range<usize>) {
        self.0.push(format!("computed {layer} {chunks:?}"));
    }
    fn exchange_started(&mut self, layer: usize, part: Part, chunks: Range<usize>) {
        self.0.push(format!("started {layer} {part:?} {chunks:?}"));
    }
    fn exchange_ended(&mut self, layer: usize, part: Part, chunks: Range<usize>) {
        self.0.push(format!("ended {layer} {part:?} {chunks:?}"));
    }
}

impl Heard {
    fn at(&self, what: &str) -> usize {
        let mut places = (0..self.0.len()).filter(|i| self.0[*i] == what);
        let place = places.next().unwrap_or_else(|| panic!("{what}: {:?}", self.0));
        assert_eq!(places.next(), None, "{what} twice");
        place
    }
}

#[test]
fn each_layer_is_told_before_the_next_begins() {
    for tp in [1, 2] {
        let mut heard = Heard::default();
        let prompt = tokens(1, 20);
        let mut model = model(&options(tp));
        let layers = model.config().layers;
        model.forward(&[chunk(&prompt, 0, &[4, 5])], &mut heard).unwrap();
        for layer in 0..layers {
            let written = heard.at(&format!("written {layer} 0..1"));
            let computed = heard.at(&format!("computed {layer} 0..1"));
            assert!(written < computed);
            if layer > 0 {
                assert!(heard.at(&format!("computed {} 0..1", layer - 1)) < written);
            }
        }
    }
}

#[test]
fn overlap_computes_one_micro_batch_while_the_other_is_exchanged() {
    for tp in [1, 2] {
        let mut heard = Heard::default();
        let prompts = [tokens(1, 20), tokens(2, 20)];
        let mut model = model(&LoadOptions {
            tbo: true,
            ..options(tp)
        });
        let batch = [
            chunk(&prompts[0], 0, &[4, 5]),
            chunk(&prompts[1], 0, &[6, 7]),
        ];
        let layers = model.config().layers;
        model.forward(&batch, &mut heard).unwrap();
        for layer in 0..layers {
            for part in [Part::Attention, Part::FeedForward] {
                let at = |what: &str, micro: &str| heard.at(&format!("{what} {layer} {part:?} {micro}"));
                // The second's computation ends with the start of its exchange, inside of the first's exchange.
                let (started, ended) = (at("started", "0..1"), at("ended", "0..1"));
                assert!(started < at("started", "1..2") && at("started", "1..2") < ended);
                assert!(ended < at("ended", "1..2"));
            }
        }
    }
}

#[test]
fn impossible_batches_are_refused() {
    let mut model = model(&options(2));
    let context = model.config().context;
    let long = vec![0; context];
    let many = vec![0; 400];
    let cases: [(&[TokenId], usize, &[BlockId]); 7] = [
        (&[], 0, &[0]),
        (&[1, 2], 15, &[0]),
        (&[1], 0, &[]),
        (&[1], 0, &[64]),
        (&[260], 0, &[0]),
        (&[1], usize::MAX, &[0]),
        (&long, 1, &many),
    ];
    for (tokens, start, blocks) in cases {
        let result = model.forward(&[chunk(tokens, start, blocks)], &mut ());
        assert!(matches!(result, Err(ModelError::Batch(_))), "{start}");
    }
    assert!(matches!(model.forward(&[], &mut ()), Err(ModelError::Batch(_))));
    // It goes on.
    assert_eq!(run(&mut *model, &[chunk(&[1], 0, &[0])]).values.len(), 260);
}

#[test]
fn what_cannot_be_shared_out_is_refused() {
    for tp in [0, 3, 8] {
        assert!(matches!(load(&options(tp)), Err(ModelError::Options(_))), "{tp}");
    }
    for memory in [Memory::Blocks(0), Memory::Bytes(100)] {
        let options = LoadOptions { memory, ..options(1) };
        assert!(matches!(load(&options), Err(ModelError::Options(_))));
    }
}

#[test]
fn digests_tell_what_shapes_keys_and_values() {
    let mut digests = vec![
        model(&options(1)).config().digest,
        model(&LoadOptions { weights: WeightMode::Q8_0, ..options(1) }).config().digest,
        model(&LoadOptions { kv_dtype: KvDtype::Fp8E4m3, ..options(1) }).config().digest,
        model(&LoadOptions { source: Source::of("tiny-three"), ..options(1) }).config().digest,
    ];
    assert_eq!(digests[0], model(&options(4)).config().digest, "ranks are no part of it");
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), 4);
}
