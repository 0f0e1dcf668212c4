//! The comparison tells a difference: planted ones of every kind are found, each alone.

use kvpush_oracle::{Report, compare, layout, shape};

mod ours {
    #[repr(C)]
    pub struct Pair {
        pub first: u32,
        pub second: u64,
    }
    #[repr(C)]
    pub struct Wide {
        pub first: u64,
        pub second: u64,
    }
    #[repr(C)]
    pub struct Swapped {
        pub second: u64,
        pub first: u32,
    }
}

#[test]
fn equal_values_agree_and_others_do_not() {
    assert_eq!(compare("x", 1, 1), Ok(()));
    assert_eq!(compare("x", 1, 2), Err("x: ours 1, theirs 2".to_owned()));
}

#[test]
fn a_layout_agrees_with_itself() {
    let mut report = Report::default();
    layout!(report, ours::Pair = ours::Pair, { first, second });
    assert_eq!(report.differences(), [""; 0]);
    report.finish();
}

#[test]
fn a_wider_field_at_the_same_offset_is_found() {
    let mut report = Report::default();
    layout!(report, ours::Pair = ours::Wide, { first, second });
    assert_eq!(
        report.differences(),
        ["size of ours::Wide.first: ours 4, theirs 8"]
    );
}

#[test]
fn swapped_fields_are_found() {
    let mut report = Report::default();
    layout!(report, ours::Pair = ours::Swapped, { first, second });
    assert_eq!(
        report.differences(),
        [
            "offset of ours::Swapped.first: ours 0, theirs 8",
            "offset of ours::Swapped.second: ours 8, theirs 0"
        ]
    );
}

#[test]
fn a_missing_argument_is_found() {
    let one = shape::text::<unsafe extern "C" fn(*mut u8) -> i32>();
    let two = shape::text::<unsafe extern "C" fn(*mut u8, u8) -> i32>();
    assert_eq!(
        compare("f", one, two),
        Err("f: ours (8) -> 4, theirs (8, 1) -> 4".to_owned())
    );
}

#[test]
fn an_empty_report_does_not_pass() {
    assert!(std::panic::catch_unwind(|| Report::default().finish()).is_err());
}
