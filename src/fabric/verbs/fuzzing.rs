//! The property of the lane address's decoder, for the fuzz target `verbs_address`.

use super::address::VerbsAddress;
use crate::fabric::LaneAddress;

/// What is accepted encodes to the same bytes, so that there is one address for each queue pair.
pub fn verbs_address(bytes: &[u8]) {
    let Some(lane) = LaneAddress::new(bytes.to_vec()) else {
        return;
    };
    if let Ok(address) = VerbsAddress::decode(&lane) {
        assert_eq!(address.encode(), bytes);
    }
}
