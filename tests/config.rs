//! Configuration: layers, origins, and what an operator is told about mistakes.

use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tombolo::config::{
    Config, ConfigError, FlagValue, KEYS, Kind, Loaded, LogFormat, Origin, Preset, render_markdown,
};

const MINIMAL: &str = r#"cluster_id = "demo"
region = "us"
node_id = 1
data_dir = "/data"

[[nodes]]
id = 1
client = "h1:1"
raft = "h1:2"
link = "h1:3"
http = "h1:4"

[[regions]]
name = "us"
number = 2
link = ["h1:3"]

[[regions]]
name = "eu"
number = 1
link = ["[::1]:3", "h2:3"]
"#;

struct File {
    dir: TempDir,
}

impl File {
    fn new(content: impl AsRef<[u8]>) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        std::fs::write(dir.path().join("t.toml"), content).expect("the file is written");
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("t.toml")
    }

    fn load(&self, env: &[(&str, &str)], sets: &[&str]) -> Result<Loaded, ConfigError> {
        self.load_with_flags(env, sets, &[])
    }

    fn load_with_flags(
        &self,
        env: &[(&str, &str)],
        sets: &[&str],
        flags: &[FlagValue],
    ) -> Result<Loaded, ConfigError> {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let sets: Vec<String> = sets.iter().map(|text| (*text).to_owned()).collect();
        Config::load(Some(&self.path()), env, &sets, flags)
    }

    /// The error's lines, with the directory of the file left out.
    fn errors(&self, env: &[(&str, &str)], sets: &[&str]) -> Vec<String> {
        let error = self.load(env, sets).expect_err("the configuration is wrong").to_string();
        let dir = format!("{}/", self.dir.path().display());
        error.replace(&dir, "").lines().map(str::to_owned).collect()
    }
}

fn errors_of(content: &str) -> Vec<String> {
    File::new(content).errors(&[], &[])
}

/// What is said when `from` in the minimal file is replaced by `to`.
fn errors_after(from: &str, to: &str) -> Vec<String> {
    assert!(MINIMAL.contains(from), "{from}");
    errors_of(&MINIMAL.replacen(from, to, 1))
}

/// What is said when `--set` arguments are added to the minimal file.
fn errors_with(sets: &[&str]) -> Vec<String> {
    File::new(MINIMAL).errors(&[], sets)
}

#[test]
fn a_minimal_file_gets_the_documented_defaults() {
    let config = File::new(MINIMAL).load(&[], &[]).unwrap().config;

    assert_eq!(config.shards, 16);
    assert_eq!(config.listen.http, "127.0.0.1:7104");
    assert_eq!(config.catalog.home, "eu", "the region with the lowest number");
    assert_eq!(config.raft.heartbeat_interval, Duration::from_millis(200));
    assert_eq!(config.raft.election_timeout_min, Duration::from_millis(800));
    assert_eq!(config.raft.election_timeout_max, Duration::from_millis(1200));
    assert!(!config.raft.lease_reads);
    assert_eq!(config.raft_log.segment_bytes, 64 << 20);
    assert_eq!(config.raft_log.cache_bytes, 64 << 20);
    assert_eq!(config.raft_log.retain_bytes, 256 << 20);
    assert_eq!(config.storage.block_cache_bytes, 32 << 20);
    assert_eq!(config.storage.memtable_bytes, 32 << 20);
    assert_eq!(config.storage.flush_interval, Duration::from_secs(300));
    assert_eq!(config.storage.flush_log_bytes, 128 << 20);
    assert_eq!(config.replication.max_batch_bytes, 1 << 20);
    assert_eq!(config.replication.in_flight_bytes, 4 << 20);
    assert_eq!(config.replication.retry_min, Duration::from_millis(100));
    assert_eq!(config.replication.retry_max, Duration::from_secs(5));
    assert_eq!(config.replication.watchdog, Duration::from_secs(30));
    assert_eq!(config.limits.max_value_bytes, 1 << 20);
    assert_eq!(config.limits.max_message_bytes, 4 << 20);
    assert_eq!(config.limits.default_deadline, Duration::from_secs(5));
    assert_eq!(config.limits.max_in_flight, 4096);
    assert_eq!(config.drain.initial_wait, Duration::ZERO);
    assert_eq!(config.drain.timeout, Duration::from_secs(10));
    assert_eq!(config.log.format, LogFormat::Auto);
    assert_eq!(config.log.filter, "info");
    assert_eq!(config.clock.max_offset, Duration::from_millis(500));
    assert_eq!(config.own_node().unwrap().raft, "h1:2");
    assert_eq!(config.own_region().unwrap().number, 2);
    assert_eq!(config.regions[1].link, ["[::1]:3", "h2:3"]);
}

#[test]
fn the_example_loads_and_names_every_key_with_its_default() {
    let example = Config::example();
    let from_example = File::new(&example).load(&[], &[]).unwrap();

    for key in KEYS {
        let name = key.path.rsplit('.').next().unwrap();
        let line = match (key.kind, key.preset) {
            (Kind::Tables, _) => format!("[[{name}]]"),
            (_, Preset::Default(value)) => format!("#{name} = {value}"),
            (_, Preset::Required(value)) => format!("{name} = {value}"),
            (_, Preset::Derived(_)) => format!("#{name} = "),
            (_, Preset::Optional(_, example)) => format!("# {name} = {example}"),
        };
        assert!(example.lines().any(|found| found.starts_with(&line)), "{line}");
    }

    // With the comment signs of the values removed it says the same.
    let explicit: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
            Some(_) | None => format!("{line}\n"),
        })
        .collect();
    let from_explicit = File::new(explicit).load(&[], &[]).unwrap();
    assert_eq!(from_explicit.config, from_example.config);
    assert!(matches!(from_explicit.origin("clock.max_offset"), Some(Origin::File { .. })));
}

#[test]
fn each_layer_overrides_the_one_before_and_is_named_as_the_origin() {
    let file = File::new(MINIMAL.replace("node_id = 1", "node_id = 1\nshards = 2"));
    let env = ("TOMBOLO__SHARDS", "3");
    let flag = FlagValue { flag: "--shards", key: "shards", value: "5".into() };
    let check = |loaded: Loaded, shards: u16, origin: &Origin| {
        assert_eq!((loaded.config.shards, loaded.origin("shards")), (shards, Some(origin)));
    };

    let line = Origin::File { path: file.path(), line: 4, column: 1 };
    check(file.load(&[], &[]).unwrap(), 2, &line);
    check(file.load(&[env], &[]).unwrap(), 3, &Origin::Env("TOMBOLO__SHARDS".into()));
    check(file.load(&[env], &["shards=4"]).unwrap(), 4, &Origin::Set("shards=4".into()));
    let all = file.load_with_flags(&[env], &["shards=4"], &[flag]).unwrap();
    check(all, 5, &Origin::Flag("--shards".into()));

    let untouched = file.load(&[], &[]).unwrap();
    assert_eq!(untouched.origin("log.filter"), Some(&Origin::Default));
    let element = Origin::File { path: file.path(), line: 8, column: 1 };
    assert_eq!(untouched.origin("nodes[0].id"), Some(&element));
}

#[test]
fn env_and_set_take_toml_values_or_plain_text() {
    let env = [
        ("TOMBOLO__RAFT__LEASE_READS", "true"),
        ("TOMBOLO__RAFT_LOG__SEGMENT_BYTES", "33554432"),
        ("TOMBOLO__CLUSTER_ID", "\"quoted\""),
        ("TOMBOLO_ENDPOINT", "not for the server"),
        ("PATH", "/bin"),
    ];
    let sets = ["log.filter=info,tombolo=debug", "data_dir=2026", "drain.timeout = 3s"];

    let config = File::new(MINIMAL).load(&env, &sets).unwrap().config;

    assert!(config.raft.lease_reads);
    assert_eq!(config.raft_log.segment_bytes, 32 << 20);
    assert_eq!(config.cluster_id, "quoted");
    assert_eq!(config.log.filter, "info,tombolo=debug");
    assert_eq!(config.data_dir, Path::new("2026"));
    assert_eq!(config.drain.timeout, Duration::from_secs(3));
}

#[test]
fn show_loads_again_and_names_origins() {
    let file = File::new(MINIMAL);
    let env = [("TOMBOLO__LOG__FORMAT", "json")];
    let loaded = file.load(&env, &["shards=8"]).unwrap();

    let shown = loaded.show(true).replace(&format!("{}/", file.dir.path().display()), "");

    let squeezed: Vec<String> =
        shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for line in [
        "cluster_id = \"demo\" # t.toml:1",
        "shards = 8 # --set",
        "log.format = \"json\" # env TOMBOLO__LOG__FORMAT",
        "log.filter = \"info\" # default",
        "catalog.home = \"eu\" # default",
        "[[nodes]]",
        "client = \"h1:1\" # t.toml:8",
        "number = 1 # t.toml:20",
        "link = [\"[::1]:3\", \"h2:3\"] # t.toml:21",
    ] {
        assert!(squeezed.iter().any(|found| found == line), "{line} is not in:\n{shown}");
    }
    let plain = loaded.show(false);
    assert!(!plain.contains('#'), "{plain}");
    for text in [shown, plain] {
        assert_eq!(File::new(text).load(&[], &[]).unwrap().config, loaded.config);
    }
}

#[test]
fn secrets_are_neither_shown_nor_logged_nor_part_of_an_error() {
    let secret = "correct horse battery staple";
    let set = format!("cluster_key={secret}");
    let loaded = File::new(MINIMAL).load(&[], &[&set]).unwrap();
    assert_eq!(loaded.config.cluster_key.as_ref().unwrap().expose(), secret);
    for shown in [loaded.show(true), loaded.show(false), format!("{:?}", loaded.config)] {
        assert!(!shown.contains("staple"), "{shown}");
    }
    let again = File::new(loaded.show(false)).errors(&[], &[]);
    let refused = "the value, which is not shown, is not accepted; give a string of at least 16 \
                   bytes, kept secret";
    assert_eq!(again, [format!("t.toml:2:1: cluster_key: {refused}")]);
    assert_eq!(
        errors_with(&["cluster_key=short"]),
        [format!("--set cluster_key=(hidden): cluster_key: {refused}")]
    );
}

#[test]
fn the_cluster_key_has_one_source() {
    let key = "cluster_key=0123456789abcdef";
    assert_eq!(
        errors_with(&[key, "cluster_key_file=/etc/key"]),
        ["--set cluster_key_file=/etc/key: cluster_key_file: cluster_key is set as well; \
         keep one of the two, preferably the file"]
    );
    assert_eq!(
        errors_with(&["accepted_cluster_key=0123456789abcdef"]),
        [
            "--set accepted_cluster_key=(hidden): accepted_cluster_key: there is no cluster_key beside \
         it; set cluster_key, or put both into the file, one a line"
        ]
    );
    assert!(File::new(MINIMAL).load(&[], &[key, "accepted_cluster_key=fedcba9876543210"]).is_ok());
}

#[test]
fn unknown_keys_are_named_with_their_place_and_the_nearest_key() {
    let file = format!(
        "regon = \"x\"\nmax_value_bytes = 1\nzzzzzzzzzzzz = 1\n{MINIMAL}numbr = \"x\"\n\
         [raft]\nlease_reads = true\n  heartbeat_intervall = \"1s\"\n[storge]\na = 1\n"
    );

    assert_eq!(
        errors_of(&file),
        [
            "t.toml:1:1: regon: unknown key; did you mean `region`?",
            "t.toml:2:1: max_value_bytes: unknown key; did you mean `limits.max_value_bytes`?",
            "t.toml:3:1: zzzzzzzzzzzz: unknown key; `tombolo config example` lists all keys",
            "t.toml:25:1: regions[1].numbr: unknown key; did you mean `regions[].number`?",
            "t.toml:28:3: raft.heartbeat_intervall: unknown key; \
             did you mean `raft.heartbeat_interval`?",
            "t.toml:29:2: storge: unknown key; did you mean `storage`?",
        ]
    );
}

#[test]
fn unknown_keys_in_env_and_set_are_errors_too() {
    let env = [("TOMBOLO__RAFT__LEASE_READ", "true"), ("TOMBOLO__X", "1")];

    assert_eq!(
        File::new(MINIMAL).errors(&env, &["shard=2", "raft", "raft=1"]),
        [
            "env TOMBOLO__RAFT__LEASE_READ: raft.lease_read: unknown key; \
             did you mean `raft.lease_reads`?",
            "env TOMBOLO__X: x: unknown key; `tombolo config example` lists all keys",
            "--set shard=2: shard: unknown key; did you mean `shards`?",
            "--set raft: raft: there is no =; write --set section.key=value",
            "--set raft=1: raft: is a section; set one of its keys, as in raft.key",
        ]
    );
}

#[test]
fn lists_of_tables_belong_into_the_file() {
    let env = [("TOMBOLO__NODES", "[]"), ("TOMBOLO__REGIONS__0__NAME", "us")];

    assert_eq!(
        File::new(MINIMAL).errors(&env, &["nodes=[]"]),
        [
            "env TOMBOLO__NODES: nodes: the list nodes can only be set in the file; \
             put it into the file given by --config",
            "env TOMBOLO__REGIONS__0__NAME: regions.0.name: the list regions can only be set in \
             the file; put it into the file given by --config",
            "--set nodes=[]: nodes: the list nodes can only be set in the file; \
             put it into the file given by --config",
        ]
    );
}

#[test]
fn values_that_are_not_utf8_are_refused() {
    assert_eq!(
        File::new(MINIMAL).errors(&[("TOMBOLO__DATA_DIR", "/d\u{fffd}ta")], &[]),
        ["env TOMBOLO__DATA_DIR: data_dir: the value is not UTF-8 text; correct the variable"]
    );
}

#[test]
fn damaged_files_have_their_own_errors() {
    let missing = Config::load(Some(Path::new("/no/such.toml")), std::iter::empty(), &[], &[]);
    let message = missing.unwrap_err().to_string();
    assert!(
        message.starts_with("/no/such.toml: cannot read the configuration file: No such file"),
        "{message}"
    );

    assert_eq!(
        File::new(b"cluster_id = \"a\"\nregion = \"\xff\xfe\"").errors(&[], &[]),
        ["t.toml:2:11: the file is not UTF-8 text; it may be damaged or of another kind"]
    );
    assert_eq!(
        errors_of(" \n"),
        ["t.toml:1:1: the file is empty; `tombolo config example` prints one to start from"]
    );
    let cut = &MINIMAL[..MINIMAL.len() - 4];
    let message = errors_of(cut).join("\n");
    assert!(message.starts_with("t.toml:21:") && message.contains("is it cut off?"), "{message}");
    let message = errors_of("a = = 1\n").join("\n");
    assert!(message.starts_with("t.toml:1:5: "), "{message}");
    let message = errors_of("shards = 1\nshards = 2\n").join("\n");
    assert!(message.starts_with("t.toml:2:1: ") && message.contains("duplicate"), "{message}");
    let message = errors_of("\0\0\0\0").join("\n");
    assert_eq!(
        message,
        "t.toml:1:1: the file holds a NUL byte; it may be damaged or of another kind"
    );
    let message = errors_of("shards = 99999999999999999999\n").join("\n");
    assert!(message.starts_with("t.toml:1:10: "), "{message}");
}

#[test]
fn every_truncation_of_a_file_is_an_error_or_loads_and_never_panics() {
    for end in 0..MINIMAL.len() {
        let outcome = File::new(&MINIMAL[..end]).load(&[], &[]);
        assert!(outcome.is_err() || MINIMAL[..end].contains("name = \"us\""), "{end}");
    }
}

#[test]
fn missing_keys_are_all_named() {
    let none = Config::load(None, std::iter::empty(), &[], &[]).unwrap_err().to_string();
    assert_eq!(
        none.lines().collect::<Vec<_>>(),
        [
            "cluster_id: is missing; give 1 to 64 characters of a-z, 0-9 and -",
            "region: is missing; give 1 to 32 characters of a-z, 0-9 and -",
            "node_id: is missing; give a whole number from 1 to 4294967295",
            "data_dir: is missing; give a string that is not empty",
            "nodes: is missing; add [[nodes]] tables to the file given by --config",
            "regions: is missing; add [[regions]] tables to the file given by --config",
        ]
    );
    assert_eq!(
        errors_after("raft = \"h1:2\"\n", ""),
        ["t.toml:6:1: nodes[0].raft: is missing; give an address host:port"]
    );
}

#[test]
fn a_value_of_the_wrong_kind_or_size_is_shown_with_what_is_wanted() {
    for (set, expected) in [
        ("cluster_id=Demo", "\"Demo\" is not accepted; give 1 to 64 characters of a-z, 0-9 and -"),
        ("region=", "\"\" is not accepted; give 1 to 32 characters of a-z, 0-9 and -"),
        ("data_dir=", "\"\" is not accepted; give a string that is not empty"),
        ("node_id=0", "0 is not accepted; give a whole number from 1 to 4294967295"),
        ("node_id=us-1", "\"us-1\" is not accepted; give a whole number from 1 to 4294967295"),
        ("shards=0", "0 is not accepted; give a whole number from 1 to 1024"),
        ("shards=1025", "1025 is not accepted; give a whole number from 1 to 1024"),
        ("raft.lease_reads=yes", "\"yes\" is not accepted; give true or false"),
        ("log.format=xml", "\"xml\" is not accepted; give one of auto, text, json"),
        (
            "raft_log.segment_bytes=4096",
            "4096 is not accepted; give a whole number from 1048576 to 4294967296",
        ),
        (
            "drain.timeout=10",
            "\"10\" is not accepted; give a duration from 100ms to 1h, such as \"200ms\" or \"5s\"",
        ),
        (
            "clock.max_offset=0s",
            "\"0s\" is not accepted; give a duration from 1ms to 1h, such as \"200ms\" or \"5s\"",
        ),
        (
            "listen.raft=7102",
            "\"7102\" is not accepted; give an address host:port (port 0: any free port), such as \
             \"10.0.0.5:7101\" or \"[::1]:7101\"",
        ),
    ] {
        let key = set.split_once('=').unwrap().0;
        assert_eq!(errors_with(&[set]), [format!("--set {set}: {key}: {expected}")]);
    }
}

#[test]
fn addresses_need_a_host_and_a_port() {
    for bad in
        ["h", "h:", ":1", "h:0", "h:65536", "h:+1", "h h:1", "::1:1", "[::x]:1", "http://h:1"]
    {
        assert_eq!(
            errors_after("raft = \"h1:2\"", &format!("raft = \"{bad}\"")),
            [format!(
                "t.toml:9:1: nodes[0].raft: \"{bad}\" is not accepted; give an address host:port, \
                 such as \"10.0.0.5:7101\" or \"[::1]:7101\""
            )]
        );
    }
    for list in ["[]", "\"h1:3\"", "[\"h1\"]", "[1]"] {
        let message = errors_after("[\"h1:3\"]", list).join("\n");
        assert!(message.contains("give a list of at least one address host:port"), "{message}");
    }
    assert!(File::new(MINIMAL).load(&[], &["listen.http=0.0.0.0:0"]).is_ok());
}

#[test]
fn tables_in_the_wrong_shape_are_explained() {
    let single = MINIMAL.replacen("[[nodes]]", "[nodes]", 1);
    let message = errors_of(&single).join("\n");
    assert!(message.starts_with("t.toml:6:2: nodes: "), "{message}");
    assert!(message.contains("give a list of tables"), "{message}");

    assert_eq!(
        errors_of(&format!("raft = 1\n{MINIMAL}")),
        ["t.toml:1:1: raft: is a section; write [raft] above its keys"]
    );
    let scalars =
        MINIMAL.replace("[[regions]]", "[[r]]").replace("node_id", "regions = [7]\nnode_id");
    let message = errors_of(&scalars).join("\n");
    assert!(
        message.contains("regions[0]: 7 is not a table; write [[regions]] above its keys"),
        "{message}"
    );
}

#[test]
fn this_node_and_region_must_be_listed() {
    assert_eq!(
        errors_with(&["node_id=9"]),
        ["--set node_id=9: node_id: no [[nodes]] entry has id = 9; \
         add this node to [[nodes]] or correct node_id"]
    );
    assert_eq!(
        errors_with(&["region=ap"]),
        ["--set region=ap: region: no [[regions]] entry has name = \"ap\"; \
         add this region to [[regions]] or correct region"]
    );
    assert_eq!(
        errors_with(&["catalog.home=ap"]),
        ["--set catalog.home=ap: catalog.home: no [[regions]] entry has name = \"ap\"; \
         name one of the regions, the same in every node's file"]
    );
}

#[test]
fn nothing_is_listed_twice() {
    let second = "[[nodes]]\nid = 1\nclient = \"h1:1\"\nraft = \"h2:2\"\nlink = \"h2:3\"\n\
                  http = \"h2:4\"\n\n[[regions]]";
    assert_eq!(
        errors_after("[[regions]]", second),
        [
            "t.toml:14:1: nodes[1].id: 1 is already used by nodes[0].id; \
             give each node of the region its own id",
            "t.toml:15:1: nodes[1].client: h1:1 is already used by nodes[0].client; \
             give each node and each port its own address",
        ]
    );
    assert_eq!(
        errors_after("http = \"h1:4\"", "http = \"h1:1\""),
        ["t.toml:11:1: nodes[0].http: h1:1 is already used by nodes[0].client; \
         give each node and each port its own address"]
    );
    assert_eq!(
        errors_after("name = \"eu\"", "name = \"us\""),
        ["t.toml:19:1: regions[1].name: us is already used by regions[0].name; \
         give each region its own name"]
    );
    assert_eq!(
        errors_after("number = 1", "number = 2"),
        ["t.toml:20:1: regions[1].number: 2 is already used by regions[0].number; \
         give each region its own number"]
    );
    assert_eq!(
        errors_after("h2:3", "h1:3"),
        ["t.toml:21:1: regions[1].link: h1:3 is already used by regions[0].link; \
         list each link address once, in the region of its node"]
    );
    assert_eq!(
        errors_with(&["listen.http=127.0.0.1:7101"]),
        ["--set listen.http=127.0.0.1:7101: listen.http: 127.0.0.1:7101 is already used by \
         listen.client; bind each service to its own port"]
    );
}

#[test]
fn times_and_sizes_must_fit_together() {
    for (sets, expected) in [
        (
            ["raft.heartbeat_interval=300ms", "shards=1"],
            "default: raft.election_timeout_min: 800ms is less than three heartbeat intervals of \
             300ms; raise it or lower raft.heartbeat_interval: one late heartbeat must not start \
             an election",
        ),
        (
            ["raft.election_timeout_max=800ms", "shards=1"],
            "--set raft.election_timeout_max=800ms: raft.election_timeout_max: 800ms is not above \
             election_timeout_min of 800ms; raise it: the spread keeps nodes from standing for \
             election at the same moment",
        ),
        (
            ["raft_log.retain_bytes=1048576", "shards=1"],
            "--set raft_log.retain_bytes=1048576: raft_log.retain_bytes: 1048576 is less than \
             raft_log.segment_bytes of 67108864; keep one segment at least",
        ),
        (
            ["replication.in_flight_bytes=1024", "shards=1"],
            "--set replication.in_flight_bytes=1024: replication.in_flight_bytes: 1024 is less \
             than replication.max_batch_bytes of 1048576; allow one batch at least, or nothing is \
             ever sent",
        ),
        (
            ["replication.retry_max=10ms", "shards=1"],
            "--set replication.retry_max=10ms: replication.retry_max: 10ms is below \
             replication.retry_min of 100ms; raise it or lower retry_min",
        ),
        (
            ["limits.max_value_bytes=4194304", "shards=1"],
            "default: limits.max_message_bytes: 4194304 leaves no room for a value of \
             limits.max_value_bytes = 4194304; make it 65536 bytes larger than max_value_bytes at \
             least",
        ),
        (
            ["log.filter=inof", "shards=1"],
            "--set log.filter=inof: log.filter: log filter directive `inof` is not valid: write a \
             level (off, error, warn, info, debug, trace) or target=level; write it as \
             \"info,tombolo_replication=debug\"",
        ),
    ] {
        assert_eq!(errors_with(&sets), [expected]);
    }
}

#[test]
fn the_reference_page_matches_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operate/config.md");
    let expected = render_markdown();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, expected).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "docs/operate/config.md is stale; run: UPDATE=1 cargo test --test config"
    );
}
