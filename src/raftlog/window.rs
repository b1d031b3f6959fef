//! Reading a segment file at open, and searching it for batches.

use crate::{
    LogError,
    frame::{self, BATCH_ALIGN, Frame, HEADER_BYTES},
    segment::{SegmentFile, read_up_to},
};

const WINDOW_BYTES: usize = 1024 * 1024;

/// Reads a file front to back through a buffer that is small unless a batch is large.
pub(crate) struct Window<'a> {
    pub(crate) file: &'a SegmentFile,
    file_len: u64,
    buf: Vec<u8>,
    start: u64,
}

impl<'a> Window<'a> {
    pub(crate) fn new(file: &'a SegmentFile) -> Result<Self, LogError> {
        let metadata = file.file.metadata().map_err(LogError::io("read segment", &file.path))?;
        let file_len = metadata.len().min(file.capacity);
        Ok(Self { file, file_len, buf: Vec::new(), start: 0 })
    }

    /// The bytes at `offset`: `len` of them, or fewer at the end of the file.
    pub(crate) fn bytes(&mut self, offset: u64, len: usize) -> Result<&[u8], LogError> {
        let wanted_end = offset.saturating_add(len as u64).min(self.file_len);
        if offset < self.start || wanted_end > self.start + self.buf.len() as u64 {
            let available = self.file_len.saturating_sub(offset);
            let size = usize::try_from(available).unwrap_or(usize::MAX).min(len.max(WINDOW_BYTES));
            self.buf.resize(size, 0);
            let read = read_up_to(&self.file.file, &mut self.buf, offset);
            let read = read.map_err(LogError::io("read segment", &self.file.path))?;
            self.buf.truncate(read);
            self.start = offset;
        }
        let from = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        let rest = self.buf.get(from..).unwrap_or_default();
        Ok(&rest[..rest.len().min(len)])
    }

    pub(crate) fn batch_at(&mut self, offset: u64) -> Result<Option<Frame<'_>>, LogError> {
        let salt = self.file.salt;
        Ok(frame::decode_batch(self.bytes(offset, HEADER_BYTES)?, salt, offset))
    }

    /// The offset of the first valid batch header behind `offset`.
    pub(crate) fn find_batch_after(&mut self, offset: u64) -> Result<Option<u64>, LogError> {
        let salt = self.file.salt;
        let mut at = offset + BATCH_ALIGN as u64;
        while at + HEADER_BYTES as u64 <= self.file_len {
            let bytes = self.bytes(at, WINDOW_BYTES)?;
            let mut position = 0;
            while position + HEADER_BYTES <= bytes.len() {
                if frame::decode_batch(&bytes[position..], salt, at + position as u64).is_some() {
                    return Ok(Some(at + position as u64));
                }
                position += BATCH_ALIGN;
            }
            if position == 0 {
                break;
            }
            at += position as u64;
        }
        Ok(None)
    }
}
