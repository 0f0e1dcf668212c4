//! Pages that are prepared once and pushed for every layer arrive as those that are not.

use kvpush::{
    endpoint::{GrantOptions, PushError, PushInputError},
    kv::{
        Dtype, HeadRange, KvLayout,
        presets::{Arrangement, HeadOrder, KvShape, Stacking},
        shard::{Pair, pairing, shard_heads},
    },
};

use crate::{
    fixture::{Cache, Fabric, LONG, Random, seed},
    mover,
    transfers::{plain, shape},
};

/// How the layers of a push are handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One list for all of them.
    Prepared,
    /// In two pieces, each one list for all of them.
    Pieces,
    /// The same slice again and again, which the library may notice.
    Same,
    /// Page by page, so that nothing is ever the same.
    Single,
}

const WAYS: [Way; 4] = [Way::Prepared, Way::Pieces, Way::Same, Way::Single];

/// Pushes pages `from` to pages `to` of a poisoned pool, layers in random order, and says what is there then.
fn pushed(
    fabric: &Fabric,
    (source, destination): (&KvLayout, &KvLayout),
    heads: HeadRange,
    (from, to): (&[u32], &[u32]),
    way: Way,
    random: &mut Random,
) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (prefill, decode) = fabric.pair();
    let source = Cache::filled(&prefill, source, 11);
    let destination = Cache::poisoned(&decode, destination);
    let options = GrantOptions::new("prepared", LONG).heads(heads);
    let arrival = destination.pool.grant_with(to, options).expect("a grant");
    let push = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    let layers = source.layout.layers.len();
    let half = from.len() / 2;
    let whole = push.prepare(0, from).unwrap();
    let pieces = [
        push.prepare(0, &from[..half]).unwrap(),
        push.prepare(half, &from[half..]).unwrap(),
    ];
    for layer in random.distinct(layers, layers as u32) {
        let layer = layer as usize;
        match way {
            Way::Prepared => push.layer_prepared(layer, &whole).unwrap(),
            Way::Pieces => {
                for piece in pieces.iter().rev() {
                    push.layer_prepared(layer, piece).unwrap();
                }
            }
            Way::Same => push.layer(layer, from).unwrap(),
            Way::Single => {
                for (position, page) in from.iter().enumerate() {
                    push.layer_from(layer, position, &[*page]).unwrap();
                }
            }
        }
    }
    push.finish_blocking("", LONG)
        .expect("no hang")
        .expect("finish");
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    (source.bytes(), destination.bytes())
}

/// All ways, against the naive mover.
fn all_ways(
    fabric: &Fabric,
    (source, destination): (&KvLayout, &KvLayout),
    heads: HeadRange,
    random: &mut Random,
) {
    let count = 5 + random.below(9) as usize;
    let from = random.distinct(count, source.pages);
    let to = random.distinct(count, destination.pages);
    let pages: Vec<_> = from.iter().copied().zip(to.iter().copied()).collect();
    for way in WAYS {
        let layouts = (source, destination);
        let (sent, there) = pushed(fabric, layouts, heads, (&from, &to), way, random);
        let mut expected: Vec<Vec<u8>> = there
            .iter()
            .map(|region| vec![crate::fixture::POISON; region.len()])
            .collect();
        mover::copy((source, &sent), (destination, &mut expected), &pages, heads);
        println!("{way:?}");
        mover::assert_same(&there, &expected);
    }
}

pub(crate) fn prepared_pages_arrive_as_others(fabric: &Fabric) {
    let mut random = Random(seed());
    let heads = HeadRange::new(0, 4);
    for stacking in [
        Stacking::RegionPerLayer,
        Stacking::LayerMajor,
        Stacking::PageMajor,
    ] {
        let arrangement = random.pick(&[
            Arrangement::Interleaved,
            Arrangement::KeysThenValues,
            Arrangement::Separate,
        ]);
        let order = random.pick(&[HeadOrder::TokenMajor, HeadOrder::HeadMajor]);
        let pool = |pages| {
            let layout = shape(4, heads).layout(pages, arrangement, order, stacking);
            layout.unwrap()
        };
        all_ways(fabric, (&pool(24), &pool(40)), heads, &mut random);
    }
}

/// Layers of two geometries, as of models that mix full and compressed attention: each gets its own plan.
pub(crate) fn layers_of_several_geometries(fabric: &Fabric) {
    let mut random = Random(seed());
    let heads = HeadRange::new(0, 4);
    let mixed = |pages| {
        let mut layout = plain(6, pages);
        // Every other layer has pages twice as far apart, as if something lay between them.
        for plane in layout
            .layers
            .iter_mut()
            .step_by(2)
            .flat_map(|layer| &mut layer.planes)
        {
            plane.offset *= 2;
            plane.page_stride *= 2;
        }
        layout
    };
    all_ways(fabric, (&mixed(20), &mixed(30)), heads, &mut random);
    all_ways(fabric, (&mixed(20), &plain(6, 30)), heads, &mut random);
}

pub(crate) fn prepared_pages_of_a_shard(fabric: &Fabric) {
    let mut random = Random(seed());
    let rank = |degree, rank| -> KvShape {
        KvShape {
            layers: 3,
            tokens_per_page: 4,
            heads: shard_heads(8, degree, rank).unwrap(),
            head_dim: 16,
            dtype: Dtype::Bf16,
        }
    };
    // The second of four prefill ranks into the first of two decode ranks.
    let pairs = pairing(8, 4, 2).unwrap();
    let meet = |pair: &&Pair| (pair.source_rank, pair.destination_rank) == (1, 0);
    let pair = pairs.iter().find(meet).expect("they meet");
    let pool = |shape: KvShape, pages| {
        let layout = shape.layout(
            pages,
            Arrangement::KeysThenValues,
            HeadOrder::TokenMajor,
            Stacking::RegionPerLayer,
        );
        layout.unwrap()
    };
    let (source, destination) = (pool(rank(4, 1), 20), pool(rank(2, 0), 30));
    all_ways(fabric, (&source, &destination), pair.heads, &mut random);
}

pub(crate) fn prepared_pages_are_of_one_push(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(2, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let destination = Cache::poisoned(&decode, &layout);
    let open = |pages: &[u32]| {
        let arrival = destination.pool.grant("x", pages, LONG).unwrap();
        let push = prefill.push_blocking(&source.pool, arrival.grant().clone(), LONG);
        (arrival, push.unwrap())
    };
    let ((_a, first), (_b, second)) = (open(&[0, 1]), open(&[2, 3]));
    let pages = first.prepare(0, &[4, 5]).unwrap();
    assert_eq!((pages.first(), pages.pages()), (0, &[4, 5][..]));
    let input = |result: Result<(), PushError>| match result {
        Err(PushError::Input(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        input(second.layer_prepared(0, &pages)),
        PushInputError::ForeignPages
    );
    first.layer_prepared(0, &pages).unwrap();
    assert!(matches!(
        input(first.layer_prepared(0, &pages)),
        PushInputError::Repeated { layer: 0, .. }
    ));
    assert!(matches!(
        input(first.layer_prepared(2, &pages)),
        PushInputError::Layer { layer: 2, .. }
    ));
    for (from, wrong) in [(0, &[4, 4][..]), (0, &[4, 8]), (1, &[4, 5]), (3, &[])] {
        let refused = first.prepare(from, wrong).map(drop);
        assert!(matches!(refused, Err(PushError::Input(_))), "{wrong:?}");
    }
    first.layer_prepared(1, &pages).unwrap();
    first.finish_blocking("", LONG).unwrap().unwrap();
    assert_eq!(
        input(first.layer_prepared(1, &pages)),
        PushInputError::Finished
    );
}
