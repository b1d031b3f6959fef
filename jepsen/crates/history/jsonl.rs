//! Histories as files: one JSON object a line.

use crate::{Event, History};
use std::io::{self, BufRead, Write};

/// Why a history cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The file cannot be read.
    #[error("reading the history: {0}")]
    Io(#[from] io::Error),
    /// A line is not an event.
    #[error("line {line} of the history: {source}")]
    Line {
        /// Counts from 1.
        line: u64,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// Events are missing or out of order.
    #[error("line {line} of the history has index {found}")]
    Index {
        /// Counts from 1.
        line: u64,
        /// As in the file.
        found: u64,
    },
}

/// Writes events line by line; numbers them.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    next: u64,
}

impl<W: Write> Writer<W> {
    /// A writer of a new history. Give it a buffered `out`.
    pub fn new(out: W) -> Self {
        Self { out, next: 0 }
    }

    /// Appends an event; its index is set here.
    ///
    /// # Errors
    /// The system's.
    pub fn append(&mut self, event: &mut Event) -> io::Result<()> {
        event.index = self.next;
        self.next += 1;
        serde_json::to_writer(&mut self.out, event)?;
        self.out.write_all(b"\n")
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Reads a whole history.
///
/// # Errors
/// [`HistoryError`]. A torn last line is an error too: a verdict over a part would be none.
pub fn read(input: impl BufRead) -> Result<History, HistoryError> {
    let mut events = Vec::new();
    for (text, number) in input.lines().zip(1u64..) {
        let event: Event = serde_json::from_str(&text?)
            .map_err(|source| HistoryError::Line { line: number, source })?;
        if event.index + 1 != number {
            return Err(HistoryError::Index { line: number, found: event.index });
        }
        events.push(event);
    }
    Ok(History { events })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Facts, Kind, Process};
    use serde_json::json;

    fn event(process: Process, kind: Kind, f: &str) -> Event {
        Event {
            index: 0,
            time: 7,
            process,
            kind,
            f: f.into(),
            key: Some("k1".into()),
            value: json!([4, 9]),
            x: Facts { actual: Some(json!(5)), ..Facts::default() },
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        let mut events = [
            event(Process::Client(3), Kind::Invoke, "cas"),
            event(Process::Client(3), Kind::Fail, "cas"),
            event(Process::Nemesis, Kind::Info, "partition"),
        ];
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        for event in &mut events {
            writer.append(event).unwrap();
        }

        assert_eq!(read(&bytes[..]).unwrap().events, events);
    }

    #[test]
    fn a_line_is_what_other_tools_expect() {
        let mut event = event(Process::Client(3), Kind::Ok, "cas");
        event.x = Facts::default();
        let mut bytes = Vec::new();

        Writer::new(&mut bytes).append(&mut event).unwrap();

        let line =
            r#"{"index":0,"time":7,"process":3,"type":"ok","f":"cas","key":"k1","value":[4,9]}"#;
        assert_eq!(String::from_utf8(bytes).unwrap().trim_end(), line);
    }

    #[test]
    fn torn_and_missing_lines_are_errors() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        for _ in 0..3 {
            writer.append(&mut event(Process::Client(1), Kind::Invoke, "read")).unwrap();
        }
        let torn = &bytes[..bytes.len() - 5];
        assert!(matches!(read(torn), Err(HistoryError::Line { line: 3, .. })));

        let first = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        let missing = read(&bytes[first..]);
        assert!(matches!(missing, Err(HistoryError::Index { line: 1, found: 1 })));
    }
}
