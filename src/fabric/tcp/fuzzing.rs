//! The property of the fabric's decoders, for the fuzz target `tcp_frames`.

use zerocopy::{FromBytes, IntoBytes};

use super::{
    super::LaneAddress,
    wire::{FLAG_ACK, Header, Hello, Op, TRAIN_BYTES, decode_address, encode_address},
};

/// A beginning, then headers: what is taken for sound is within its bounds, and what is decoded encodes to the same
/// bytes.
pub fn tcp_frames(bytes: &[u8]) {
    if let Some(address) = LaneAddress::new(bytes.to_vec())
        && let Ok((port, token)) = decode_address(&address)
    {
        assert_eq!(encode_address(port, &token), Some(address));
    }
    if let Some(first) = bytes.get(..Hello::BYTES)
        && let Some(hello) = Hello::decode(first)
    {
        let again = Hello::new(hello.to, hello.from, hello.credit.get());
        assert_eq!(again.as_bytes(), first);
    }
    for bytes in bytes.chunks_exact(Header::BYTES) {
        let Ok(header) = Header::read_from_bytes(bytes) else {
            continue;
        };
        assert_eq!(header.as_bytes(), bytes);
        let Some(op) = header.op() else { continue };
        let (length, remaining) = (header.length.get(), header.remaining.get());
        assert_eq!(header.flags & !FLAG_ACK, 0);
        match op {
            Op::Write | Op::WriteImm | Op::ReadResponse => {
                assert!(length <= TRAIN_BYTES && length <= remaining);
                assert!(header.is_last() || length > 0, "a message that never ends");
            }
            Op::Read => assert_eq!(length, 0),
            Op::Ack | Op::Nak => assert_eq!((length, remaining), (0, 0)),
        }
    }
}
