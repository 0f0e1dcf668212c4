//! Whole pushes between pools in GPU memory over TCP: from one sub-allocation to another, at odd offsets.

use std::{sync::Arc, time::Duration};

use kvpush::{
    Auth, Endpoint, Grant,
    fabric::FabricKind,
    kv::{Dtype, HeadRange, presets::KvShape, region_lengths},
    memory::{Memory, gpu::GpuMemory},
};

use crate::double::on_each;

const SOON: Duration = Duration::from_secs(30);
/// Where the region begins in its allocation: on no page of any size.
const AT: u64 = 12_345 * 8;

on_each! {
    fn a_push_between_gpus_lands_where_it_should_and_nowhere_else(_double, driver, _names) {
        let shape = KvShape {
            layers: 1,
            tokens_per_page: 16,
            heads: HeadRange::new(0, 4),
            head_dim: 64,
            dtype: Dtype::Bf16,
        };
        let layout = shape.vllm_flash(8).unwrap();
        let length = region_lengths(&layout).unwrap()[0];
        let allocate = |device: u32, byte: u8| {
            let whole = GpuMemory::allocate(driver, device, AT + length + 1000).unwrap();
            whole.write(0, &vec![byte; whole.length() as usize]).unwrap();
            // SAFETY: a part of `whole`, which lives longer than the endpoints.
            let part = unsafe { GpuMemory::from_raw(driver, device, whole.address() + AT, length) };
            (whole, Arc::new(part.unwrap()))
        };
        let (_source, from) = allocate(0, 0x11);
        let (destination, to) = allocate(1, 0x22);
        let start = |name: &str| {
            Endpoint::builder()
                .name(name)
                .auth(Auth::psk([7; 32]))
                .fabrics([FabricKind::Tcp])
                .bind("127.0.0.1:0")
                .unwrap()
        };
        let (decode, prefill) = (start("decode"), start("prefill"));
        let shared = |memory: Arc<GpuMemory<D>>| vec![memory as Arc<dyn Memory>];
        let pool = decode.register_pool(layout.clone(), shared(to)).unwrap();
        let arrival = pool.grant("request", &[5, 2], SOON).unwrap();
        let ticket = arrival.grant().encode();
        let source = prefill.register_pool(layout.clone(), shared(from)).unwrap();
        let push = prefill
            .push_blocking(&source, Grant::decode(&ticket).unwrap(), SOON)
            .unwrap();
        push.layer(0, &[0, 1]).unwrap();
        push.finish_blocking("end", SOON).expect("ends in time").unwrap();
        arrival.complete_blocking(SOON).expect("ends in time").unwrap();

        let mut bytes = vec![0; destination.length() as usize];
        destination.read(0, &mut bytes).unwrap();
        let planes = &layout.layers[0].planes;
        let mut expected = vec![0x22; bytes.len()];
        let page_bytes = 16 * 4 * 64 * 2;
        for plane in planes {
            for page in [5, 2] {
                let first = (AT + plane.offset + page * plane.page_stride) as usize;
                expected[first..first + page_bytes].fill(0x11);
            }
        }
        assert!(bytes == expected, "bytes of the push are elsewhere");
    }
}
