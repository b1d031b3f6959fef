//! The blocks that a snapshot travels in: sorted pairs of one shard, about 1 MiB, checksummed.
//!
//! A block is `version u8`, then pairs of `key length | key | value length | value` (varints).
//! Keys come without the shard's number: the receiver adds its own.
//!
//! Source and receiver both fold every block into [`SnapshotTotals`]; a transfer is complete when
//! the two agree.

use bytes::Bytes;
use tombolo_core::{
    DecodeError,
    codec::{Reader, Writer},
};

/// Size at which a block ends, in bytes; one more pair may stand above it.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;
const BLOCK_VERSION: u8 = 1;

/// One chunk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotBlock {
    /// Its place, from 0.
    pub number: u64,
    /// Sorted pairs.
    pub block: Bytes,
    /// CRC-32 of the block.
    pub crc: u32,
}

/// What a whole snapshot amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotTotals {
    /// Blocks.
    pub chunks: u64,
    /// Keys.
    pub pairs: u64,
    /// Bytes of all blocks.
    pub bytes: u64,
    /// CRC-32 chained over the CRC-32 of each block.
    pub crc: u32,
}

impl SnapshotTotals {
    /// Counts the next block.
    pub(crate) fn add(&mut self, pairs: u64, bytes: u64, crc: u32) {
        self.chunks += 1;
        self.pairs += pairs;
        self.bytes += bytes;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.crc.to_le_bytes());
        hasher.update(&crc.to_le_bytes());
        self.crc = hasher.finalize();
    }

    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.varint(self.chunks);
        writer.varint(self.pairs);
        writer.varint(self.bytes);
        writer.fixed32(self.crc);
    }

    pub(crate) fn decode(reader: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self {
            chunks: reader.varint()?,
            pairs: reader.varint()?,
            bytes: reader.varint()?,
            crc: reader.fixed32()?,
        })
    }
}

/// Fills a block.
pub(crate) struct BlockWriter {
    writer: Writer,
    pub(crate) pairs: u64,
}

impl BlockWriter {
    pub(crate) fn new() -> Self {
        let mut writer = Writer::with_capacity(BLOCK_BYTES + (64 << 10));
        writer.u8(BLOCK_VERSION);
        Self { writer, pairs: 0 }
    }

    pub(crate) fn is_full(&self) -> bool {
        BLOCK_BYTES <= self.writer.as_slice().len()
    }

    /// Appends a pair; `key` without the shard's number.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) {
        self.writer.bytes(key);
        self.writer.bytes(value);
        self.pairs += 1;
    }

    pub(crate) fn finish(self) -> Bytes {
        self.writer.finish()
    }
}

/// Reads all pairs of a block.
pub(crate) fn read_block(block: Bytes) -> Result<Vec<(Bytes, Bytes)>, DecodeError> {
    let mut reader = Reader::new("snapshot block", block);
    reader.version(BLOCK_VERSION)?;
    let mut pairs = Vec::new();
    while reader.remaining() > 0 {
        pairs.push((reader.bytes()?, reader.bytes()?));
    }
    Ok(pairs)
}
