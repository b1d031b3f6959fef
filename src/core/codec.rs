//! Reading and writing our own binary formats: bounded, explicit, without panics.
//!
//! Every stored or replicated value is written with [`Writer`] and read with [`Reader`].
//! Integers are varints (LEB128) unless the field's order or alignment matters; lengths come
//! before bytes. A reader never allocates more than the input it was given, and refuses what is
//! left over, so that a damaged value is an error and not a surprise.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Why bytes could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The input ends inside `what`.
    #[error("{what}: ends too early")]
    Truncated { what: &'static str },
    /// A field has a value that no writer produces.
    #[error("{what}: invalid value {value}")]
    Invalid { what: &'static str, value: u64 },
    /// Written by a newer version, or not ours at all.
    #[error("{what}: unknown format version {version}; upgrade this node")]
    Version { what: &'static str, version: u8 },
    /// The checksum does not match.
    #[error("{what}: checksum mismatch")]
    Checksum { what: &'static str },
    /// A token's seal does not fit.
    #[error("{what}: not sealed with this cluster's key for this use, or changed since")]
    Seal { what: &'static str },
    /// More than the format allows.
    #[error("{what}: {actual} exceeds the limit of {limit}")]
    TooLarge { what: &'static str, actual: u64, limit: u64 },
    /// Bytes after the end.
    #[error("{what}: {bytes} bytes left over")]
    LeftOver { what: &'static str, bytes: usize },
}

/// Appends fields to a growing buffer.
#[derive(Debug, Default)]
pub struct Writer {
    buffer: BytesMut,
}

impl Writer {
    /// An empty writer with room for `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { buffer: BytesMut::with_capacity(capacity) }
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.buffer.put_u8(value);
    }

    /// Eight bytes, little-endian.
    pub fn fixed64(&mut self, value: u64) {
        self.buffer.put_u64_le(value);
    }

    /// Four bytes, little-endian.
    pub fn fixed32(&mut self, value: u32) {
        self.buffer.put_u32_le(value);
    }

    /// One to ten bytes.
    pub fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.buffer.put_u8((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        #[allow(clippy::cast_possible_truncation, reason = "below 0x80")]
        self.buffer.put_u8(value as u8);
    }

    /// A length or count.
    pub fn count(&mut self, value: usize) {
        self.varint(value as u64);
    }

    /// Length, then bytes.
    pub fn bytes(&mut self, value: &[u8]) {
        self.count(value.len());
        self.buffer.put_slice(value);
    }

    /// Bytes without a length.
    pub fn raw(&mut self, value: &[u8]) {
        self.buffer.put_slice(value);
    }

    /// What was written so far.
    pub fn as_slice(&self) -> &[u8] {
        &self.buffer
    }

    /// Ends writing.
    pub fn finish(self) -> Bytes {
        self.buffer.freeze()
    }
}

/// Takes fields from the front of a buffer. Byte fields share the input's memory.
#[derive(Debug)]
pub struct Reader {
    rest: Bytes,
    what: &'static str,
}

impl Reader {
    /// Reads `input`; `what` names it in errors.
    pub fn new(what: &'static str, input: Bytes) -> Self {
        Self { rest: input, what }
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        self.need(1)?;
        Ok(self.rest.get_u8())
    }

    /// Takes one byte if it is `value`, and answers whether it was.
    pub fn skip_if(&mut self, value: u8) -> bool {
        let is_it = self.rest.first() == Some(&value);
        if is_it {
            self.rest.advance(1);
        }
        is_it
    }

    /// A format version; anything but `known` is refused.
    pub fn version(&mut self, known: u8) -> Result<(), DecodeError> {
        let version = self.u8()?;
        if version != known {
            return Err(DecodeError::Version { what: self.what, version });
        }
        Ok(())
    }

    /// Eight bytes, little-endian.
    pub fn fixed64(&mut self) -> Result<u64, DecodeError> {
        self.need(8)?;
        Ok(self.rest.get_u64_le())
    }

    /// Four bytes, little-endian.
    pub fn fixed32(&mut self) -> Result<u32, DecodeError> {
        self.need(4)?;
        Ok(self.rest.get_u32_le())
    }

    /// One to ten bytes; the shortest form only.
    pub fn varint(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 || (byte == 0 && shift > 0) {
                return Err(self.invalid(bits));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.invalid(value))
    }

    /// A varint that fits 32 bits.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        let value = self.varint()?;
        u32::try_from(value).map_err(|_| self.invalid(value))
    }

    /// A varint that fits 16 bits.
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        let value = self.varint()?;
        u16::try_from(value).map_err(|_| self.invalid(value))
    }

    /// A count of items of at least `item_bytes` each: never more than the input can hold.
    pub fn count(&mut self, item_bytes: usize) -> Result<usize, DecodeError> {
        let value = self.varint()?;
        let limit = self.rest.len() / item_bytes.max(1);
        match usize::try_from(value) {
            Ok(count) if count <= limit => Ok(count),
            _ => Err(DecodeError::Truncated { what: self.what }),
        }
    }

    /// Length, then bytes.
    pub fn bytes(&mut self) -> Result<Bytes, DecodeError> {
        let length = self.count(1)?;
        Ok(self.rest.split_to(length))
    }

    /// `length` bytes.
    pub fn raw(&mut self, length: usize) -> Result<Bytes, DecodeError> {
        self.need(length)?;
        Ok(self.rest.split_to(length))
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Refuses what is left over.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(DecodeError::LeftOver { what: self.what, bytes: self.rest.len() })
    }

    /// An error about a value in this input.
    pub fn invalid(&self, value: u64) -> DecodeError {
        DecodeError::Invalid { what: self.what, value }
    }

    fn need(&self, length: usize) -> Result<(), DecodeError> {
        if self.rest.len() < length {
            return Err(DecodeError::Truncated { what: self.what });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn varint_reads_back_and_leaves_nothing(value in any::<u64>()) {
            let mut writer = Writer::default();
            writer.varint(value);
            let mut reader = Reader::new("test", writer.finish());
            prop_assert_eq!(reader.varint(), Ok(value));
            prop_assert_eq!(reader.finish(), Ok(()));
        }

        #[test]
        fn reading_noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut reader = Reader::new("test", Bytes::from(noise));
            while reader.remaining() > 0 {
                if reader.varint().and_then(|_| reader.bytes()).is_err() {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_longer_form_of_a_varint_is_refused() {
        let mut reader = Reader::new("test", Bytes::from_static(&[0x80, 0x00]));
        assert!(matches!(reader.varint(), Err(DecodeError::Invalid { .. })));
        let mut reader = Reader::new("test", Bytes::from_static(&[0xff; 10]));
        assert!(matches!(reader.varint(), Err(DecodeError::Invalid { .. })));
    }

    #[test]
    fn a_count_beyond_the_input_is_refused_before_anything_is_allocated() {
        let mut reader = Reader::new("test", Bytes::from_static(&[0xff, 0xff, 0x03, 1, 2]));
        assert_eq!(reader.bytes(), Err(DecodeError::Truncated { what: "test" }));
    }
}
