//! Bounded little-endian cursor and writer, shared by every encoding of the wire.
//!
//! The reader checks each length against the field's limit *before* it looks at the bytes, so that nothing is
//! allocated for a length a peer merely claims. The writer applies the same limits, so an encoder cannot produce what
//! a decoder refuses.

use crate::wire::LaneAddress;

/// An encoding that does not follow the rules, with the field it was found in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{item}: {field}: {kind}")]
pub struct WireError {
    /// The message or structure.
    pub item: &'static str,
    /// The field of it.
    pub field: &'static str,
    /// What is wrong with it.
    pub kind: WireErrorKind,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireErrorKind {
    /// The bytes end inside the field.
    #[error("{needed} bytes needed, {left} left")]
    Truncated {
        /// Bytes of the field.
        needed: usize,
        /// Bytes left.
        left: usize,
    },
    /// A length or count exceeds the field's limit.
    #[error("{value} exceeds the limit of {limit}")]
    Limit {
        /// The value found.
        value: u64,
        /// The greatest allowed.
        limit: u64,
    },
    /// A length or count is below what the field needs.
    #[error("{value} is below the minimum of {minimum}")]
    TooSmall {
        /// The value found.
        value: u64,
        /// The least allowed.
        minimum: u64,
    },
    /// A number that stands for nothing.
    #[error("unknown value {0}")]
    Unknown(u64),
    /// Text that is not UTF-8.
    #[error("not UTF-8")]
    NotUtf8,
    /// Text that is not `host:port`.
    #[error("not of the form host:port")]
    NotAnAddress,
    /// A second way of writing a value that has one canonical form.
    #[error("not in canonical form")]
    NotCanonical,
    /// Bytes left over after the last field.
    #[error("{0} bytes too many")]
    Trailing(usize),
}

/// Reads fields from untrusted bytes.
pub(crate) struct Reader<'a> {
    item: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(item: &'static str, bytes: &'a [u8]) -> Self {
        Self { item, rest: bytes }
    }

    /// Names what is read from here on, for errors.
    pub(crate) fn rename(&mut self, item: &'static str) {
        self.item = item;
    }

    pub(crate) fn error(&self, field: &'static str, kind: WireErrorKind) -> WireError {
        WireError {
            item: self.item,
            field,
            kind,
        }
    }

    pub(crate) fn take(
        &mut self,
        field: &'static str,
        length: usize,
    ) -> Result<&'a [u8], WireError> {
        let Some((taken, rest)) = self.rest.split_at_checked(length) else {
            let left = self.rest.len();
            let needed = length;
            return Err(self.error(field, WireErrorKind::Truncated { needed, left }));
        };
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], WireError> {
        let Some((taken, rest)) = self.rest.split_first_chunk::<N>() else {
            let left = self.rest.len();
            return Err(self.error(field, WireErrorKind::Truncated { needed: N, left }));
        };
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// One byte, 0 or 1.
    pub(crate) fn bool(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.error(field, WireErrorKind::Unknown(other.into()))),
        }
    }

    /// LEB128, refused unless it is the shortest form.
    pub(crate) fn varint(&mut self, field: &'static str) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(field)?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    break;
                }
                return Ok(value);
            }
        }
        Err(self.error(field, WireErrorKind::NotCanonical))
    }

    /// A count of elements, in two bytes.
    pub(crate) fn count(&mut self, field: &'static str, limit: usize) -> Result<usize, WireError> {
        let value = usize::from(self.u16(field)?);
        self.within(field, value, limit)
    }

    pub(crate) fn within(
        &self,
        field: &'static str,
        value: usize,
        limit: usize,
    ) -> Result<usize, WireError> {
        check_limit(self.item, field, value, limit).map(|()| value)
    }

    /// A list of at most `limit` elements.
    pub(crate) fn list<T>(
        &mut self,
        field: &'static str,
        limit: usize,
        mut element: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.count(field, limit)?;
        // Every element takes at least one byte, so a lying count cannot reserve more than the input's own size.
        let mut list = Vec::with_capacity(count.min(self.rest.len()));
        for _ in 0..count {
            list.push(element(self)?);
        }
        Ok(list)
    }

    /// Bytes with their length in two bytes.
    pub(crate) fn bytes(
        &mut self,
        field: &'static str,
        limit: usize,
    ) -> Result<&'a [u8], WireError> {
        let length = self.count(field, limit)?;
        self.take(field, length)
    }

    pub(crate) fn string(
        &mut self,
        field: &'static str,
        limit: usize,
    ) -> Result<String, WireError> {
        let bytes = self.bytes(field, limit)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.error(field, WireErrorKind::NotUtf8)),
        }
    }

    /// A value of an enumeration.
    pub(crate) fn known<W: Copy + Into<u64>, T>(
        &self,
        field: &'static str,
        value: W,
        from_wire: impl FnOnce(W) -> Option<T>,
    ) -> Result<T, WireError> {
        from_wire(value).ok_or_else(|| self.error(field, WireErrorKind::Unknown(value.into())))
    }

    pub(crate) fn lane_address(&mut self, field: &'static str) -> Result<LaneAddress, WireError> {
        let bytes = self.bytes(field, LaneAddress::MAX)?;
        let length = bytes.len();
        LaneAddress::new(bytes.to_vec()).ok_or_else(|| {
            self.error(
                field,
                WireErrorKind::Limit {
                    value: length as u64,
                    limit: LaneAddress::MAX as u64,
                },
            )
        })
    }

    /// Ends the item: nothing may be left.
    pub(crate) fn finish(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(self.error("end", WireErrorKind::Trailing(left))),
        }
    }
}

/// Appends fields. Limits are the reader's.
pub(crate) struct Writer {
    item: &'static str,
    out: Vec<u8>,
}

impl Writer {
    pub(crate) fn new(item: &'static str) -> Self {
        Self {
            item,
            out: Vec::new(),
        }
    }

    pub(crate) fn error(&self, field: &'static str, kind: WireErrorKind) -> WireError {
        WireError {
            item: self.item,
            field,
            kind,
        }
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.u8(u8::from(value));
    }

    pub(crate) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.u8((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.u8(value as u8);
    }

    pub(crate) fn count(
        &mut self,
        field: &'static str,
        value: usize,
        limit: usize,
    ) -> Result<(), WireError> {
        // A limit beyond two bytes would be a mistake in this crate; it still must not wrap on the wire.
        check_limit(self.item, field, value, limit.min(usize::from(u16::MAX)))?;
        self.u16(value as u16);
        Ok(())
    }

    pub(crate) fn list<T>(
        &mut self,
        field: &'static str,
        limit: usize,
        list: &[T],
        mut element: impl FnMut(&mut Self, &T) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        self.count(field, list.len(), limit)?;
        list.iter().try_for_each(|item| element(self, item))
    }

    pub(crate) fn bytes(
        &mut self,
        field: &'static str,
        limit: usize,
        bytes: &[u8],
    ) -> Result<(), WireError> {
        self.count(field, bytes.len(), limit)?;
        self.raw(bytes);
        Ok(())
    }

    /// Text for people: cut to `limit` bytes at a character rather than refused, because an explanation must never
    /// be the reason that a failure is not reported.
    pub(crate) fn detail(
        &mut self,
        field: &'static str,
        limit: usize,
        text: &str,
    ) -> Result<(), WireError> {
        // `str::floor_char_boundary` is newer than the oldest compiler this crate supports.
        let kept = (0..=limit)
            .rev()
            .find_map(|cut| text.get(..cut.min(text.len())))
            .unwrap_or_default();
        self.bytes(field, limit, kept.as_bytes())
    }

    pub(crate) fn lane_address(
        &mut self,
        field: &'static str,
        address: &LaneAddress,
    ) -> Result<(), WireError> {
        self.bytes(field, LaneAddress::MAX, address.as_bytes())
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.out
    }
}

fn check_limit(
    item: &'static str,
    field: &'static str,
    value: usize,
    limit: usize,
) -> Result<(), WireError> {
    if value <= limit {
        return Ok(());
    }
    Err(WireError {
        item,
        field,
        kind: WireErrorKind::Limit {
            value: value as u64,
            limit: limit as u64,
        },
    })
}

/// The rules of an endpoint's control address: `host:port`, at most [`Address::MAX`] bytes. `host` is a name, an IPv4
/// address or an IPv6 address in brackets.
pub(crate) struct Address;

impl Address {
    /// Most bytes.
    pub(crate) const MAX: usize = 255;
    /// Most addresses of one endpoint.
    pub(crate) const MAX_COUNT: usize = 4;

    pub(crate) fn is_valid(text: &str) -> bool {
        let Some((host, port)) = text.rsplit_once(':') else {
            return false;
        };
        let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
        let plain = !host.is_empty() && !host.contains([':', '[', ']']);
        (bracketed || plain)
            && !text.contains(|c: char| c.is_whitespace() || c.is_control())
            && !port.is_empty()
            && port.bytes().all(|b| b.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port != 0)
    }

    pub(crate) fn write_list(writer: &mut Writer, list: &[String]) -> Result<(), WireError> {
        let field = "addresses";
        if list.is_empty() {
            let kind = WireErrorKind::TooSmall {
                value: 0,
                minimum: 1,
            };
            return Err(writer.error(field, kind));
        }
        writer.list(field, Self::MAX_COUNT, list, |w, text| {
            if !Self::is_valid(text) {
                return Err(w.error(field, WireErrorKind::NotAnAddress));
            }
            w.bytes(field, Self::MAX, text.as_bytes())
        })
    }

    pub(crate) fn read_list(reader: &mut Reader<'_>) -> Result<Vec<String>, WireError> {
        let field = "addresses";
        let list = reader.list(field, Self::MAX_COUNT, |r| {
            let text = r.string(field, Self::MAX)?;
            match Self::is_valid(&text) {
                true => Ok(text),
                false => Err(r.error(field, WireErrorKind::NotAnAddress)),
            }
        })?;
        if list.is_empty() {
            let kind = WireErrorKind::TooSmall {
                value: 0,
                minimum: 1,
            };
            return Err(reader.error(field, kind));
        }
        Ok(list)
    }
}
