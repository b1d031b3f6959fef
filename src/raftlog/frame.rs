//! One record in a segment.
//!
//! ```text
//! len u32 | crc32 u32 | kind u8 | version u8 | flags u16 | group u64 | index u64 | term u64 | node u64 | payload
//! ```
//!
//! Little-endian, 44 bytes and the payload; `len` counts the payload. The CRC covers everything after
//! itself and starts from `salt ^ len`. The salt differs for each use of a segment file, and a CRC is
//! injective in its start value, so a frame left over from an earlier use never validates.
//!
//! Frames are grouped in *batches*, the unit of writing and syncing: a batch starts with a frame of
//! kind `Batch` that knows its own offset and the batch's length, and is padded with zeros to 8 bytes.
//!
//! Not here: which frame may follow which (`recovery`), where a batch goes (`writer`).

use crate::types::{LogId, Vote};

/// Bytes of a frame without its payload.
pub(crate) const HEADER_BYTES: usize = 44;
/// Batches start at multiples of this.
pub(crate) const BATCH_ALIGN: usize = 8;
/// Flag of a `Batch` frame: the state of every group follows.
pub(crate) const FLAG_CHECKPOINT: u16 = 1;
/// Payload bytes of a `State` frame.
pub(crate) const STATE_BYTES: usize = 97;

const VERSION: u8 = 1;
/// Flag of `Truncate` and `Committed`: there is an id. Of `Vote`: it is committed.
const FLAG_SET: u16 = 1;

/// What a frame says. The numbers are on disk: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Start of a write batch.
    Batch = 1,
    /// A new entry at the end of its group's log.
    Entry = 2,
    /// A saved vote.
    Vote = 3,
    /// Everything after the named entry is gone.
    Truncate = 4,
    /// Everything up to the named entry is gone.
    Purge = 5,
    /// A saved commit position.
    Committed = 6,
    /// All of a group but its entries, as of the beginning of this segment.
    State = 7,
    /// A copy of a live entry from an older segment that is to be recycled.
    Moved = 8,
}

impl Kind {
    fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Batch),
            2 => Some(Self::Entry),
            3 => Some(Self::Vote),
            4 => Some(Self::Truncate),
            5 => Some(Self::Purge),
            6 => Some(Self::Committed),
            7 => Some(Self::State),
            8 => Some(Self::Moved),
            _ => None,
        }
    }
}

/// A frame, decoded or to be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: Kind,
    pub(crate) flags: u16,
    pub(crate) group: u64,
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) node: u64,
    pub(crate) payload: &'a [u8],
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameError {
    /// The bytes end before the frame does.
    Short,
    /// The checksum does not match: damaged, torn, or of an earlier use of the file.
    Checksum,
    /// The checksum matches, but a newer release wrote it.
    Unknown { kind: u8, version: u8 },
}

impl<'a> Frame<'a> {
    pub(crate) fn plain(kind: Kind, group: u64, id: LogId) -> Self {
        let LogId { term, node, index } = id;
        Self { kind, flags: FLAG_SET, group, index, term, node, payload: &[] }
    }

    pub(crate) fn optional(kind: Kind, group: u64, id: Option<LogId>) -> Self {
        match id {
            Some(id) => Self::plain(kind, group, id),
            None => Self { kind, flags: 0, group, index: 0, term: 0, node: 0, payload: &[] },
        }
    }

    pub(crate) fn vote(group: u64, vote: Vote) -> Self {
        let flags = if vote.committed { FLAG_SET } else { 0 };
        Self {
            kind: Kind::Vote,
            flags,
            group,
            index: 0,
            term: vote.term,
            node: vote.node,
            payload: &[],
        }
    }

    pub(crate) fn id(&self) -> LogId {
        LogId { term: self.term, node: self.node, index: self.index }
    }

    pub(crate) fn optional_id(&self) -> Option<LogId> {
        (self.flags & FLAG_SET != 0).then(|| self.id())
    }

    pub(crate) fn as_vote(&self) -> Vote {
        Vote { term: self.term, node: self.node, committed: self.flags & FLAG_SET != 0 }
    }
}

/// Appends the frame to `buf`. The payload must be shorter than 4 GiB; entry size limits see to that.
pub(crate) fn encode(buf: &mut Vec<u8>, salt: u32, frame: &Frame<'_>) {
    let start = buf.len();
    let len = u32::try_from(frame.payload.len()).unwrap_or(u32::MAX);
    let mut header = [0; HEADER_BYTES];
    header[0..4].copy_from_slice(&len.to_le_bytes());
    header[8] = frame.kind as u8;
    header[9] = VERSION;
    header[10..12].copy_from_slice(&frame.flags.to_le_bytes());
    header[12..20].copy_from_slice(&frame.group.to_le_bytes());
    header[20..28].copy_from_slice(&frame.index.to_le_bytes());
    header[28..36].copy_from_slice(&frame.term.to_le_bytes());
    header[36..44].copy_from_slice(&frame.node.to_le_bytes());
    buf.reserve(HEADER_BYTES + frame.payload.len());
    buf.extend_from_slice(&header);
    buf.extend_from_slice(frame.payload);
    let crc = checksum(salt ^ len, &buf[start + 8..]);
    buf[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// Reads the frame at the start of `bytes`. Never panics, whatever the bytes are.
pub(crate) fn decode(bytes: &[u8], salt: u32) -> Result<Frame<'_>, FrameError> {
    if bytes.len() < HEADER_BYTES {
        return Err(FrameError::Short);
    }
    let len = u32_at(bytes, 0);
    let end = HEADER_BYTES + usize::try_from(len).unwrap_or(usize::MAX - HEADER_BYTES);
    let Some(body) = bytes.get(8..end) else { return Err(FrameError::Short) };
    if checksum(salt ^ len, body) != u32_at(bytes, 4) {
        return Err(FrameError::Checksum);
    }
    let (Some(kind), VERSION) = (Kind::from_code(bytes[8]), bytes[9]) else {
        return Err(FrameError::Unknown { kind: bytes[8], version: bytes[9] });
    };
    Ok(Frame {
        kind,
        flags: u16::from_le_bytes([bytes[10], bytes[11]]),
        group: u64_at(bytes, 12),
        index: u64_at(bytes, 20),
        term: u64_at(bytes, 28),
        node: u64_at(bytes, 36),
        payload: &bytes[HEADER_BYTES..end],
    })
}

/// The header of a batch: `offset` is its own place, `len` its bytes with header and padding.
pub(crate) fn batch(offset: u64, len: u64, frames: u64, checkpoint: bool) -> Frame<'static> {
    let flags = if checkpoint { FLAG_CHECKPOINT } else { 0 };
    Frame {
        kind: Kind::Batch,
        flags,
        group: offset,
        index: len,
        term: frames,
        node: 0,
        payload: &[],
    }
}

/// The batch header at the start of `bytes`, if there is a valid one that belongs at `offset`.
pub(crate) fn decode_batch(bytes: &[u8], salt: u32, offset: u64) -> Option<Frame<'_>> {
    // Cheap tests first: this runs at every 8th byte when a damaged tail is searched.
    if bytes.len() < HEADER_BYTES || bytes[8] != Kind::Batch as u8 || u64_at(bytes, 12) != offset {
        return None;
    }
    let frame = decode(bytes, salt).ok()?;
    (frame.index >= HEADER_BYTES as u64 && frame.payload.is_empty()).then_some(frame)
}

/// All of a group but its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StateRecord {
    /// Index of the oldest entry kept, or of the next one if none is.
    pub(crate) first: u64,
    pub(crate) purged: Option<LogId>,
    /// The newest entry; `None` if no entry is kept.
    pub(crate) last: Option<LogId>,
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
}

impl StateRecord {
    pub(crate) fn encode(&self) -> [u8; STATE_BYTES] {
        let mut out = [0; STATE_BYTES];
        out[1..9].copy_from_slice(&self.first.to_le_bytes());
        for (slot, id) in [self.purged, self.last, self.committed].into_iter().enumerate() {
            if let Some(id) = id {
                out[0] |= 1 << slot;
                put_id(&mut out[9 + slot * 24..33 + slot * 24], id);
            }
        }
        if let Some(vote) = self.vote {
            out[0] |= 8 | if vote.committed { 16 } else { 0 };
            out[81..89].copy_from_slice(&vote.term.to_le_bytes());
            out[89..97].copy_from_slice(&vote.node.to_le_bytes());
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != STATE_BYTES {
            return None;
        }
        let id =
            |slot: usize| (bytes[0] & (1 << slot) != 0).then(|| get_id(&bytes[9 + slot * 24..]));
        let vote = (bytes[0] & 8 != 0).then(|| Vote {
            term: u64_at(bytes, 81),
            node: u64_at(bytes, 89),
            committed: bytes[0] & 16 != 0,
        });
        Some(Self { first: u64_at(bytes, 1), purged: id(0), last: id(1), vote, committed: id(2) })
    }
}

fn put_id(out: &mut [u8], id: LogId) {
    out[0..8].copy_from_slice(&id.term.to_le_bytes());
    out[8..16].copy_from_slice(&id.node.to_le_bytes());
    out[16..24].copy_from_slice(&id.index.to_le_bytes());
}

fn get_id(bytes: &[u8]) -> LogId {
    LogId { term: u64_at(bytes, 0), node: u64_at(bytes, 8), index: u64_at(bytes, 16) }
}

pub(crate) fn checksum(start: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(start);
    hasher.update(bytes);
    hasher.finalize()
}

/// The caller has checked the length.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(out)
}

/// The caller has checked the length.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(payload: &[u8]) -> Frame<'_> {
        Frame { kind: Kind::Entry, flags: 1, group: 2, index: 3, term: 4, node: 5, payload }
    }

    #[test]
    fn a_frame_of_another_salt_never_validates() {
        let mut buf = Vec::new();
        encode(&mut buf, 7, &sample(b"hello"));
        assert_eq!(decode(&buf, 7), Ok(sample(b"hello")));
        for salt in (0..100_000).filter(|salt| *salt != 7) {
            assert_eq!(decode(&buf, salt), Err(FrameError::Checksum));
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut buf = Vec::new();
        encode(&mut buf, 7, &sample(b"hello"));
        for bit in 0..buf.len() * 8 {
            buf[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&buf, 7).is_err(), "bit {bit}");
            buf[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_newer_frame_is_named_as_such() {
        let mut buf = Vec::new();
        encode(&mut buf, 7, &sample(b""));
        buf[9] = 2;
        let crc = checksum(7, &buf[8..]);
        buf[4..8].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(decode(&buf, 7), Err(FrameError::Unknown { kind: 2, version: 2 }));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), salt: u32) {
            let _ = decode(&bytes, salt);
            let _ = decode_batch(&bytes, salt, 0);
            let _ = StateRecord::decode(&bytes);
        }

        #[test]
        fn a_state_record_survives_the_disk(first: u64, ids: [Option<(u64, u64, u64)>; 3],
                                            vote: Option<(u64, u64, bool)>) {
            let [purged, last, committed] =
                ids.map(|id| id.map(|(term, node, index)| LogId { term, node, index }));
            let vote = vote.map(|(term, node, committed)| Vote { term, node, committed });
            let record = StateRecord { first, purged, last, vote, committed };
            prop_assert_eq!(StateRecord::decode(&record.encode()), Some(record));
        }
    }
}
