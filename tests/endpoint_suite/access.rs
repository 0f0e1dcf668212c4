//! One-sided reads and writes.

use std::{sync::Arc, time::Duration};

use kvpush::{
    RefuseCode, RegionToken,
    endpoint::AccessError,
    fabric::Access,
    memory::{HostMemory, Memory},
};

use crate::fixture::{Fabric, LONG, Random, seed};

fn memory(length: u64) -> Arc<HostMemory> {
    Arc::new(HostMemory::new(length).unwrap())
}

pub(crate) fn an_exported_region_is_read_and_written(fabric: &Fabric) {
    let (reader, owner) = fabric.pair();
    let mut random = Random(seed());
    let length = 3 << 20;
    let theirs = memory(length);
    let bytes: Vec<u8> = (0..length / 8)
        .flat_map(|_| random.next().to_le_bytes())
        .collect();
    theirs.write(0, &bytes).unwrap();
    let exported = owner
        .register(theirs.clone() as Arc<dyn Memory>, Access::ALL)
        .unwrap();
    let token = RegionToken::decode(&exported.token().encode()).unwrap();

    let ours = memory(length);
    let local = reader
        .register(ours.clone() as Arc<dyn Memory>, Access::LOCAL)
        .unwrap();
    let remote = reader.open_region_blocking(token).unwrap();
    assert_eq!(remote.length(), length);
    let mut model = vec![0; length as usize];
    for _ in 0..20 {
        let count = 1 + random.below(1 << 20);
        let (from, to) = (random.below(length - count), random.below(length - count));
        remote.read_blocking(from, &local, to, count, LONG).unwrap();
        model[to as usize..(to + count) as usize]
            .copy_from_slice(&bytes[from as usize..(from + count) as usize]);
    }
    let mut found = vec![0; length as usize];
    ours.read(0, &mut found).unwrap();
    assert!(found == model, "reads brought other bytes");

    ours.write(0, &vec![9; 1000]).unwrap();
    remote.write_blocking(500, &local, 0, 1000, LONG).unwrap();
    let mut after = vec![0; length as usize];
    theirs.read(0, &mut after).unwrap();
    assert!(after[500..1500].iter().all(|&byte| byte == 9));
    assert!(after[..500] == bytes[..500] && after[1500..] == bytes[1500..]);
}

pub(crate) fn what_is_not_allowed_is_refused(fabric: &Fabric) {
    let (reader, owner) = fabric.pair();
    let exported = owner
        .register(
            memory(4096) as Arc<dyn Memory>,
            Access {
                remote_read: true,
                ..Access::LOCAL
            },
        )
        .unwrap();
    let local = reader
        .register(memory(4096) as Arc<dyn Memory>, Access::LOCAL)
        .unwrap();
    let remote = reader
        .open_region_blocking(exported.token().clone())
        .unwrap();
    let write = remote.write_blocking(0, &local, 0, 10, LONG);
    assert_eq!(write, Err(AccessError::NotAllowed("write")));
    for (offset, length) in [(4090, 7), (u64::MAX, 1), (0, 4097)] {
        let read = remote.read_blocking(offset, &local, 0, length, LONG);
        assert!(
            matches!(read, Err(AccessError::OutOfRange { .. })),
            "{read:?}"
        );
    }
    remote.read_blocking(0, &local, 0, 4096, LONG).unwrap();
    let token = exported.token().clone();
    drop(exported);
    match reader.open_region_blocking(token) {
        Err(AccessError::Refused {
            code: RefuseCode::UnknownGrant,
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
    // The registration is gone with the export, whatever keys a peer still has.
    assert!(
        remote
            .read_blocking(0, &local, 0, 10, Duration::from_secs(20))
            .is_err()
    );
}
