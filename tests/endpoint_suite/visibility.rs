//! A device is told of what a NIC has written before the caller is told of it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use kvpush::{
    Pool,
    endpoint::{ArrivalError, GrantOptions},
    kv::{KvLayout, region_lengths},
    memory::{
        Copier, DeviceMemory, Dmabuf, HostMemory, Memory, MemoryError, MemoryKind, PciAddress,
        Visibility,
    },
};

use crate::{
    fixture::{Cache, Fabric, LONG},
    transfers::{plain, push},
};

/// What the regions of a device share.
#[derive(Debug, Default)]
struct Device {
    flushes: AtomicUsize,
    fails: AtomicBool,
}

/// Memory of a device that this process can access.
#[derive(Debug)]
struct Accessible {
    memory: HostMemory,
    device: Arc<Device>,
}

fn refuse<T>(operation: &'static str) -> Result<T, MemoryError> {
    Err(MemoryError::Os {
        operation,
        length: 0,
        source: std::io::ErrorKind::Unsupported.into(),
        hint: None,
    })
}

// SAFETY: the range is that of the host memory inside.
unsafe impl Memory for Accessible {
    fn address(&self) -> u64 {
        self.memory.address()
    }

    fn length(&self) -> u64 {
        self.memory.length()
    }

    fn kind(&self) -> MemoryKind {
        self.memory.kind()
    }

    fn device(&self) -> Option<&dyn DeviceMemory> {
        Some(self)
    }
}

impl DeviceMemory for Accessible {
    fn is_host_accessible(&self) -> bool {
        true
    }

    fn location(&self) -> Option<PciAddress> {
        "0000:c1:00.0".parse().ok()
    }

    fn export(&self) -> Result<Dmabuf, MemoryError> {
        refuse("export")
    }

    fn peer_memory(&self) -> Result<(), MemoryError> {
        refuse("peer memory")
    }

    fn copier(&self) -> Result<Box<dyn Copier>, MemoryError> {
        refuse("copier")
    }

    fn visibility(&self) -> Visibility {
        Visibility::RuntimeFlush
    }

    fn flush(&self) -> Result<(), MemoryError> {
        self.device.flushes.fetch_add(1, Ordering::SeqCst);
        match self.device.fails.load(Ordering::SeqCst) {
            true => refuse("the device's flush"),
            false => Ok(()),
        }
    }
}

fn pool(endpoint: &kvpush::Endpoint, layout: &KvLayout, device: &Arc<Device>) -> Pool {
    let lengths = region_lengths(layout).unwrap().into_iter();
    let memory = lengths.map(|length| {
        Arc::new(Accessible {
            memory: HostMemory::new(length).unwrap(),
            device: Arc::clone(device),
        }) as Arc<dyn Memory>
    });
    endpoint
        .register_pool(layout.clone(), memory.collect())
        .unwrap()
}

pub(crate) fn a_layer_is_flushed_before_it_is_reported(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(3, 8);
    let source = Cache::filled(&prefill, &layout, 1);
    let device = Arc::new(Device::default());
    let destination = pool(&decode, &layout, &device);
    let pages = [4, 5, 6];
    let arrival = destination.grant("flushed", &pages, LONG).unwrap();
    let writer = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    for layer in 0..3 {
        writer.layer(layer, &pages).unwrap();
        arrival
            .layer_blocking(layer, LONG)
            .expect("no hang")
            .expect("ready");
        // Once, though the device has several regions of the pool.
        assert_eq!(device.flushes.load(Ordering::SeqCst), layer + 1);
    }
    writer
        .finish_blocking("", LONG)
        .expect("no hang")
        .expect("finish");
    arrival
        .complete_blocking(LONG)
        .expect("no hang")
        .expect("complete");
    destination.flush().expect("by hand");
    assert_eq!(device.flushes.load(Ordering::SeqCst), 4);
}

pub(crate) fn whoever_orders_by_himself_is_left_alone(fabric: &Fabric) {
    let layout = plain(3, 8);
    let (prefill, decode) = fabric.pair();
    let quiet = fabric.builder("quiet").flush_arrivals(false);
    let quiet = quiet.bind("127.0.0.1:0").expect("start an endpoint");
    let source = Cache::filled(&prefill, &layout, 2);
    for (endpoint, flush, flushes) in [
        (&decode, Some(false), 0),
        (&quiet, None, 0),
        (&quiet, Some(true), 3),
    ] {
        let device = Arc::new(Device::default());
        let destination = pool(endpoint, &layout, &device);
        let options = GrantOptions {
            flush,
            ..GrantOptions::new("ordered", LONG)
        };
        let arrival = destination.grant_with(&[1, 2], options).unwrap();
        push(&prefill, &source, &arrival, &[3, 4], b"");
        arrival
            .complete_blocking(LONG)
            .expect("no hang")
            .expect("complete");
        assert_eq!(device.flushes.load(Ordering::SeqCst), flushes);
    }
}

pub(crate) fn a_failing_flush_ends_the_arrival(fabric: &Fabric) {
    let (prefill, decode) = fabric.pair();
    let layout = plain(3, 8);
    let source = Cache::filled(&prefill, &layout, 3);
    let device = Arc::new(Device::default());
    let destination = pool(&decode, &layout, &device);
    device.fails.store(true, Ordering::SeqCst);
    let arrival = destination.grant("unseen", &[1, 2], LONG).unwrap();
    let writer = prefill
        .push_blocking(&source.pool, arrival.grant().clone(), LONG)
        .expect("open");
    writer.layer(1, &[1, 2]).unwrap();
    let layer = arrival.layer_blocking(1, LONG).expect("no hang");
    let Err(ArrivalError::Flush(error)) = &layer else {
        panic!("{layer:?}");
    };
    assert!(error.to_string().contains("0000:c1:00.0"), "{error}");
    assert_eq!(arrival.poll_complete().map(|end| end.is_err()), Some(true));
    assert_eq!(arrival.complete_layers(), 0);
    let end = writer.ended_blocking(LONG).expect("the writer is told");
    assert!(end.is_err(), "{end:?}");
    assert_eq!(destination.granted_pages(), 0);
    assert!(destination.flush().is_err());
}
