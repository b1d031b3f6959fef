//! Reads the five layers of the configuration and remembers where each value came from.
//!
//! Layers meet as TOML values under dotted paths, not as typed structs, so that "not set" and "set
//! to the default" stay apart. Only values that passed [`super::check`] become a [`Config`].

use super::Config;
use super::check::{self, Problem};
use super::keys::{self, KEYS, Key, Kind, Preset};
use serde::Deserialize as _;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

/// Prefix of environment variables that set a key.
const ENV_PREFIX: &str = "TOMBOLO__";

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    /// Line and column count from 1; columns are characters.
    File {
        path: PathBuf,
        line: usize,
        column: usize,
    },
    /// Name of the environment variable.
    Env(String),
    /// Argument of `--set`.
    Set(String),
    /// Name of the flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Set(text) => write!(f, "--set {text}"),
            Self::Flag(name) => write!(f, "{name}"),
        }
    }
}

impl Origin {
    /// As `config show --origin` prints it: the file with the line only.
    fn brief(&self) -> String {
        match self {
            Self::File { path, line, column: _ } => format!("{}:{line}", path.display()),
            Self::Set(_) => "--set".into(),
            Self::Default | Self::Env(_) | Self::Flag(_) => self.to_string(),
        }
    }
}

/// A named flag that stands for a key: `--node-id 3` is `node_id = 3`.
#[derive(Clone, Debug)]
pub struct FlagValue {
    pub flag: &'static str,
    pub key: &'static str,
    pub value: String,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Correct the path or its permissions.
    #[error("{}: cannot read the configuration file: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// Restore the file: it is not text.
    #[error(
        "{}:{line}:{column}: the file is not UTF-8 text; it may be damaged or of another kind",
        path.display()
    )]
    NotUtf8 { path: PathBuf, line: usize, column: usize },
    /// Correct the file at this place.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Syntax { path: PathBuf, line: usize, column: usize, message: String },
    /// Correct each of these values.
    #[error("{}", lines(.0))]
    Invalid(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

/// A checked configuration and the origin of each of its values.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    values: BTreeMap<String, Value>,
    origins: BTreeMap<String, Origin>,
}

impl Loaded {
    /// Where the value at `path` (such as `raft.lease_reads` or `nodes[0].id`) came from.
    pub fn origin(&self, path: &str) -> Option<&Origin> {
        self.origins.get(path)
    }

    /// The whole configuration as TOML that loads again, once its secrets, which are not shown, are
    /// filled in; with `with_origins`, each line names the place its value came from in a comment.
    pub fn show(&self, with_origins: bool) -> String {
        let longest = self.values.iter().map(|(path, value)| assignment(path, value).len()).max();
        let width = longest.unwrap_or_default().min(COMMENT_COLUMN_MAX);
        let line = |name: &str, path: &str| {
            let Some(value) = self.values.get(path) else { return String::new() };
            let text = assignment(name, value);
            let text = if is_secret(path) { format!("{name} = {HIDDEN}") } else { text };
            match self.origins.get(path).filter(|_| with_origins) {
                Some(origin) => format!("{text:width$}  # {}\n", origin.brief()),
                None => format!("{text}\n"),
            }
        };

        let mut out: String = KEYS.iter().map(|key| line(key.path, key.path)).collect();
        for list in KEYS.iter().filter(|key| matches!(key.kind, Kind::Tables)) {
            for index in 0..self.config.list_len(list.path) {
                out += &format!("\n[[{}]]\n", list.path);
                for (field, _) in keys::fields(list.path) {
                    out += &line(field, &format!("{}[{index}].{field}", list.path));
                }
            }
        }
        out
    }
}

/// What is shown of a secret. Too short to be accepted as one, should somebody load it again.
const HIDDEN: &str = "\"(hidden)\"";

fn is_secret(path: &str) -> bool {
    keys::find(path).is_some_and(|key| matches!(key.kind, Kind::Secret))
}

/// Comments of `config show --origin` line up, unless a value is longer than this.
const COMMENT_COLUMN_MAX: usize = 48;

fn assignment(name: &str, value: &Value) -> String {
    format!("{name} = {value}")
}

/// The environment variables that set keys, for [`Config::load`].
///
/// Bytes that are not UTF-8 become U+FFFD, which `load` refuses.
pub fn process_env() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .map(|(name, value)| {
            (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())
        })
        .filter(|(name, _)| name.starts_with(ENV_PREFIX))
}

impl Config {
    /// Reads all layers and checks the result.
    ///
    /// `env` may hold any variables; those that do not start with `TOMBOLO__` are ignored. `sets`
    /// are the arguments of `--set`. Reads no file but `file`.
    pub fn load(
        file: Option<&Path>,
        env: impl Iterator<Item = (String, String)>,
        sets: &[String],
        flags: &[FlagValue],
    ) -> Result<Loaded, ConfigError> {
        let mut layers = Layers::default();
        layers.add_defaults();
        if let Some(path) = file {
            layers.add_file(path)?;
        }
        layers.add_env(env);
        for text in sets {
            layers.add_set(text);
        }
        for flag in flags {
            layers.add_text(flag.key, &flag.value, Origin::Flag(flag.flag.to_owned()));
        }
        layers.finish()
    }

    fn list_len(&self, list: &str) -> usize {
        if list == "nodes" { self.nodes.len() } else { self.regions.len() }
    }
}

/// What the layers so far have said, by concrete path (`raft.lease_reads`, `nodes[0].id`).
#[derive(Default)]
struct Layers {
    values: BTreeMap<String, Value>,
    origins: BTreeMap<String, Origin>,
    /// Length of each list of tables; absent when no layer has it.
    lists: BTreeMap<&'static str, usize>,
    problems: Vec<Problem>,
}

impl Layers {
    fn add_defaults(&mut self) {
        for key in KEYS {
            if let Preset::Default(text) = key.preset {
                self.add_text(key.path, text, Origin::Default);
            }
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let owned = || path.to_owned();
        let bytes =
            std::fs::read(path).map_err(|source| ConfigError::Read { path: owned(), source })?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let before = String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned();
            let (line, column) = position(&before, valid);
            ConfigError::NotUtf8 { path: owned(), line, column }
        })?;
        if text.trim().is_empty() {
            let message = "the file is empty; `tombolo config example` prints one to start from";
            let message = message.to_owned();
            return Err(ConfigError::Syntax { path: owned(), line: 1, column: 1, message });
        }
        if let Some(nul) = text.find('\0') {
            let (line, column) = position(&text, nul);
            let message =
                "the file holds a NUL byte; it may be damaged or of another kind".to_owned();
            return Err(ConfigError::Syntax { path: owned(), line, column, message });
        }
        let syntax = |error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start);
            let (line, column) = position(&text, start);
            let mut message = error.message().replace('\n', ", ");
            if text.trim_end().len() <= start {
                message += "; the file ends here: is it cut off?";
            }
            ConfigError::Syntax { path: owned(), line, column, message }
        };
        // Parsed twice: the first knows positions, the second converts values.
        let spans = DeTable::parse(&text).map_err(syntax)?;
        let table: Table = toml::from_str(&text).map_err(syntax)?;
        let at = |offset: usize| {
            let (line, column) = position(&text, offset);
            Origin::File { path: path.to_owned(), line, column }
        };
        self.add_table("", "", spans.get_ref(), &table, &at);
        Ok(())
    }

    /// Adds the keys of one table. `concrete` and `pattern` are the prefixes of their paths:
    /// `nodes[0].` and `nodes[].`.
    fn add_table(
        &mut self,
        concrete: &str,
        pattern: &str,
        spans: &DeTable<'_>,
        table: &Table,
        at: &dyn Fn(usize) -> Origin,
    ) {
        for (name, span) in spans {
            let origin = at(name.span().start);
            let name: &str = name.get_ref();
            let Some(value) = table.get(name) else { continue };
            let (path, known) = (format!("{concrete}{name}"), format!("{pattern}{name}"));
            match (keys::find(&known), span.get_ref(), value) {
                (Some(key), DeValue::Array(spans), Value::Array(items))
                    if matches!(key.kind, Kind::Tables) =>
                {
                    self.lists.insert(key.path, items.len());
                    for (index, (span, item)) in spans.iter().zip(items).enumerate() {
                        self.add_element(key, index, span, item, at);
                    }
                }
                (Some(key), _, value) => self.add(path, key, value.clone(), origin),
                (None, DeValue::Table(spans), Value::Table(table))
                    if pattern.is_empty() && keys::is_section(name) =>
                {
                    let prefix = format!("{name}.");
                    self.add_table(&prefix, &prefix, spans, table, at);
                }
                (None, _, _) if pattern.is_empty() && keys::is_section(name) => {
                    self.problem(
                        &path,
                        origin,
                        "is a section",
                        format!("write [{name}] above its keys"),
                    );
                }
                (None, _, _) => self.unknown(&path, &known, origin),
            }
        }
    }

    fn add_element(
        &mut self,
        list: &'static Key,
        index: usize,
        span: &Spanned<DeValue<'_>>,
        item: &Value,
        at: &dyn Fn(usize) -> Origin,
    ) {
        let path = format!("{}[{index}]", list.path);
        let origin = at(span.span().start);
        match (span.get_ref(), item) {
            (DeValue::Table(spans), Value::Table(table)) => {
                self.origins.insert(path.clone(), origin);
                self.add_table(&format!("{path}."), &format!("{}[].", list.path), spans, table, at);
            }
            (_, item) => {
                let action = format!("write [[{}]] above its keys", list.path);
                self.problem(&path, origin, format!("{item} is not a table"), action);
            }
        }
    }

    fn add_env(&mut self, env: impl Iterator<Item = (String, String)>) {
        // Sorted, so that the order of problems does not depend on the system.
        for (name, value) in env.collect::<BTreeMap<_, _>>() {
            let Some(rest) = name.strip_prefix(ENV_PREFIX) else { continue };
            let path = rest.to_ascii_lowercase().replace("__", ".");
            if value.contains(char::REPLACEMENT_CHARACTER) {
                let origin = Origin::Env(name);
                self.problem(&path, origin, "the value is not UTF-8 text", "correct the variable");
                continue;
            }
            self.add_text(&path, &value, Origin::Env(name));
        }
    }

    fn add_set(&mut self, text: &str) {
        let shown = match text.split_once('=') {
            Some((path, _)) if is_secret(path.trim()) => format!("{}=(hidden)", path.trim()),
            Some(_) | None => text.to_owned(),
        };
        let origin = Origin::Set(shown);
        match text.split_once('=') {
            Some((path, value)) => self.add_text(path.trim(), value.trim(), origin),
            None => self.problem(text, origin, "there is no =", "write --set section.key=value"),
        }
    }

    /// Adds a value given as text: a TOML value, or else the text itself.
    fn add_text(&mut self, path: &str, text: &str, origin: Origin) {
        let list = path.split(['.', '[']).next().and_then(keys::find);
        if let Some(list) = list.filter(|key| matches!(key.kind, Kind::Tables)) {
            self.problem(
                path,
                origin,
                format!("the list {} can only be set in the file", list.path),
                "put it into the file given by --config",
            );
            return;
        }
        let Some(key) = keys::find(path) else {
            if keys::is_section(path) {
                let action = format!("set one of its keys, as in {path}.key");
                return self.problem(path, origin, "is a section", action);
            }
            return self.unknown(path, path, origin);
        };
        let value = match (text.parse::<Value>(), key.kind) {
            (Ok(value @ Value::String(_)), _) => value,
            (Ok(value), Kind::Bool | Kind::Integer { .. } | Kind::Addresses | Kind::Tables) => {
                value
            }
            // `--set cluster_id=1234` means the text, as a shell user expects.
            (
                Ok(_),
                Kind::Text
                | Kind::Secret
                | Kind::Name { .. }
                | Kind::Choice(_)
                | Kind::Duration { .. }
                | Kind::Address
                | Kind::Listen,
            )
            | (Err(_), _) => Value::String(text.to_owned()),
        };
        self.add(path.to_owned(), key, value, origin);
    }

    fn add(&mut self, path: String, key: &Key, value: Value, origin: Origin) {
        if let Err((problem, action)) = check::value(&key.kind, &value) {
            self.problem(&path, origin.clone(), problem, action);
        }
        // Kept even when wrong: it is then not reported as missing as well.
        self.values.insert(path.clone(), value);
        self.origins.insert(path, origin);
    }

    fn unknown(&mut self, path: &str, pattern: &str, origin: Origin) {
        let action = match keys::nearest(pattern) {
            Some(key) => format!("did you mean `{key}`?"),
            None => "`tombolo config example` lists all keys".to_owned(),
        };
        self.problem(path, origin, "unknown key", action);
    }

    fn problem(
        &mut self,
        key: &str,
        origin: Origin,
        problem: impl Into<String>,
        action: impl Into<String>,
    ) {
        let (key, origin) = (key.to_owned(), Some(origin));
        self.problems.push(Problem { key, origin, problem: problem.into(), action: action.into() });
    }

    fn finish(mut self) -> Result<Loaded, ConfigError> {
        self.report_missing();
        self.problems.sort_by_key(|problem| match problem.origin {
            Some(Origin::File { line, column, .. }) => (line, column),
            Some(Origin::Default | Origin::Env(_) | Origin::Set(_) | Origin::Flag(_)) | None => {
                (usize::MAX, usize::MAX)
            }
        });
        if !self.problems.is_empty() {
            return Err(ConfigError::Invalid(self.problems));
        }
        self.derive_catalog_home();
        let config = Config::deserialize(self.to_value()).map_err(|error| {
            // Unreachable as long as every kind of KEYS fits the field of `Config`; the tests load
            // each key. Still an error and not a panic: the operator can act on the message.
            let (key, problem) = ("configuration".to_owned(), error.message().replace('\n', ", "));
            let action = "correct the value it names".to_owned();
            ConfigError::Invalid(vec![Problem { key, origin: None, problem, action }])
        })?;
        let problems = check::relations(&config, &|path| self.origins.get(path).cloned());
        if !problems.is_empty() {
            return Err(ConfigError::Invalid(problems));
        }
        Ok(Loaded { config, values: self.values, origins: self.origins })
    }

    fn report_missing(&mut self) {
        for key in KEYS.iter().filter(|key| matches!(key.preset, Preset::Required(_))) {
            if key.path.contains("[]") || self.values.contains_key(key.path) {
                continue;
            }
            let Some(&len) = self.lists.get(key.path) else {
                let action = if matches!(key.kind, Kind::Tables) {
                    format!("add [[{}]] tables to the file given by --config", key.path)
                } else {
                    format!("give {}", key.kind.describe())
                };
                let (key, problem) = (key.path.to_owned(), "is missing".to_owned());
                self.problems.push(Problem { key, origin: None, problem, action });
                continue;
            };
            for index in 0..len {
                let element = format!("{}[{index}]", key.path);
                // An element that is not a table was reported when it was read.
                let Some(origin) = self.origins.get(&element).cloned() else { continue };
                for (field, kind) in keys::fields(key.path) {
                    let path = format!("{element}.{field}");
                    if !self.values.contains_key(&path) {
                        let action = format!("give {}", kind.describe());
                        self.problem(&path, origin.clone(), "is missing", action);
                    }
                }
            }
        }
    }

    fn derive_catalog_home(&mut self) {
        if self.values.contains_key("catalog.home") {
            return;
        }
        let len = self.lists.get("regions").copied().unwrap_or_default();
        let lowest = (0..len).min_by_key(|index| {
            self.values.get(&format!("regions[{index}].number")).and_then(Value::as_integer)
        });
        let name = match lowest {
            Some(index) => self.values.get(&format!("regions[{index}].name")),
            None => self.values.get("region"),
        };
        if let Some(name) = name.cloned() {
            self.values.insert("catalog.home".to_owned(), name);
            self.origins.insert("catalog.home".to_owned(), Origin::Default);
        }
    }

    /// The nested table that [`Config`] is deserialized from.
    fn to_value(&self) -> Value {
        let mut root = Table::new();
        for key in KEYS.iter().filter(|key| !key.path.contains("[]")) {
            if let Some(value) = self.values.get(key.path) {
                match key.path.split_once('.') {
                    Some((section, name)) => {
                        let section =
                            root.entry(section).or_insert_with(|| Value::Table(Table::new()));
                        if let Value::Table(section) = section {
                            section.insert(name.to_owned(), value.clone());
                        }
                    }
                    None => drop(root.insert(key.path.to_owned(), value.clone())),
                }
            }
            if let Some(&len) = self.lists.get(key.path) {
                let element = |index: usize| {
                    keys::fields(key.path)
                        .filter_map(|(field, _)| {
                            let path = format!("{}[{index}].{field}", key.path);
                            Some((field.to_owned(), self.values.get(&path)?.clone()))
                        })
                        .collect::<Table>()
                };
                let list = (0..len).map(|index| Value::Table(element(index))).collect();
                root.insert(key.path.to_owned(), Value::Array(list));
            }
        }
        Value::Table(root)
    }
}

/// Line and column of a byte offset, both from 1; columns are characters.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}
