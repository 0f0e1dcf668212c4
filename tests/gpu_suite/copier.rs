//! Copiers: batches and their tickets, and that a failure leaves nothing in flight and nothing behind.

use kvpush::memory::{
    Copy, DeviceMemory, Direction, Memory, MemoryError, Ticket,
    gpu::{GpuError, GpuMemory},
};

use crate::double::{current, on_each};

const NOT_READY: i32 = 600;

fn copies(memory: &dyn Memory, host: &[u8], pieces: u64) -> Vec<Copy> {
    let length = host.len() as u64 / pieces;
    (0..pieces)
        .map(|piece| Copy {
            device: memory.address() + (pieces - 1 - piece) * length,
            host: host.as_ptr() as u64 + piece * length,
            length,
        })
        .collect()
}

on_each! {
    fn batches_are_copied_and_told(double, driver, names) {
        let memory = GpuMemory::allocate(driver, 1, 4096).unwrap();
        let mut copier = memory.copier().unwrap();
        let mut host: Vec<u8> = (0..4096).map(|byte| (byte / 1024) as u8).collect();
        // SAFETY: `host` lives longer than the copier, and is not looked at until the ticket is done; so below.
        let ticket = unsafe {
            copier.pin(host.as_ptr() as u64, 4096).unwrap();
            copier.start(Direction::ToDevice, &copies(&memory, &host, 4)).unwrap()
        };
        assert!(copier.is_done(ticket).unwrap());
        let mut on_device = vec![0; 4096];
        memory.read(0, &mut on_device).unwrap();
        assert_eq!([on_device[0], on_device[1024], on_device[4095]], [3, 2, 0]);
        host.fill(9);
        // SAFETY: see above.
        let ticket = unsafe { copier.start(Direction::ToHost, &copies(&memory, &host, 4)) }.unwrap();
        assert!(copier.is_done(ticket).unwrap());
        assert_eq!([host[0], host[1024], host[4095]], [0, 1, 3]);
        assert_eq!(current(double), (0, 0));
        drop(copier);
        assert_eq!(double.calls(names.unpin), 1);
    }

    fn tickets_end_in_order_and_events_are_used_again(double, driver, names) {
        let memory = GpuMemory::allocate(driver, 0, 4096).unwrap();
        let mut copier = memory.copier().unwrap();
        let host = vec![7u8; 4096];
        let batch = copies(&memory, &host, 2);
        double.fail(names.query, NOT_READY);
        for _ in 0..5 {
            // SAFETY: `host` lives longer than the copier; so below.
            let tickets: Vec<Ticket> = (0..3)
                .map(|_| unsafe { copier.start(Direction::ToDevice, &batch) }.unwrap())
                .collect();
            assert!(tickets.is_sorted());
            assert!(tickets.iter().all(|ticket| !copier.is_done(*ticket).unwrap()));
            // The first two end; then the third.
            double.fail_after(names.query, 2, NOT_READY);
            assert!(!copier.is_done(tickets[2]).unwrap());
            assert!(copier.is_done(tickets[1]).unwrap() && copier.is_done(tickets[0]).unwrap());
            double.fail(names.query, 0);
            assert!(copier.is_done(tickets[2]).unwrap());
            double.fail(names.query, NOT_READY);
        }
        assert_eq!(double.calls(names.new_event), 3, "one for each batch in flight, no more");
        assert!(!copier.is_done(Ticket(99)).unwrap(), "a ticket that was never given");
    }

    fn an_event_that_never_comes_is_waited_for_at_the_end(double, driver, names) {
        let memory = GpuMemory::allocate(driver, 0, 4096).unwrap();
        let mut copier = memory.copier().unwrap();
        let host = vec![7u8; 4096];
        double.fail(names.query, NOT_READY);
        // SAFETY: `host` lives longer than the copier.
        let ticket = unsafe { copier.start(Direction::ToDevice, &copies(&memory, &host, 1)) }.unwrap();
        assert!(!copier.is_done(ticket).unwrap());
        drop(copier);
        assert_eq!(double.calls(names.wait), 1, "the ranges are the caller's again");
    }

    fn a_batch_that_fails_half_way_is_not_in_flight(double, driver, names) {
        let memory = GpuMemory::allocate(driver, 0, 4096).unwrap();
        let mut copier = memory.copier().unwrap();
        let host = vec![7u8; 4096];
        for (call, direction) in [
            (names.to_device, Direction::ToDevice),
            (names.to_host, Direction::ToHost),
            (names.record, Direction::ToHost),
        ] {
            let waits = double.calls(names.wait);
            double.fail_after(call, 1, 719);
            if call == names.record {
                double.fail(call, 719);
            }
            // SAFETY: `host` lives longer than the copier.
            let failed = unsafe { copier.start(direction, &copies(&memory, &host, 3)) };
            assert!(matches!(failed, Err(MemoryError::Gpu(error)) if error.code() == Some(719)));
            assert_eq!(double.calls(names.wait), waits + 1, "{call}");
            double.fail(call, 0);
            assert_eq!(current(double), (0, 0));
            // SAFETY: see above.
            let next = unsafe { copier.start(direction, &copies(&memory, &host, 3)) }.unwrap();
            assert!(copier.is_done(next).unwrap(), "the copier goes on");
        }
    }

    fn a_copier_that_cannot_tell_says_so_from_then_on(double, driver, names) {
        let memory = GpuMemory::allocate(driver, 0, 4096).unwrap();
        let host = vec![7u8; 4096];
        let batch = copies(&memory, &host, 2);
        // A batch that fails, and then the wait for what of it is in flight.
        let mut copier = memory.copier().unwrap();
        double.fail(names.to_device, 719);
        double.fail(names.wait, 719);
        // SAFETY: `host` lives longer than the copier; so below.
        unsafe { copier.start(Direction::ToDevice, &batch) }.unwrap_err();
        double.fail(names.to_device, 0);
        double.fail(names.wait, 0);
        // SAFETY: see above.
        let after = unsafe { copier.start(Direction::ToDevice, &batch) };
        assert!(matches!(after, Err(MemoryError::Gpu(error)) if matches!(*error, GpuError::Broken(_))));
        // An event that reports a failure of the device.
        let mut copier = memory.copier().unwrap();
        // SAFETY: see above.
        let ticket = unsafe { copier.start(Direction::ToDevice, &batch) }.unwrap();
        double.fail(names.query, 719);
        assert!(copier.is_done(ticket).is_err());
        double.fail(names.query, 0);
        assert!(copier.is_done(ticket).is_err(), "it never becomes done");
    }

    fn copies_outside_of_the_memory_are_refused(double, driver, names) {
        let pool = GpuMemory::allocate(driver, 0, 8192).unwrap();
        // SAFETY: a part of `pool`.
        let memory = unsafe { GpuMemory::from_raw(driver, 0, pool.address() + 4096, 4096) }.unwrap();
        let mut copier = memory.copier().unwrap();
        let host = vec![7u8; 8192];
        for (device, length) in [
            (memory.address() - 1, 10),
            (memory.address() + 4090, 10),
            (memory.address(), 0),
            (u64::MAX, 2),
        ] {
            let copy = Copy { device, host: host.as_ptr() as u64, length };
            // SAFETY: refused.
            let refused = unsafe { copier.start(Direction::ToDevice, &[copy]) };
            assert!(matches!(refused, Err(MemoryError::Gpu(error)) if matches!(*error, GpuError::BadRange { .. })));
        }
        assert_eq!(double.calls(names.to_device), 0);
    }

    fn what_cannot_be_made_is_an_error(double, driver, names) {
        let memory = GpuMemory::allocate(driver, 1, 4096).unwrap();
        double.fail(names.new_stream, 2);
        assert!(memory.copier().is_err());
        double.fail(names.new_stream, 0);
        let mut copier = memory.copier().unwrap();
        let host = vec![7u8; 4096];
        double.fail(names.pin, 1);
        // SAFETY: `host` lives longer than the copier; so below.
        assert!(unsafe { copier.pin(host.as_ptr() as u64, 4096) }.is_err());
        double.fail(names.new_event, 2);
        // SAFETY: see above.
        assert!(unsafe { copier.start(Direction::ToDevice, &copies(&memory, &host, 1)) }.is_err());
        assert_eq!(current(double), (0, 0));
        double.fail(names.new_event, 0);
        // SAFETY: see above.
        assert!(unsafe { copier.start(Direction::ToDevice, &copies(&memory, &host, 1)) }.is_ok());
    }
}
