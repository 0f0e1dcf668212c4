//! Each parameter on values worked out by hand, and all of them against a slow second implementation.

use super::{random::*, *};

fn params() -> SamplingParams {
    SamplingParams::default()
}

fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(params, &[3], 1)
}

fn history(prompt: &[TokenId], generated: &[TokenId]) -> History {
    let mut history = History::new(prompt);
    generated.iter().for_each(|&token| history.push(token));
    history
}

/// Probabilities by tokens, without those that cannot be chosen.
fn kept(row: &[f32], params: &SamplingParams, history: &History) -> Vec<(TokenId, f64)> {
    let sampler = sampler(params.clone());
    let mut logits = adjust::finite(row);
    sampler.adjust(&mut logits, history);
    let kept = candidates::Kept::new(&logits, params).expect("a candidate");
    let total: f64 = kept.weights.iter().map(|(_, weight)| weight).sum();
    kept.weights
        .iter()
        .map(|&(token, weight)| (token, weight / total))
        .collect()
}

/// The same, by sorting everything and in another order of operations.
fn slow(row: &[f32], params: &SamplingParams, history: &History) -> Vec<(TokenId, f64)> {
    let mut logits: Vec<(TokenId, f64)> = (0..).zip(row.iter().map(|&l| f64::from(l))).collect();
    for (token, logit) in &mut logits {
        for (biased, bias) in &params.logit_bias {
            *logit += if biased == token {
                f64::from(*bias)
            } else {
                0.0
            };
        }
        let count = history.generated.get(token).copied().unwrap_or(0);
        let penalty = f64::from(params.repetition_penalty);
        if count > 0 || history.prompt.contains(token) {
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
        *logit -= f64::from(params.frequency_penalty) * f64::from(count);
        *logit -= f64::from(params.presence_penalty) * f64::from(count.min(1));
        *logit /= f64::from(params.temperature);
        if history.count < params.min_tokens && *token == 3 {
            *logit = f64::NEG_INFINITY;
        }
    }
    logits.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let softmax = |logits: &mut Vec<(TokenId, f64)>| {
        let sum: f64 = logits.iter().map(|(_, l)| l.exp()).sum();
        logits
            .iter()
            .map(|&(t, l)| (t, l.exp() / sum))
            .collect::<Vec<_>>()
    };
    let probabilities = softmax(&mut logits);
    let least = probabilities[0].1 * f64::from(params.min_p);
    logits.truncate(
        probabilities
            .iter()
            .take_while(|(_, p)| *p >= least)
            .count(),
    );
    if params.top_k > 0 {
        logits.truncate(params.top_k);
    }
    let mut sum = 0.0;
    let enough = softmax(&mut logits).iter().position(|(_, p)| {
        sum += p;
        sum >= f64::from(params.top_p)
    });
    if params.top_p < 1.0 {
        logits.truncate(enough.map_or(logits.len(), |position| position + 1));
    }
    let mut probabilities = softmax(&mut logits);
    probabilities.retain(|(_, p)| *p > 0.0);
    probabilities.sort_by_key(|(token, _)| *token);
    probabilities
}

#[test]
fn all_together_are_what_a_slow_implementation_gives() {
    for seed in 0..300 {
        let mut draws = 0;
        let mut draw = || {
            draws += 1;
            uniform(seed, 7, draws)
        };
        let vocab = 5 + (draw() * 700.0) as usize;
        let row: Vec<f32> = (0..vocab).map(|_| (draw() * 16.0 - 8.0) as f32).collect();
        let token = |at: f64| (at * vocab as f64) as TokenId;
        let params = SamplingParams {
            temperature: [0.3, 1.0, 1.7][(draw() * 3.0) as usize],
            top_k: [0, 1, 3, 40, 2000][(draw() * 5.0) as usize],
            top_p: [1.0, 0.95, 0.5, 0.999][(draw() * 4.0) as usize],
            min_p: [0.0, 0.0, 0.1, 0.02][(draw() * 4.0) as usize],
            presence_penalty: [0.0, 0.7][(draw() * 2.0) as usize],
            frequency_penalty: [0.0, 0.4, -0.4][(draw() * 3.0) as usize],
            repetition_penalty: [1.0, 1.3][(draw() * 2.0) as usize],
            min_tokens: [0, 5][(draw() * 2.0) as usize],
            logit_bias: vec![(token(draw()), 5.0), (token(draw()), -100.0)],
            ..params()
        };
        let prompt: Vec<_> = (0..6).map(|_| token(draw())).collect();
        let generated: Vec<_> = (0..4).map(|_| token(draw().powi(3))).collect();
        let history = history(&prompt, &generated);
        let (fast, slow) = (kept(&row, &params, &history), slow(&row, &params, &history));
        let tokens = |kept: &[(TokenId, f64)]| kept.iter().map(|k| k.0).collect::<Vec<_>>();
        assert_eq!(tokens(&fast), tokens(&slow), "seed {seed}, {params:?}");
        for (fast, slow) in fast.iter().zip(&slow) {
            assert!(
                (fast.1 - slow.1).abs() < 1e-4,
                "seed {seed}: {fast:?} {slow:?}"
            );
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_equals_and_bears_what_is_not_a_number() {
    let greedy = sampler(SamplingParams {
        temperature: 0.0,
        ..params()
    });
    let choose = |row: &[f32]| greedy.choose(row, 0, &History::default()).map(|c| c.id);
    assert_eq!(choose(&[1.0, 2.0, 2.0, 0.0]), Ok(1));
    assert_eq!(choose(&[f32::NAN, -5.0, f32::NEG_INFINITY, -5.0]), Ok(1));
    assert_eq!(choose(&[0.0, f32::INFINITY, f32::INFINITY]), Ok(1));
    assert_eq!(choose(&[f32::NAN; 4]), Err(NoCandidate));
    assert_eq!(choose(&[]), Err(NoCandidate));
    let warm = sampler(params());
    assert_eq!(
        warm.choose(&[f32::NAN; 4], 0, &History::default()),
        Err(NoCandidate)
    );
    let sure = warm.choose(&[0.0, f32::INFINITY], 0, &History::default());
    assert_eq!(sure.map(|c| c.id), Ok(1));
}

#[test]
fn penalties_on_known_values() {
    let params = SamplingParams {
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        repetition_penalty: 2.0,
        logit_bias: vec![(0, 1.0), (99, 1.0)],
        ..params()
    };
    let mut logits = vec![1.0, -1.0, 4.0, 0.5];
    // Token 1 is of the prompt, token 2 of both and generated twice.
    let sampler = Sampler::new(params, &[], 0);
    sampler.adjust(&mut logits, &history(&[1, 2], &[2, 2]));
    assert_eq!(logits, [2.0, -2.0, 4.0 / 2.0 - 0.5 - 0.5, 0.5]);
}

#[test]
fn truncations_on_known_values() {
    // Probabilities 0.5, 0.25, 0.125, 0.125.
    let row: Vec<f32> = [0.5_f32, 0.25, 0.125, 0.125].map(f32::ln).to_vec();
    let tokens = |params: SamplingParams| {
        let kept = kept(&row, &params, &History::default());
        kept.iter().map(|k| k.0).collect::<Vec<_>>()
    };
    assert_eq!(tokens(params()), [0, 1, 2, 3]);
    assert_eq!(
        tokens(SamplingParams {
            top_k: 3,
            ..params()
        }),
        [0, 1, 2]
    );
    assert_eq!(
        tokens(SamplingParams {
            top_p: 0.7,
            ..params()
        }),
        [0, 1]
    );
    assert_eq!(
        tokens(SamplingParams {
            top_p: 0.76,
            ..params()
        }),
        [0, 1, 2]
    );
    assert_eq!(
        tokens(SamplingParams {
            min_p: 0.4,
            ..params()
        }),
        [0, 1]
    );
    // Of two, the first has two thirds.
    let both = SamplingParams {
        top_k: 2,
        top_p: 0.6,
        ..params()
    };
    assert_eq!(tokens(both), [0]);
}

#[test]
fn the_likeliest_are_found_among_many() {
    // All alike: half of them are kept, the lowest ones.
    let row = vec![0.0; 5000];
    let kept = kept(
        &row,
        &SamplingParams {
            top_p: 0.5,
            ..params()
        },
        &History::default(),
    );
    assert!((2500..=2501).contains(&kept.len()), "{}", kept.len());
    assert_eq!(kept.last().map(|k| k.0 as usize), Some(kept.len() - 1));
}

#[test]
fn log_probabilities_are_of_the_logits_as_they_were() {
    let row: Vec<f32> = [0.5_f32, 0.25, 0.125, 0.125].map(f32::ln).to_vec();
    let sampler = sampler(SamplingParams {
        temperature: 0.0,
        logprobs: Some(3),
        logit_bias: vec![(2, 100.0)],
        ..params()
    });
    let choice = sampler
        .choose(&row, 0, &History::default())
        .expect("a token");
    assert_eq!(choice.id, 2);
    assert!((choice.logprob.expect("asked for") - 0.125_f32.ln()).abs() < 1e-6);
    let tokens: Vec<_> = choice.top.iter().map(|t| t.0).collect();
    assert_eq!(tokens, [0, 1, 2]);
    assert!((choice.top[1].1 - 0.25_f32.ln()).abs() < 1e-6);
}

#[test]
fn no_end_before_min_tokens() {
    let sampler = sampler(SamplingParams {
        temperature: 0.0,
        min_tokens: 2,
        stop_token_ids: vec![0],
        ..params()
    });
    let row = [9.0, 1.0, 2.0, 8.0];
    let mut history = History::default();
    for expected in [2, 2, 0] {
        let id = sampler.choose(&row, 0, &history).expect("a token").id;
        assert_eq!(id, expected);
        history.push(id);
        assert_eq!(sampler.is_stop(id, &history), expected == 0);
    }
    assert!(sampler.is_stop(3, &history));
    let ignoring = Sampler::new(
        SamplingParams {
            ignore_eos: true,
            ..params()
        },
        &[3],
        0,
    );
    assert!(!ignoring.is_stop(3, &history));
}

#[test]
fn choices_are_reproducible_and_follow_the_probabilities() {
    let row: Vec<f32> = [0.5_f32, 0.25, 0.125, 0.125].map(f32::ln).to_vec();
    let seeded = sampler(SamplingParams {
        seed: Some(42),
        ignore_eos: true,
        ..params()
    });
    let run = |index| {
        let mut history = History::default();
        (0..4000)
            .map(|_| {
                let id = seeded.choose(&row, index, &history).expect("a token").id;
                history.push(id);
                id
            })
            .collect::<Vec<_>>()
    };
    let first = run(0);
    assert_eq!(first, run(0));
    assert_ne!(first, run(1));
    for (token, expected) in [(0, 2000.0), (1, 1000.0), (2, 500.0), (3, 500.0_f64)] {
        let count = first.iter().filter(|&&t| t == token).count() as f64;
        // Five standard deviations.
        assert!(
            (count - expected).abs() < 5.0 * expected.sqrt(),
            "{token}: {count}"
        );
    }
}

#[test]
fn scrambling_is_splitmix64() {
    // The first outputs for the seed 1234567, as the authors' C code gives them.
    let step = 0x9e37_79b9_7f4a_7c15_u64;
    let outputs = [0, 1, 2].map(|n| scramble(1_234_567_u64.wrapping_add(step.wrapping_mul(n))));
    assert_eq!(
        outputs,
        [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423
        ]
    );
    assert_ne!(fresh_seed(), fresh_seed());
}
