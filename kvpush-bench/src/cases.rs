//! Which workloads an invocation runs.

use kvpush::kv::models::{self, Model};

use crate::{
    cli::WorkloadArgs,
    error::{Error, Result},
    measure::bytes_text,
    out,
    workload::{Side, Workload},
};

/// The main job: grouped-query attention with equal and unequal ranks, and MLA.
const MAIN_JOB: [(&Model, u32, u32); 3] = [
    (&models::LLAMA_3_1_8B, 1, 1),
    (&models::LLAMA_3_1_8B, 4, 2),
    (&models::DEEPSEEK_R1, 1, 1),
];

/// Makes the list, in the order in which it is run. `limits` says which sides have to share how much memory: a
/// workload whose size was not asked for is made to fit.
pub(crate) fn select(
    args: &WorkloadArgs,
    limits: &[(&[Side], Option<u64>)],
) -> Result<Vec<Workload>> {
    let mut cases = match &args.sweep {
        Some(sweep) => {
            let sizes = |&op| sweep.0.iter().map(move |&bytes| Workload::raw(op, bytes));
            args.op.iter().flat_map(sizes).collect()
        }
        None => models(args)?,
    };
    for case in &mut cases {
        apply(args, case)?;
        case.check()?;
        if args.pages.is_none() && args.requests.is_none() {
            shrink(case, limits)?;
        }
        for (sides, limit) in limits {
            case.check_memory(sides, *limit)?;
        }
    }
    Ok(cases)
}

fn models(args: &WorkloadArgs) -> Result<Vec<Workload>> {
    if args.model.is_empty() && args.tp_prefill.is_empty() && args.tp_decode.is_empty() {
        let case = |&(model, prefill, decode): &(&Model, u32, u32)| {
            Workload::of_model(model, prefill, decode)
        };
        return Ok(MAIN_JOB.iter().map(case).collect());
    }
    let chosen = if args.model.is_empty() {
        vec![&models::LLAMA_3_1_8B]
    } else {
        args.model.clone()
    };
    let ranks = zip(&args.tp_prefill, &args.tp_decode)?;
    let of_model = |model: &'static Model| {
        ranks
            .iter()
            .map(move |&(from, to)| Workload::of_model(model, from, to))
    };
    Ok(chosen.into_iter().flat_map(of_model).collect())
}

/// Pairs up two lists; one that has a single number goes with every number of the other.
fn zip(prefill: &[u32], decode: &[u32]) -> Result<Vec<(u32, u32)>> {
    let or_one = |list: &[u32]| {
        if list.is_empty() {
            vec![1]
        } else {
            list.to_vec()
        }
    };
    let (prefill, decode) = (or_one(prefill), or_one(decode));
    match (prefill.as_slice(), decode.as_slice()) {
        (_, &[to]) => Ok(prefill.iter().map(|&from| (from, to)).collect()),
        (&[from], _) => Ok(decode.iter().map(|&to| (from, to)).collect()),
        _ if prefill.len() == decode.len() => Ok(prefill.into_iter().zip(decode).collect()),
        _ => Err(Error::usage(format!(
            "--tp-prefill has {} numbers and --tp-decode {}: give as many, or one",
            prefill.len(),
            decode.len()
        ))),
    }
}

fn apply(args: &WorkloadArgs, case: &mut Workload) -> Result<()> {
    let set = |value: Option<u32>, target: &mut u32| {
        if let Some(value) = value {
            *target = value;
        }
    };
    set(args.requests, &mut case.requests);
    set(args.pages, &mut case.pages);
    set(args.layers, &mut case.layers);
    set(args.tokens_per_page, &mut case.tokens_per_page);
    if args.sweep.is_none() {
        case.run_length = args.run_length;
    }
    if let Some(element) = args.dtype {
        case.element = element;
    }
    if let Some(layout) = args.layout {
        if case.mla {
            return Err(Error::usage(format!(
                "{} has one latent plane: --layout does not apply",
                case.model
            )));
        }
        case.layout = layout;
    }
    case.lanes = args.lanes;
    case.timeout_seconds = args.timeout;
    Ok(())
}

/// Takes fewer requests, then fewer pages, until three quarters of the memory suffice.
fn shrink(case: &mut Workload, limits: &[(&[Side], Option<u64>)]) -> Result<()> {
    let before = (case.requests, case.pages);
    for (sides, limit) in limits {
        let Some(limit) = limit else { continue };
        while case.check_memory(sides, Some(limit - limit / 4)).is_err()
            && (case.requests, case.pages) != (1, 1)
        {
            if case.requests > 1 {
                case.requests = case.requests.div_ceil(2);
            } else {
                case.pages = case.pages.div_ceil(2);
            }
        }
    }
    if before != (case.requests, case.pages) {
        out::note(format_args!(
            "kvpush-bench: {}: {} request(s) of {} pages instead of {} of {}, because memory is short ({})",
            case.title(),
            case.requests,
            case.pages,
            before.0,
            before.1,
            limits
                .iter()
                .filter_map(|(_, limit)| *limit)
                .min()
                .map_or(String::new(), bytes_text),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, LayoutChoice, Op};
    use clap::Parser;

    fn cases(arguments: &str) -> Result<Vec<Workload>> {
        let arguments = std::iter::once("kvpush-bench").chain(arguments.split_whitespace());
        let cli =
            Cli::try_parse_from(arguments).map_err(|error| Error::usage(error.to_string()))?;
        select(&cli.run.workload, &[])
    }

    #[test]
    fn the_main_job_has_gqa_resharding_and_mla() {
        let main = cases("").unwrap();
        assert!(main.iter().any(|case| case.tp_prefill != case.tp_decode));
        assert!(main.iter().any(|case| case.mla));
    }

    #[test]
    fn ranks_are_paired_up() {
        let ranks = |arguments| -> Vec<_> {
            let list = cases(arguments).unwrap();
            list.iter()
                .map(|case| (case.model.clone(), case.tp_prefill, case.tp_decode))
                .collect()
        };
        let llama = "llama-3.1-8b".to_owned();
        assert_eq!(
            ranks("--tp-prefill 4,2 --tp-decode 2,4"),
            [(llama.clone(), 4, 2), (llama.clone(), 2, 4)]
        );
        assert_eq!(
            ranks("--tp-decode 2,4"),
            [(llama.clone(), 1, 2), (llama, 1, 4)]
        );
        assert_eq!(ranks("--model deepseek-r1,qwen3-32b").len(), 2);
        assert!(cases("--tp-prefill 1,2,4 --tp-decode 2,4").is_err());
        assert!(cases("--tp-prefill 3").is_err());
    }

    #[test]
    fn options_reach_the_workload() {
        let list = cases("--model llama-3.1-70b --layers 3 --pages 5 --requests 7 --tokens-per-page 32 --dtype fp8 --layout sglang --lanes 5 --run-length 9 --timeout 33").unwrap();
        let case = list.first().unwrap();
        assert_eq!(
            (case.layers, case.pages, case.requests, case.tokens_per_page),
            (3, 5, 7, 32)
        );
        assert_eq!(
            (
                case.layout,
                case.lanes,
                case.run_length,
                case.timeout_seconds
            ),
            (LayoutChoice::Sglang, 5, 9, 33)
        );
        assert_eq!(case.page_bytes(), 32 * 2 * 8 * 128);
        let sweep = cases("--sweep 4k..64k --op read,push --pages 8").unwrap();
        let list: Vec<_> = sweep
            .iter()
            .map(|case| (case.op, case.page_bytes(), case.pages))
            .collect();
        assert_eq!(
            list[..3],
            [
                (Op::Read, 4096, 8),
                (Op::Read, 16384, 8),
                (Op::Read, 65536, 8)
            ]
        );
        assert_eq!(list.len(), 6);
        assert!(cases("--sweep 4k --model deepseek-r1").is_err());
        assert!(cases("--model deepseek-r1 --layout sglang").is_err());
    }

    #[test]
    fn sizes_nobody_asked_for_are_made_to_fit() {
        let cli = Cli::try_parse_from(["kvpush-bench"]).unwrap();
        let both = [Side::Prefill, Side::Decode];
        let limit = Some(256 << 20);
        for case in select(&cli.run.workload, &[(&both, limit)]).unwrap() {
            case.check_memory(&both, limit).unwrap();
        }
        let cli = Cli::try_parse_from(["kvpush-bench", "--pages", "1000"]).unwrap();
        assert!(select(&cli.run.workload, &[(&both, limit)]).is_err());
    }
}
