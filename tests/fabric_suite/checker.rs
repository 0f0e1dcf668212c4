//! The comparison that the cases rely on, and proof that it can fail.

/// Fails the test at the first byte that differs.
#[track_caller]
pub(crate) fn same_bytes(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let wrong = found.iter().zip(expected).position(|(f, e)| f != e);
    if let Some(at) = wrong {
        let count = found.iter().zip(expected).filter(|(f, e)| f != e).count();
        panic!(
            "{what}: {count} bytes differ, first at {at}: {:#04x}, expected {:#04x}",
            found[at], expected[at]
        );
    }
}

#[test]
#[should_panic(expected = "1 bytes differ, first at 4095")]
fn a_wrong_byte_is_noticed() {
    let found = vec![7; 4096];
    let mut expected = found.clone();
    expected[4095] ^= 1;
    same_bytes("planted", &found, &expected);
}

#[test]
#[should_panic(expected = "length")]
fn a_missing_byte_is_noticed() {
    same_bytes("planted", &[1, 2], &[1, 2, 3]);
}

/// A wrong expectation about a real transfer is noticed, too: the whole path from device to checker can fail.
#[test]
#[should_panic(expected = "bytes differ")]
fn a_wrong_transfer_is_noticed() {
    let _shared = crate::harness::descriptors_may_change();
    crate::transfers::write_and_compare(crate::factories::tcp_pair(), 1);
}
