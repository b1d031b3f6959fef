//! How replies are printed.
//!
//! JSON has the shape of the protocol's messages in proto3 JSON: names in lowerCamelCase, bytes in
//! base64, 64-bit numbers as strings, times in RFC 3339. Fields are always present, in a fixed
//! order, except for those that a reply does not have. Keys follow `--key-encoding`.

use crate::exit::Failure;
use crate::lines::escape;
use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use comfy_table::{Table, presets};
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, SystemTime};
use tombolo_client::{Dot, HybridTime, Revision, Value, Version, proto as v1};

/// Padded in output, either way in input.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// Longest value shown in a table, in characters.
const SHOWN_VALUE_MAX: usize = 60;

/// An output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people
    Table,
    /// One JSON document
    Json,
    /// One JSON object a line
    Jsonl,
    /// Bare bytes: of a get, the value and nothing else
    Raw,
}

/// How keys are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum KeyEncoding {
    #[default]
    Utf8,
    Hex,
    Base64,
}

impl KeyEncoding {
    /// Reads a key of the command line.
    pub(crate) fn parse(self, text: &str) -> Result<Bytes, Failure> {
        match self {
            Self::Utf8 => Ok(Bytes::copy_from_slice(text.as_bytes())),
            Self::Hex => hex::decode(text)
                .map(Bytes::from)
                .map_err(|error| Failure::Usage(format!("key `{text}` is not hex: {error}"))),
            Self::Base64 => unbase64(text)
                .map_err(|error| Failure::Usage(format!("key `{text}` is not base64: {error}"))),
        }
    }

    /// A key in a table or a message.
    pub(crate) fn show(self, key: &[u8]) -> String {
        match self {
            Self::Utf8 => escape(key),
            Self::Hex => hex::encode(key),
            Self::Base64 => base64(key),
        }
    }

    /// A key in JSON: `key`, or `keyBase64` for bytes that are not UTF-8.
    pub(crate) fn json(self, key: &[u8]) -> KeyJson {
        match self {
            Self::Utf8 => match std::str::from_utf8(key) {
                Ok(text) => KeyJson { key: Some(text.into()), key_base64: None },
                Err(_) => KeyJson { key: None, key_base64: Some(base64(key)) },
            },
            Self::Hex | Self::Base64 => KeyJson { key: Some(self.show(key)), key_base64: None },
        }
    }
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

pub(crate) fn unbase64(text: &str) -> Result<Bytes, base64::DecodeError> {
    BASE64.decode(text.trim()).map(Bytes::from)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct KeyJson {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
}

#[derive(Serialize)]
pub(crate) struct DotJson {
    region: u32,
    incarnation: u32,
    seq: String,
}

impl From<Dot> for DotJson {
    fn from(dot: Dot) -> Self {
        Self { region: dot.region, incarnation: dot.incarnation, seq: dot.seq.to_string() }
    }
}

#[derive(Serialize)]
pub(crate) struct RevisionJson {
    shard: u32,
    term: String,
    index: String,
}

impl From<Revision> for RevisionJson {
    fn from(it: Revision) -> Self {
        Self { shard: it.shard, term: it.term.to_string(), index: it.index.to_string() }
    }
}

/// A value as proto3 JSON writes it: one key, named by its kind.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum ValueJson {
    Data(String),
    Counter(String),
    Set(SetJson),
    Map(MapJson),
    Flag(bool),
    #[serde(untagged)]
    Saturated {
        counter: String,
        saturated: bool,
    },
}

#[derive(Serialize)]
struct SetJson {
    elements: Vec<String>,
}

#[derive(Serialize)]
struct MapJson {
    fields: Vec<FieldJson>,
}

#[derive(Serialize)]
struct FieldJson {
    name: String,
    value: ValueJson,
}

impl ValueJson {
    fn of(value: &Value) -> Self {
        match value {
            Value::Data(data) => Self::Data(base64(data)),
            Value::Counter(sum) => Self::Counter(sum.to_string()),
            Value::Saturated(end) => Self::Saturated { counter: end.to_string(), saturated: true },
            Value::Set(elements) => {
                Self::Set(SetJson { elements: elements.iter().map(|it| base64(it)).collect() })
            }
            Value::Flag(on) => Self::Flag(*on),
            Value::Map(fields) => {
                let field = |(name, value): &(String, Value)| FieldJson {
                    name: name.clone(),
                    value: Self::of(value),
                };
                Self::Map(MapJson { fields: fields.iter().map(field).collect() })
            }
        }
    }

    fn of_version(version: &Version) -> Self {
        version.typed.as_ref().map_or_else(|| Self::Data(base64(&version.value)), Self::of)
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VersionJson {
    dot: DotJson,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<ValueJson>,
    origin_region: String,
    write_time: String,
    hybrid_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expire_time: Option<String>,
}

pub(crate) fn versions_json(versions: &[Version], keys_only: bool) -> Vec<VersionJson> {
    let version = |it: &Version| VersionJson {
        dot: it.dot.into(),
        value: (!keys_only).then(|| ValueJson::of_version(it)),
        origin_region: it.origin_region.clone(),
        write_time: show_time(it.time),
        hybrid_time: it.time.0.to_string(),
        expire_time: it.expire_time.map(|at| humantime::format_rfc3339_millis(at).to_string()),
    };
    versions.iter().map(version).collect()
}

/// A version as it came: without a value where the message has none, or none that is plain bytes.
pub(crate) fn version_json(it: &v1::Version) -> VersionJson {
    let value = match it.value.as_ref().and_then(|value| value.kind.as_ref()) {
        Some(v1::value::Kind::Data(data)) => Some(ValueJson::Data(base64(data))),
        Some(_) | None => None,
    };
    let expire = it.expire_time.and_then(|time| SystemTime::try_from(time).ok());
    VersionJson {
        dot: Dot::from(it.dot.unwrap_or_default()).into(),
        value,
        origin_region: it.origin_region.clone(),
        write_time: show_time(HybridTime(it.hybrid_time)),
        hybrid_time: it.hybrid_time.to_string(),
        expire_time: expire.map(|at| humantime::format_rfc3339_millis(at).to_string()),
    }
}

/// The wall-clock part, in UTC.
pub(crate) fn show_time(time: HybridTime) -> String {
    // The largest reading lies in the year 10889, past what RFC 3339 can write.
    const LAST_MS: u64 = 253_402_300_799_999;
    let since = Duration::from_millis(time.physical_ms().min(LAST_MS));
    humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + since).to_string()
}

/// A value in a table: text if it is, else hex, cut to a length that fits.
pub(crate) fn show_value(value: &[u8]) -> String {
    let text = match std::str::from_utf8(value) {
        Ok(_) => escape(value),
        Err(_) => format!("0x{}", hex::encode(&value[..value.len().min(SHOWN_VALUE_MAX)])),
    };
    if text.chars().count() <= SHOWN_VALUE_MAX {
        return text;
    }
    let shown: String = text.chars().take(SHOWN_VALUE_MAX).collect();
    format!("{shown}… ({} bytes)", value.len())
}

/// A version's value as text.
pub(crate) fn value_text(version: &Version) -> String {
    version.typed.as_ref().map_or_else(|| escape(&version.value), typed_text)
}

/// The same in a table: cut to a length that fits.
pub(crate) fn show_version(version: &Version) -> String {
    version.typed.as_ref().map_or_else(
        || show_value(&version.value),
        |value| {
            let text = typed_text(value);
            if text.chars().count() <= SHOWN_VALUE_MAX {
                return text;
            }
            format!("{}…", text.chars().take(SHOWN_VALUE_MAX).collect::<String>())
        },
    )
}

/// A typed value on one line: `7`, `on`, `{a, b}`, `{name: Ada, visits: 7}`.
fn typed_text(value: &Value) -> String {
    match value {
        Value::Counter(sum) => sum.to_string(),
        Value::Saturated(end) if *end < 0 => format!("less than {end}"),
        Value::Saturated(end) => format!("more than {end}"),
        Value::Flag(true) => "on".to_owned(),
        Value::Flag(false) => "off".to_owned(),
        Value::Data(data) => escape(data),
        Value::Set(elements) => {
            let elements: Vec<String> = elements.iter().map(|it| escape(it)).collect();
            format!("{{{}}}", elements.join(", "))
        }
        Value::Map(fields) => {
            let field = |(name, value): &(String, Value)| {
                format!("{}: {}", escape(name.as_bytes()), typed_text(value))
            };
            format!("{{{}}}", fields.iter().map(field).collect::<Vec<_>>().join(", "))
        }
    }
}

/// Seconds in two significant steps: `0s`, `35ms`, `12.5s`, `4m 12s`.
pub(crate) fn show_seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds <= 0.0 {
        return "0s".into();
    }
    if seconds < 1.0 {
        return format!("{:.0}ms", seconds * 1000.0);
    }
    if seconds < 60.0 {
        return format!("{seconds:.1}s");
    }
    let whole = Duration::from_secs_f64(seconds.min(1e12));
    humantime::format_duration(Duration::from_secs(whole.as_secs())).to_string()
}

/// Prints rows as columns, without frames, so that they can be cut and searched.
pub(crate) fn table<const N: usize>(
    out: &mut dyn Write,
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> std::io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).force_no_tty().set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Prints one object: over several lines as a document, else on one line.
pub(crate) fn json(
    out: &mut dyn Write,
    format: Format,
    value: &impl Serialize,
) -> std::io::Result<()> {
    let text = match format {
        Format::Json => serde_json::to_string_pretty(value),
        Format::Jsonl | Format::Table | Format::Raw => serde_json::to_string(value),
    };
    writeln!(out, "{}", text.map_err(std::io::Error::other)?)
}

/// Prints a list: one document, or one object a line.
pub(crate) fn json_list(
    out: &mut dyn Write,
    format: Format,
    name: &str,
    items: &[impl Serialize],
) -> std::io::Result<()> {
    match format {
        Format::Json => json(out, format, &std::collections::BTreeMap::from([(name, items)])),
        Format::Jsonl | Format::Table | Format::Raw => {
            items.iter().try_for_each(|item| json(out, format, item))
        }
    }
}
