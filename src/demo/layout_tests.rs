//! Claims of the layout.

use super::*;

fn shape() -> Shape {
    Shape {
        cluster_id: "demo-00beef".into(),
        regions: vec!["us".into(), "eu".into()],
        nodes: 2,
        shards: 4,
        base_port: 7101,
    }
}

fn proxies() -> Proxies {
    let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    Proxies::from([
        (("us".into(), "eu".into()), vec![address(40_001), address(40_002)]),
        (("eu".into(), "us".into()), vec![address(40_003), address(40_004)]),
    ])
}

#[test]
fn nodes_take_four_ports_in_a_row_region_by_region() {
    let layout = Layout::plan(Path::new("/demo"), shape());

    let ports: Vec<_> = layout
        .nodes
        .iter()
        .map(|n| (&*n.name, n.client.port(), n.raft.port(), n.link.port(), n.http.port()))
        .collect();
    assert_eq!(
        ports,
        [
            ("us-1", 7101, 7102, 7103, 7104),
            ("us-2", 7105, 7106, 7107, 7108),
            ("eu-1", 7109, 7110, 7111, 7112),
            ("eu-2", 7113, 7114, 7115, 7116),
        ]
    );
}

#[test]
fn a_config_is_toml_that_reaches_the_own_region_directly_and_others_through_proxies() {
    let layout = Layout::plan(Path::new("/demo"), shape());

    let text = layout.config(&layout.nodes[3], &proxies()).unwrap();
    let config: toml::Table = toml::from_str(&text).unwrap();

    assert_eq!(config["cluster_id"].as_str(), Some("demo-00beef"));
    assert_eq!(config["region"].as_str(), Some("eu"));
    assert_eq!(config["node_id"].as_integer(), Some(2));
    assert_eq!(config["shards"].as_integer(), Some(4));
    assert_eq!(config["data_dir"].as_str(), Some("/demo/eu-2/data"));
    assert_eq!(config["listen"]["client"].as_str(), Some("127.0.0.1:7113"));
    assert_eq!(config["nodes"].as_array().unwrap().len(), 2);
    assert_eq!(config["nodes"][1]["http"].as_str(), Some("127.0.0.1:7116"));
    assert_eq!(config["catalog"]["home"].as_str(), Some("us"));
    let link = |region: usize| {
        let addresses = config["regions"][region]["link"].as_array().unwrap().iter();
        addresses.map(|a| a.as_str().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(config["regions"][1]["number"].as_integer(), Some(2));
    assert_eq!(link(0), ["127.0.0.1:40003", "127.0.0.1:40004"]);
    assert_eq!(link(1), ["127.0.0.1:7111", "127.0.0.1:7115"]);
}

#[test]
fn every_node_gets_its_config_file() {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::plan(directory.path(), shape());

    layout.write_configs(&proxies()).unwrap();

    for node in &layout.nodes {
        let text = std::fs::read_to_string(node.config_path()).unwrap();
        toml::from_str::<toml::Table>(&text).unwrap();
    }
}

#[test]
fn a_directory_keeps_a_key_of_its_own_that_nobody_else_may_read() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let wanted = Wanted { nodes: Some(1), ..Wanted::default() };

    let layout = Layout::decide(directory.path(), &wanted).unwrap();
    let path = layout.cluster_key_file.clone().unwrap();
    let key = std::fs::read_to_string(&path).unwrap();
    Layout::decide(directory.path(), &wanted).unwrap();

    assert_eq!(key.trim().len(), 64);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), key, "made once");
    let config: toml::Table =
        toml::from_str(&layout.config(&layout.nodes[0], &proxies()).unwrap()).unwrap();
    assert_eq!(config["cluster_key_file"].as_str(), path.to_str());
}

#[test]
fn a_directory_keeps_its_shape_and_refuses_another() {
    let directory = tempfile::tempdir().unwrap();
    let wanted = Wanted { nodes: Some(1), shards: Some(2), ..Wanted::default() };

    let made = Layout::decide(directory.path(), &wanted).unwrap();
    let found = Layout::decide(directory.path(), &Wanted::default()).unwrap();
    let other = Wanted { shards: Some(3), ..Wanted::default() };
    let refused = Layout::decide(directory.path(), &other).unwrap_err().to_string();

    assert_eq!(made.shape.regions, ["us", "eu", "ap"]);
    assert_eq!(found.shape, made.shape);
    assert!(refused.contains("shards 2, not 3"), "{refused}");
}

#[test]
fn a_damaged_shape_file_is_named() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("demo.json"), "{").unwrap();

    let error = Layout::decide(directory.path(), &Wanted::default()).unwrap_err().to_string();

    assert!(error.contains("demo.json is damaged"), "{error}");
}

#[test]
fn a_taken_port_is_named_with_the_node_that_needs_it() {
    let directory = tempfile::tempdir().unwrap();
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port();
    let wanted = Wanted {
        regions: Some(vec!["us".into()]),
        nodes: Some(1),
        base_port: Some(port),
        ..Wanted::default()
    };

    let error = Layout::decide(directory.path(), &wanted).unwrap_err().to_string();

    assert!(error.contains(&port.to_string()) && error.contains("us-1"), "{error}");
}

#[test]
fn shapes_that_cannot_run_are_refused() {
    let refuse = |change: fn(&mut Shape)| {
        let mut shape = shape();
        change(&mut shape);
        check(&shape).unwrap_err().to_string()
    };

    assert!(refuse(|s| s.regions.clear()).contains("regions"));
    assert!(refuse(|s| s.regions[0] = "us-east".into()).contains("`us-east`"));
    assert!(refuse(|s| s.regions[0] = "eu".into()).contains("twice"));
    assert!(refuse(|s| s.nodes = 0).contains("nodes"));
    assert!(refuse(|s| s.shards = 2000).contains("shards"));
    assert!(refuse(|s| s.base_port = 65_530).contains("ports"));
}
