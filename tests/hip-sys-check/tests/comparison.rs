//! Values, places and widths, one by one.

#![cfg(feature = "hip-sys")]

use std::mem::{offset_of, size_of};

use hip_sys::hiprt as theirs;
use kvpush::oracle::gpu::hip as ours;

#[test]
fn constants() {
    use theirs::{hipDeviceAttribute_t as attribute, hipError_t as error, hipMemcpyKind as copy};
    let pairs = [
        (ours::hipSuccess, error::hipSuccess as i32),
        (
            ours::hipErrorInvalidValue,
            error::hipErrorInvalidValue as i32,
        ),
        (ours::hipErrorOutOfMemory, error::hipErrorOutOfMemory as i32),
        (ours::hipErrorNoDevice, error::hipErrorNoDevice as i32),
        (ours::hipErrorNotReady, error::hipErrorNotReady as i32),
        (
            ours::hipErrorNotSupported,
            error::hipErrorNotSupported as i32,
        ),
        (
            ours::hipMemcpyHostToDevice,
            copy::hipMemcpyHostToDevice as i32,
        ),
        (
            ours::hipMemcpyDeviceToHost,
            copy::hipMemcpyDeviceToHost as i32,
        ),
        (
            ours::hipDeviceAttributeHdpMemFlushCntl,
            attribute::hipDeviceAttributeHdpMemFlushCntl as i32,
        ),
        (
            ours::hipStreamNonBlocking as i32,
            theirs::hipStreamNonBlocking as i32,
        ),
        (
            ours::hipEventDisableTiming as i32,
            theirs::hipEventDisableTiming as i32,
        ),
        (
            ours::hipHostRegisterPortable as i32,
            theirs::hipHostRegisterPortable as i32,
        ),
        (
            ours::memory_type::HOST_5,
            theirs::hipMemoryType::hipMemoryTypeHost as i32,
        ),
        (
            ours::memory_type::DEVICE_5,
            theirs::hipMemoryType::hipMemoryTypeDevice as i32,
        ),
    ];
    for (at, (mine, other)) in pairs.into_iter().enumerate() {
        assert_eq!(mine, other, "pair {at}");
    }
}

#[test]
fn the_structure() {
    type Ours = ours::hipPointerAttribute_t;
    type Theirs = theirs::hipPointerAttribute_t;
    assert_eq!(size_of::<Ours>(), size_of::<Theirs>());
    let places = [
        (offset_of!(Ours, memoryType), offset_of!(Theirs, memoryType)),
        (offset_of!(Ours, device), offset_of!(Theirs, device)),
        (
            offset_of!(Ours, devicePointer),
            offset_of!(Theirs, devicePointer),
        ),
        (
            offset_of!(Ours, hostPointer),
            offset_of!(Theirs, hostPointer),
        ),
        (offset_of!(Ours, isManaged), offset_of!(Theirs, isManaged)),
        (
            offset_of!(Ours, allocationFlags),
            offset_of!(Theirs, allocationFlags),
        ),
    ];
    for (mine, other) in places {
        assert_eq!(mine, other);
    }
}

/// Both find no device in the same way, or the same number.
#[test]
fn devices() {
    let mut found = -1;
    // SAFETY: the out pointer is valid.
    let code = unsafe { theirs::hipGetDeviceCount(&mut found) } as i32;
    let hip = ours::Hip::open(None).expect("the library that this test is linked to");
    let mut mine = -1;
    // SAFETY: as above.
    let own = unsafe { (hip.hipGetDeviceCount)(&mut mine) };
    assert_eq!((own, mine), (code, found));
}
