//! Regions that join a live cluster, are fenced and come back, or start with an old copy of their data.

use std::{collections::BTreeMap, path::Path};

use tombolo_client::{Client, Error, proto};

use crate::support::{Cluster, Member, values, wait_until};

/// Everything that a region holds of a namespace.
async fn held(client: &Client, namespace: &str) -> BTreeMap<Vec<u8>, Vec<Vec<u8>>> {
    values(client, namespace).await.into_iter().collect()
}

/// What a region says of one.
async fn region(client: &Client, name: &str) -> proto::Region {
    let regions = client.admin().list_regions().await.expect("regions").regions;
    regions.into_iter().find(|region| region.name == name).unwrap_or_default()
}

async fn wait_membership(client: &Client, name: &str, membership: proto::Membership) {
    let what = format!("{name} is {membership:?}");
    wait_until(&what, async || region(client, name).await.membership() == membership).await;
}

async fn wait_equal(one: &Client, other: &Client, namespace: &str) {
    wait_until("both hold the same", async || {
        let here = held(one, namespace).await;
        !here.is_empty() && here == held(other, namespace).await
    })
    .await;
}

async fn wait_no_tombstones(client: &Client) {
    wait_until("no tombstone is left", async || {
        let rows = client.admin().list_tombstones(None).await.expect("tombstones").tombstones;
        rows.iter().all(|row| row.count == 0)
    })
    .await;
}

fn reason(result: Result<impl Sized, Error>) -> String {
    match result {
        Ok(_) => "it was done".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Makes `name` a region that the others' configuration does not know, and that starts later.
fn comes_later(members: &mut [Member], name: &str) {
    for member in members {
        if member.config.region == name {
            member.is_late = true;
            member.config.join = true;
        } else {
            member.config.regions.retain(|region| region.name != name);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_joins_a_live_cluster_while_another_is_down() {
    let regions = [("us", 1), ("eu", 1), ("ap", 1)];
    let mut cluster =
        Cluster::start_prepared(&regions, 2, &[], async |members: &mut [Member]| {
            comes_later(members, "ap");
            members.iter_mut().for_each(|it| it.config.replication.change_log_bytes = 1 << 10);
        })
        .await;
    let us = cluster.client("us").await;
    us.admin().create_namespace("carts", proto::Rule::Siblings).await.unwrap();
    for number in 0..300 {
        for namespace in ["default", "carts"] {
            us.namespace(namespace).put(format!("k{number}"), "v").await.unwrap();
        }
    }
    wait_equal(&us, &cluster.client("eu").await, "carts").await;
    cluster.member("eu").stop().await;
    for number in 0..100 {
        us.namespace("default").delete(format!("k{number}")).await.unwrap();
    }

    cluster.member("ap").start().await;
    cluster.wait_ready().await;
    let address = cluster.member("ap").config.listen.link.clone();
    let patience = tombolo_client::ClientConfig {
        endpoints: cluster.addresses("ap"),
        deadline: std::time::Duration::from_secs(2),
        ..Default::default()
    };
    let ap = Client::connect(patience).await.unwrap();
    let refused = reason(ap.namespace("default").put("early", "v").await);
    assert!(refused.contains("REGION_SEEDING"), "{refused}");
    let refused = reason(ap.namespace("default").get("k200").await);
    assert!(refused.contains("REGION_SEEDING"), "{refused}");
    wait_until("the link says why it waits", async || {
        let links = ap.admin().list_links(None).await.unwrap().links;
        links.iter().any(|link| link.last_error.contains("ctl region add"))
    })
    .await;

    for (number, links, wrong) in [
        (0, vec![address.clone()], "number"),
        (1, vec![address.clone()], "us"),
        (3, vec![], "link"),
    ] {
        let refused = reason(us.admin().add_region("ap", number, links).await);
        assert!(refused.contains(wrong), "{refused}");
    }
    let added = us.admin().add_region("ap", 3, vec![address]).await.unwrap().unwrap();
    assert_eq!(added.membership(), proto::Membership::Joining);
    // Goes on writing meanwhile.
    let mut during = 0;
    while region(&us, "ap").await.membership() != proto::Membership::Active {
        us.namespace("default").put(format!("during{during}"), "v").await.unwrap();
        during += 1;
        assert!(during < 100_000, "ap never became active");
    }
    let ap = cluster.client("ap").await;
    ap.namespace("default").put("from ap", "v").await.unwrap();
    wait_until("what ap writes reaches us", async || {
        held(&us, "default").await.contains_key(&b"from ap"[..])
    })
    .await;
    for namespace in ["default", "carts"] {
        wait_equal(&us, &ap, namespace).await;
    }

    // It has never heard of ap, and its people have told it nothing.
    cluster.member("eu").start().await;
    cluster.wait_ready().await;
    let eu = cluster.client("eu").await;
    for namespace in ["default", "carts"] {
        wait_equal(&eu, &ap, namespace).await;
    }
    eu.namespace("default").delete("k200").await.unwrap();
    wait_until("what eu deletes is gone in ap", async || {
        !held(&ap, "default").await.contains_key(&b"k200"[..])
    })
    .await;
    for client in [&us, &eu, &ap] {
        wait_no_tombstones(client).await;
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fenced_region_holds_up_nothing_and_comes_back_without_what_it_wrote_alone() {
    let regions = [("us", 1), ("eu", 1), ("ap", 1)];
    let mut cluster = Cluster::start(&regions, 2).await;
    let us = cluster.client("us").await;
    for key in ["kept", "deleted", "overwritten"] {
        us.namespace("default").put(key, "before").await.unwrap();
    }
    let ap = cluster.client("ap").await;
    wait_equal(&us, &ap, "default").await;

    // Alone, in turn.
    cluster.member("us").stop().await;
    cluster.member("eu").stop().await;
    ap.namespace("default").put("alone", "only here").await.unwrap();
    ap.namespace("default").put("overwritten", "by ap").await.unwrap();
    ap.namespace("default").put("deleted", "by ap").await.unwrap();
    cluster.member("ap").stop().await;
    for name in ["us", "eu"] {
        cluster.member(name).start().await;
    }
    cluster.wait_ready().await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    us.namespace("default").delete("deleted").await.unwrap();
    wait_until("the tombstone waits for ap", async || {
        let rows = eu.admin().list_tombstones(None).await.unwrap().tombstones;
        rows.iter().any(|row| row.waits_for_regions.contains(&"ap".to_owned()))
    })
    .await;

    let refused = reason(us.admin().fence_region("us").await);
    assert!(refused.contains("another region"), "{refused}");
    us.admin().fence_region("ap").await.unwrap();
    for client in [&us, &eu] {
        wait_membership(client, "ap", proto::Membership::Fenced).await;
        wait_no_tombstones(client).await;
    }

    cluster.member("ap").start().await;
    cluster.wait_ready().await;
    let ap = cluster.client("ap").await;
    wait_membership(&ap, "ap", proto::Membership::Fenced).await;
    let refused = reason(ap.namespace("default").put("late", "v").await);
    assert!(refused.contains("REGION_FENCED"), "{refused}");
    us.admin().add_region("ap", 0, vec![]).await.unwrap();
    wait_membership(&us, "ap", proto::Membership::Active).await;
    assert_eq!(region(&ap, "ap").await.incarnation, 2);
    wait_equal(&us, &ap, "default").await;
    let here = held(&ap, "default").await;
    assert_eq!(here.keys().collect::<Vec<_>>(), [&b"kept"[..], b"overwritten"]);
    assert_eq!(here[&b"overwritten"[..]], [b"before".to_vec()]);

    let reviews = ap.admin().list_reviews(None, 0).await.unwrap().reviews;
    let of = |it: &proto::Review| (it.key.to_vec(), it.data.to_vec());
    let expected = [("alone", "only here"), ("deleted", "by ap"), ("overwritten", "by ap")];
    let expected =
        expected.map(|(key, value)| (key.as_bytes().to_vec(), value.as_bytes().to_vec()));
    assert_eq!(reviews.iter().map(of).collect::<Vec<_>>(), expected);
    ap.admin().dismiss_reviews("default", reviews).await.unwrap();
    assert!(ap.admin().list_reviews(None, 0).await.unwrap().reviews.is_empty());

    ap.namespace("default").put("new life", "v").await.unwrap();
    wait_equal(&eu, &ap, "default").await;
    cluster.stop().await;
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copied");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_with_an_old_disk_image_takes_no_write_until_it_is_recovered() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    eu.namespace("default").put("before", "v").await.unwrap();
    wait_equal(&us, &eu, "default").await;
    cluster.member("eu").stop().await;
    let dir = cluster.member("eu").config.data_dir.clone();
    let image = dir.with_extension("image");
    copy(&dir, &image);

    cluster.member("eu").start().await;
    cluster.wait_ready().await;
    let eu = cluster.client("eu").await;
    eu.namespace("default").put("after", "v").await.unwrap();
    eu.namespace("default").delete("before").await.unwrap();
    wait_equal(&us, &eu, "default").await;
    cluster.member("eu").stop().await;
    std::fs::remove_dir_all(&dir).unwrap();
    copy(&image, &dir);

    cluster.member("eu").start().await;
    cluster.wait_ready().await;
    let eu = cluster.client("eu").await;
    let refused = reason(eu.namespace("default").put("reused", "v").await);
    assert!(refused.contains("COUNTERS_WENT_BACK"), "{refused}");
    assert!(held(&us, "default").await.contains_key(&b"after"[..]));

    us.admin().recover_region("eu").await.unwrap();
    wait_membership(&us, "eu", proto::Membership::Active).await;
    assert_eq!(region(&eu, "eu").await.incarnation, 2);
    eu.namespace("default").put("reused", "not any more").await.unwrap();
    wait_equal(&us, &eu, "default").await;
    let keys: Vec<_> = held(&us, "default").await.into_keys().collect();
    assert_eq!(keys, [b"after".to_vec(), b"reused".to_vec()]);
    for client in [&us, &eu] {
        wait_no_tombstones(client).await;
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_lost_its_disks_comes_back_with_what_the_others_have() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    for number in 0..50 {
        eu.namespace("default").put(format!("k{number}"), "v").await.unwrap();
    }
    wait_equal(&us, &eu, "default").await;
    let member = cluster.member("eu");
    member.stop().await;
    std::fs::remove_dir_all(&member.config.data_dir).unwrap();
    member.config.join = true;
    member.start().await;
    cluster.wait_ready().await;
    us.namespace("default").delete("k7").await.unwrap();
    us.admin().recover_region("eu").await.unwrap();
    wait_membership(&us, "eu", proto::Membership::Active).await;
    let eu = cluster.client("eu").await;
    eu.namespace("default").put("again", "v").await.unwrap();
    wait_equal(&us, &eu, "default").await;
    assert_eq!(held(&us, "default").await.len(), 50);
    assert_eq!(region(&us, "eu").await.incarnation, 2);
    cluster.stop().await;
}

/// Its data is gone and nobody told it: as a new cluster of one it would use every identity again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_lost_its_disks_and_does_not_know_it_takes_no_write() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 1).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    eu.namespace("default").put("k", "v").await.unwrap();
    wait_equal(&us, &eu, "default").await;
    let member = cluster.member("eu");
    member.stop().await;
    std::fs::remove_dir_all(&member.config.data_dir).unwrap();
    member.start().await;
    cluster.wait_ready().await;
    let eu = cluster.client("eu").await;
    let refused = reason(eu.namespace("default").put("reused", "v").await);
    assert!(refused.contains("COUNTERS_WENT_BACK"), "{refused}");
    us.admin().recover_region("eu").await.unwrap();
    wait_membership(&us, "eu", proto::Membership::Active).await;
    wait_equal(&us, &eu, "default").await;
    cluster.stop().await;
}

/// Each was told that the other begins anew: data that both hold must not go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_regions_that_fenced_each_other_neither_drops_its_data() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 2).await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    us.namespace("default").put("both", "v").await.unwrap();
    wait_equal(&us, &eu, "default").await;
    for (here, there) in [("us", "eu"), ("eu", "us")] {
        cluster.member(there).stop().await;
        let client = cluster.client(here).await;
        client.admin().fence_region(there).await.unwrap();
        wait_membership(&client, there, proto::Membership::Fenced).await;
        client.admin().add_region(there, 0, vec![]).await.unwrap();
        cluster.member(here).stop().await;
        cluster.member(there).start().await;
        cluster.wait_ready().await;
    }
    cluster.member("eu").start().await;
    cluster.wait_ready().await;
    let (us, eu) = (cluster.client("us").await, cluster.client("eu").await);
    for client in [&us, &eu] {
        wait_until("the link says what is the matter", async || {
            let links = client.admin().list_links(None).await.unwrap().links;
            links.iter().any(|link| link.last_error.contains("give way"))
        })
        .await;
        assert!(held(client, "default").await.contains_key(&b"both"[..]));
        client.namespace("default").put("goes on", "v").await.unwrap();
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn to_join_means_nothing_for_a_region_that_has_data() {
    let mut cluster = Cluster::start(&[("us", 1), ("eu", 1)], 4).await;
    let us = cluster.client("us").await;
    us.namespace("default").put("k", "v").await.unwrap();
    let member = cluster.member("us");
    member.stop().await;
    member.config.join = true;
    member.start().await;
    cluster.wait_ready().await;
    let us = cluster.client("us").await;
    for number in 0..20 {
        us.namespace("default").put(format!("k{number}"), "v").await.unwrap();
    }
    wait_equal(&us, &cluster.client("eu").await, "default").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_without_others_recovers_by_itself() {
    let cluster = Cluster::start(&[("us", 1)], 2).await;
    let us = cluster.client("us").await;
    us.namespace("default").put("k", "v").await.unwrap();
    us.admin().recover_region("us").await.unwrap();
    wait_until("it takes writes in its second life", async || {
        let own = region(&us, "us").await;
        own.incarnation == 2 && own.membership() == proto::Membership::Active
    })
    .await;
    us.namespace("default").put("k2", "v").await.unwrap();
    assert_eq!(held(&us, "default").await.len(), 2);
    cluster.stop().await;
}
