//! Memory for tests that neither this process nor a NIC reaches by its addresses: they are made-up numbers, and the
//! bytes lie elsewhere. What is copied is copied as late as it may be: when it is first said to be done.
//!
//! Included by the tests of the crate and by the endpoint suite.

use std::{
    collections::VecDeque,
    io,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use super::{
    Copier, Copy, DeviceMemory, Direction, Dmabuf, HostMemory, Memory, MemoryError, MemoryKind,
    PciAddress, Ticket, Visibility,
};

/// How the devices of some memory behave.
#[derive(Debug, Default)]
pub(crate) struct Device {
    /// How often a batch is asked for before it is done, at most; the number varies.
    pub(crate) delay: AtomicU64,
    /// No batch gets done.
    pub(crate) hold: AtomicBool,
    /// No batch of this direction is started, or done, any more.
    pub(crate) fail_to_host: AtomicBool,
    /// The same for the other direction.
    pub(crate) fail_to_device: AtomicBool,
    /// Batches that have been started and are not done.
    pub(crate) under_way: AtomicU64,
    /// Flushes.
    pub(crate) flushes: AtomicU64,
    draws: AtomicU64,
}

impl Device {
    fn fails(&self, direction: Direction) -> bool {
        match direction {
            Direction::ToHost => self.fail_to_host.load(SeqCst),
            Direction::ToDevice => self.fail_to_device.load(SeqCst),
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Far {
    address: u64,
    bytes: Arc<HostMemory>,
    device: Arc<Device>,
}

impl Far {
    /// Memory of `device` whose bytes are `bytes`.
    pub(crate) fn new(bytes: Arc<HostMemory>, device: Arc<Device>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0x7ead_0000_0000);
        let room = bytes.length().next_multiple_of(1 << 20) + (1 << 20);
        Self {
            // Nothing is there, and nothing is aligned.
            address: NEXT.fetch_add(room, SeqCst) + 64,
            bytes,
            device,
        }
    }
}

fn refuse<T>(operation: &'static str) -> Result<T, MemoryError> {
    Err(MemoryError::Os {
        operation,
        length: 0,
        source: io::ErrorKind::Unsupported.into(),
        hint: None,
    })
}

// SAFETY: nobody can access the range, because there is none; a fabric that tries ends the test.
unsafe impl Memory for Far {
    fn address(&self) -> u64 {
        self.address
    }

    fn length(&self) -> u64 {
        self.bytes.length()
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Borrowed
    }

    fn device(&self) -> Option<&dyn DeviceMemory> {
        Some(self)
    }
}

impl DeviceMemory for Far {
    fn is_host_accessible(&self) -> bool {
        false
    }

    fn location(&self) -> Option<PciAddress> {
        "0000:7e:00.0".parse().ok()
    }

    fn export(&self) -> Result<Dmabuf, MemoryError> {
        refuse("export")
    }

    fn peer_memory(&self) -> Result<(), MemoryError> {
        refuse("peer memory")
    }

    fn copier(&self) -> Result<Box<dyn Copier>, MemoryError> {
        Ok(Box::new(FarCopier {
            address: self.address,
            bytes: Arc::clone(&self.bytes),
            device: Arc::clone(&self.device),
            flying: VecDeque::new(),
            last: Ticket(0),
        }))
    }

    fn visibility(&self) -> Visibility {
        Visibility::ReadBack
    }

    fn flush(&self) -> Result<(), MemoryError> {
        self.device.flushes.fetch_add(1, SeqCst);
        Ok(())
    }
}

#[derive(Debug)]
struct Flying {
    ticket: Ticket,
    direction: Direction,
    copies: Vec<Copy>,
    left: u64,
}

#[derive(Debug)]
struct FarCopier {
    address: u64,
    bytes: Arc<HostMemory>,
    device: Arc<Device>,
    flying: VecDeque<Flying>,
    last: Ticket,
}

impl FarCopier {
    fn carry_out(&self, batch: &Flying) {
        for copy in &batch.copies {
            let offset = copy.device - self.address;
            let host = NonNull::new(std::ptr::with_exposed_provenance_mut(copy.host as usize));
            // SAFETY: by the contract of `Copier::start` the range is mapped until the batch is done.
            let host = unsafe { HostMemory::from_raw(host.expect("an address"), copy.length) };
            let host = host.expect("a range");
            let mut bytes = vec![0; copy.length as usize];
            let done = match batch.direction {
                Direction::ToHost => self
                    .bytes
                    .read(offset, &mut bytes)
                    .and_then(|()| host.write(0, &bytes)),
                Direction::ToDevice => host
                    .read(0, &mut bytes)
                    .and_then(|()| self.bytes.write(offset, &bytes)),
            };
            done.expect("within the memory");
        }
        self.device.under_way.fetch_sub(1, SeqCst);
    }
}

impl Copier for FarCopier {
    unsafe fn pin(&mut self, _: u64, _: u64) -> Result<(), MemoryError> {
        refuse("pin")
    }

    unsafe fn start(
        &mut self,
        direction: Direction,
        copies: &[Copy],
    ) -> Result<Ticket, MemoryError> {
        if self.device.fails(direction) {
            return refuse("start of a copy");
        }
        for copy in copies {
            let offset = copy
                .device
                .checked_sub(self.address)
                .expect("in the memory");
            assert!(copy.length > 0 && offset + copy.length <= self.bytes.length());
        }
        self.last = Ticket(self.last.0 + 1);
        let most = self.device.delay.load(SeqCst);
        let draw = self.device.draws.fetch_add(0x9e37_79b9_7f4a_7c15, SeqCst) >> 33;
        self.device.under_way.fetch_add(1, SeqCst);
        self.flying.push_back(Flying {
            ticket: self.last,
            direction,
            copies: copies.to_vec(),
            left: draw % (most + 1),
        });
        Ok(self.last)
    }

    fn is_done(&mut self, ticket: Ticket) -> Result<bool, MemoryError> {
        while let Some(first) = self
            .flying
            .front_mut()
            .filter(|first| first.ticket <= ticket)
        {
            if self.device.hold.load(SeqCst) {
                return Ok(false);
            }
            if self.device.fails(first.direction) {
                return refuse("a copy");
            }
            if first.left > 0 {
                first.left -= 1;
                return Ok(false);
            }
            if let Some(batch) = self.flying.pop_front() {
                self.carry_out(&batch);
            }
        }
        Ok(true)
    }
}

impl Drop for FarCopier {
    fn drop(&mut self) {
        while let Some(batch) = self.flying.pop_front() {
            match self.device.fails(batch.direction) {
                true => _ = self.device.under_way.fetch_sub(1, SeqCst),
                false => self.carry_out(&batch),
            }
        }
    }
}
