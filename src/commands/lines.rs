//! The two line formats of `load` and `dump`: JSON lines, and key TAB value.
//!
//! Both carry any bytes. In key TAB value, `\t` `\n` `\r` `\\` `\0` stand for the characters that
//! would break a line, `\xHH` for control characters and bytes that are not UTF-8; everything else
//! stands for itself. In JSON, `key_b64` and `value_b64` replace `key` and `value` where the bytes
//! are not UTF-8. The same record is always written the same way, so dumps can be compared.

use crate::output::{base64, unbase64};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// A line format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LineFormat {
    /// {"key":"…","value":"…"}, one a line
    Jsonl,
    /// key TAB value, with \t \n \r \\ \0 \xHH
    Tsv,
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) key: Bytes,
    pub(crate) value: Bytes,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct JsonLine {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_b64: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_b64: Option<String>,
}

impl LineFormat {
    /// Appends a record with its line end.
    pub(crate) fn write(self, record: &Record, line: &mut Vec<u8>) {
        match self {
            Self::Jsonl => {
                let (key, key_b64) = text_or_base64(&record.key);
                let (value, value_b64) = text_or_base64(&record.value);
                let object = JsonLine { key, key_b64, value, value_b64 };
                // Strings under string keys: there is nothing that JSON could refuse.
                line.extend(serde_json::to_vec(&object).unwrap_or_default());
            }
            Self::Tsv => {
                line.extend(escape(&record.key).bytes());
                line.push(b'\t');
                line.extend(escape(&record.value).bytes());
            }
        }
        line.push(b'\n');
    }

    /// Reads a line without its end.
    ///
    /// # Errors
    /// What is wrong with it, without the place.
    pub(crate) fn read(self, line: &[u8]) -> Result<Record, String> {
        match self {
            Self::Jsonl => {
                let line: JsonLine =
                    serde_json::from_slice(line).map_err(|error| error.to_string())?;
                let key = field("key", line.key, line.key_b64)?;
                Ok(Record { key, value: field("value", line.value, line.value_b64)? })
            }
            Self::Tsv => {
                let tab = line.iter().position(|&byte| byte == b'\t');
                let (key, value) = line.split_at(tab.ok_or("no TAB between key and value")?);
                Ok(Record { key: unescape(key)?, value: unescape(&value[1..])? })
            }
        }
    }
}

fn text_or_base64(bytes: &[u8]) -> (Option<String>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text.into()), None),
        Err(_) => (None, Some(base64(bytes))),
    }
}

fn field(name: &str, text: Option<String>, encoded: Option<String>) -> Result<Bytes, String> {
    match (text, encoded) {
        (Some(text), None) => Ok(Bytes::from(text)),
        (None, Some(encoded)) => unbase64(&encoded).map_err(|error| format!("{name}_b64: {error}")),
        (None, None) => Err(format!("neither `{name}` nor `{name}_b64`")),
        (Some(_), Some(_)) => Err(format!("both `{name}` and `{name}_b64`")),
    }
}

/// Writes any bytes as one line of printable text; [`unescape`] gives them back.
pub(crate) fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\t' => text.push_str("\\t"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\\' => text.push_str("\\\\"),
                '\0' => text.push_str("\\0"),
                c if c.is_control() => {
                    let mut buffer = [0; 4];
                    c.encode_utf8(&mut buffer).bytes().for_each(|byte| push_hex(&mut text, byte));
                }
                c => text.push(c),
            }
        }
        chunk.invalid().iter().for_each(|&byte| push_hex(&mut text, byte));
    }
    text
}

fn push_hex(text: &mut String, byte: u8) {
    text.push_str("\\x");
    text.push_str(&hex::encode([byte]));
}

/// Reads what [`escape`] wrote. Bytes that stand for themselves are taken as they are.
pub(crate) fn unescape(text: &[u8]) -> Result<Bytes, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.iter();
    while let Some(&byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        match rest.next() {
            Some(b't') => bytes.push(b'\t'),
            Some(b'n') => bytes.push(b'\n'),
            Some(b'r') => bytes.push(b'\r'),
            Some(b'\\') => bytes.push(b'\\'),
            Some(b'0') => bytes.push(0),
            Some(b'x') => {
                let digits: Vec<u8> = rest.by_ref().take(2).copied().collect();
                let byte = hex::decode(&digits).map_err(|_| "\\x needs two hex digits")?;
                bytes.push(*byte.first().ok_or("\\x needs two hex digits")?);
            }
            Some(&other) => {
                return Err(format!("unknown escape \\{}", char::from(other).escape_default()));
            }
            None => return Err("a backslash at the end".into()),
        }
    }
    Ok(Bytes::from(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let awkward = prop::sample::select(b"\t\n\r\\\0\"x0a{\x7f\xc3\xa9\xff".to_vec());
        prop_oneof![
            prop::collection::vec(awkward, 0..24),
            prop::collection::vec(any::<u8>(), 0..24)
        ]
    }

    proptest! {
        #[test]
        fn any_record_survives_both_formats_on_one_line(key in bytes(), value in bytes()) {
            let record = Record { key: key.into(), value: value.into() };
            for format in [LineFormat::Jsonl, LineFormat::Tsv] {
                let mut line = Vec::new();
                format.write(&record, &mut line);
                let end = line.pop();
                prop_assert_eq!(end, Some(b'\n'));
                prop_assert!(!line.contains(&b'\n') && !line.contains(&b'\r'));
                prop_assert!(std::str::from_utf8(&line).is_ok());
                prop_assert_eq!(format.read(&line), Ok(record.clone()));
            }
        }

        #[test]
        fn any_input_is_read_or_refused_without_panic(line in bytes()) {
            let _ = LineFormat::Jsonl.read(&line);
            let _ = LineFormat::Tsv.read(&line);
        }
    }

    #[test]
    fn records_are_written_in_one_known_way() {
        let record = Record { key: "k\té".into(), value: Bytes::from_static(b"\\\0\x01\xff") };
        let line = |format: LineFormat| {
            let mut line = Vec::new();
            format.write(&record, &mut line);
            String::from_utf8(line).expect("text")
        };
        assert_eq!(line(LineFormat::Tsv), "k\\té\t\\\\\\0\\x01\\xff\n");
        assert_eq!(line(LineFormat::Jsonl), "{\"key\":\"k\\té\",\"value_b64\":\"XAAB/w==\"}\n");
    }

    #[test]
    fn malformed_lines_say_what_is_wrong() {
        for (format, line, problem) in [
            (LineFormat::Tsv, "key only", "no TAB"),
            (LineFormat::Tsv, "k\\q\tv", "unknown escape \\q"),
            (LineFormat::Tsv, "k\tv\\", "a backslash at the end"),
            (LineFormat::Tsv, "k\tv\\x1", "two hex digits"),
            (LineFormat::Tsv, "k\tv\\xzz", "two hex digits"),
            (LineFormat::Jsonl, "{\"key\":\"a\"}", "neither `value` nor `value_b64`"),
            (LineFormat::Jsonl, "{\"key\":\"a\",\"value\":1}", "invalid type"),
            (LineFormat::Jsonl, "{\"key\":\"a\",\"value\":\"\",\"ttl\":1}", "unknown field `ttl`"),
            (LineFormat::Jsonl, "{\"key\":\"a\",\"key_b64\":\"\",\"value\":\"\"}", "both `key`"),
            (LineFormat::Jsonl, "{\"key_b64\":\"*\",\"value\":\"\"}", "key_b64"),
            (LineFormat::Jsonl, "nonsense", "expected"),
        ] {
            let error = format.read(line.as_bytes()).expect_err(line);
            assert!(error.contains(problem), "{line}: {error}");
        }
    }
}
