//! The stops of the tour.
//!
//! Each function does one thing that a user may want to see before trusting this database, and
//! verifies it by reads in the regions. The list in [`all`] is the order; a step may use what
//! earlier ones left in [`Tour`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::future::try_join_all;
use tombolo_client::proto::{LinkPhase, Membership, Region, Rule, value};
use tombolo_client::{Client, ClientConfig, ConflictFilter, Consistency, Error, Written};

use super::load::Load;
use super::observe::{
    Content, PATIENCE, content, difference, eventually, holds_all, same_values, show, shows,
};
use super::{Site, Step, Tour};
use crate::demo::READY_PATIENCE;
use crate::guest::Guest;
use crate::layout::CHANGE_LOG_BYTES;
use crate::network::Cut;

/// Time for bytes to leak through a cut, if they could.
const LEAK_TIME: Duration = Duration::from_millis(500);
/// A region goes on writing this soon after it lost a leader.
const FAILOVER_PATIENCE: Duration = Duration::from_secs(15);
/// Acknowledgements that each writer must get after a fault: enough to touch every shard.
const ACKS_AFTER_FAULT: u64 = 20;
const WRITERS: usize = 8;
/// A region that has no data yet refuses, and its client tries again as long as this.
const GUEST_DEADLINE: Duration = Duration::from_secs(3);
/// Between two looks for a repair, which is short.
const POLL_PAUSE: Duration = Duration::from_millis(10);

pub(super) fn all() -> Vec<Step<Tour>> {
    fn step(
        title: &'static str,
        run: for<'c> fn(
            &'c mut Tour,
        ) -> futures::future::LocalBoxFuture<'c, anyhow::Result<String>>,
    ) -> Step<Tour> {
        Step { title, run }
    }
    vec![
        step("a write in one region is read in the others", |t| Box::pin(replicates(t))),
        step("a session token gives read-your-writes in any region", |t| Box::pin(session(t))),
        step("cut regions take writes; siblings keep both, a context resolves", |t| {
            Box::pin(siblings(t))
        }),
        step("cut regions take writes; last-writer-wins picks one winner everywhere", |t| {
            Box::pin(last_writer_wins(t))
        }),
        step("what lost is in the ledger of every region, and one restore puts it back", |t| {
            Box::pin(loser_comes_back(t))
        }),
        step("a counter that cut regions add to, and one resets, is exact", |t| {
            Box::pin(counts(t))
        }),
        step("what is deleted while regions are cut stays deleted", |t| Box::pin(deletes(t))),
        step("a region that fell off the change log takes over what differs", |t| {
            Box::pin(repairs(t))
        }),
        step("a region joins while the others work, and has everything", |t| {
            Box::pin(region_joins(t))
        }),
        step("an atomic commit arrives whole", |t| Box::pin(commits(t))),
        step("killing a leader under load loses no acknowledged write", |t| {
            Box::pin(kill_leader(t))
        }),
        step("kill -9 of every process at once loses no acknowledged write", |t| {
            Box::pin(kill_everything(t))
        }),
        step("all regions hold the same", |t| Box::pin(converged(t))),
    ]
}

async fn replicates(tour: &mut Tour) -> anyhow::Result<String> {
    let (home, others) = home_and_others(tour)?;
    let key = tour.key("greeting");
    let begun = Instant::now();
    Tour::default_keys(home)
        .put(&key, "hello")
        .await
        .with_context(|| format!("writing in {}", home.region))?;
    let written = begun.elapsed();
    let mut seen = Vec::new();
    for site in others {
        shows(site, &Tour::default_keys(site), &key, &["hello"]).await?;
        seen.push(format!("{} after {} ms", site.region, begun.elapsed().as_millis()));
    }
    tour.check_no_crash()?;
    Ok(format!(
        "written in {} in {} ms; seen in {}",
        home.region,
        written.as_millis(),
        seen.join(", ")
    ))
}

async fn session(tour: &mut Tour) -> anyhow::Result<String> {
    const ROUNDS: usize = 5;
    let (home, others) = home_and_others(tour)?;
    let mut slowest = Duration::ZERO;
    for round in 0..ROUNDS {
        for site in others {
            let key = tour.key(&format!("session-{}", site.region));
            let value = format!("round {round}");
            let session = home.client.session();
            Tour::default_keys(home).put(&key, &value).session(&session).await?;
            let begun = Instant::now();
            let got = Tour::default_keys(site)
                .get(&key)
                .consistency(Consistency::Causal)
                .session(&session)
                .deadline(PATIENCE)
                .await
                .with_context(|| format!("causal read in {}", site.region))?;
            slowest = slowest.max(begun.elapsed());
            ensure!(
                same_values(&got, &[&value]),
                "the first causal read of {key} in {} shows {}, not {value:?}",
                site.region,
                show(&got)
            );
        }
    }
    tour.check_no_crash()?;
    Ok(format!(
        "{} first reads in other regions saw the write at once; slowest {} ms",
        ROUNDS * others.len(),
        slowest.as_millis()
    ))
}

async fn siblings(tour: &mut Tour) -> anyhow::Result<String> {
    create_namespace(tour, &tour.siblings_namespace, Rule::Siblings).await?;
    let key = tour.key("cart");
    let (home, _) = home_and_others(tour)?;
    tour.sibling_keys(home).put(&key, "empty").await?;
    for site in &tour.sites {
        shows(site, &tour.sibling_keys(site), &key, &["empty"]).await?;
    }

    tour.cut();
    let slowest = write_on_both_sides(tour, &key, true).await?;
    tokio::time::sleep(LEAK_TIME).await;
    for (index, site) in tour.sites.iter().enumerate() {
        let own = value_of(site);
        let expected = if index < 2 { &*own } else { "empty" };
        let got = tour.sibling_keys(site).get(&key).await?;
        ensure!(
            same_values(&got, &[expected]),
            "while cut, {} shows {}, not {expected:?}",
            site.region,
            show(&got)
        );
    }

    tour.heal();
    let values = [value_of(&tour.sites[0]), value_of(&tour.sites[1])];
    for site in &tour.sites {
        shows(site, &tour.sibling_keys(site), &key, &[&values[0], &values[1]]).await?;
    }

    let resolver = tour.sites.last().context("no region")?;
    let both = tour.sibling_keys(resolver).get(&key).await?;
    tour.sibling_keys(resolver).put(&key, "both").context(&both.context).await?;
    for site in &tour.sites {
        shows(site, &tour.sibling_keys(site), &key, &["both"]).await?;
    }
    tour.check_no_crash()?;
    Ok(format!(
        "both writes acknowledged within {} ms while cut; after healing {} regions show both \
         versions; one write with their context, in {}, resolved them everywhere",
        slowest.as_millis(),
        tour.sites.len(),
        resolver.region
    ))
}

async fn last_writer_wins(tour: &mut Tour) -> anyhow::Result<String> {
    let key = tour.key("profile");
    tour.cut();
    let slowest = write_on_both_sides(tour, &key, false).await?;
    tokio::time::sleep(LEAK_TIME).await;
    for site in &tour.sites[..2] {
        let got = Tour::default_keys(site).get(&key).await?;
        ensure!(
            same_values(&got, &[&value_of(site)]),
            "while cut, {} shows {}",
            site.region,
            show(&got)
        );
    }

    tour.heal();
    let candidates = [value_of(&tour.sites[0]), value_of(&tour.sites[1])];
    let winner = eventually(PATIENCE, || async {
        let reads = tour.sites.iter().map(|site| async {
            let got = Tour::default_keys(site).get(&key).await;
            got.map_err(|error| format!("reading in {}: {error}", site.region))
        });
        let reads = try_join_all(reads).await?;
        let shown = || reads.iter().map(show).collect::<Vec<_>>().join(", ");
        let dots: Vec<_> = reads.iter().flat_map(|got| &got.versions).map(|v| v.dot).collect();
        let agreed = dots.len() == reads.len() && dots.windows(2).all(|pair| pair[0] == pair[1]);
        match reads.iter().find_map(|got| got.value()) {
            Some(value) if agreed => Ok(String::from_utf8_lossy(value).into_owned()),
            Some(_) | None => Err(format!("the regions show {}", shown())),
        }
    })
    .await?;
    ensure!(candidates.contains(&winner), "{winner:?} won, which nobody wrote");
    tour.check_no_crash()?;
    Ok(format!(
        "both writes acknowledged within {} ms while cut; after healing {} regions show {winner:?}",
        slowest.as_millis(),
        tour.sites.len()
    ))
}

/// Restores what lost in [`last_writer_wins`].
async fn loser_comes_back(tour: &mut Tour) -> anyhow::Result<String> {
    let key = tour.key("profile");
    let noted = try_join_all(tour.sites.iter().map(|site| {
        let filter = ConflictFilter { key_prefix: key.clone().into(), ..ConflictFilter::default() };
        eventually(PATIENCE, move || {
            let filter = filter.clone();
            async move {
                let ledger = site.client.conflicts("default");
                match ledger.list(&filter, 2).await {
                    Ok(list) if list.rows.len() == 1 => Ok(list.rows[0].id.clone()),
                    Ok(list) => {
                        Err(format!("{} lists {} conflicts, not 1", site.region, list.rows.len()))
                    }
                    Err(error) => Err(format!("listing in {}: {error}", site.region)),
                }
            }
        })
    }))
    .await?;
    let id = &noted[0];
    ensure!(noted.iter().all(|other| other == id), "the regions name it differently: {noted:?}");

    let (home, others) = home_and_others(tour)?;
    let ledger = home.client.conflicts("default");
    let shown = ledger.get(id).await?;
    let loser = shown.conflict.and_then(|conflict| conflict.loser).context("no loser is shown")?;
    let lost = match loser.value.and_then(|value| value.kind) {
        Some(value::Kind::Data(data)) => String::from_utf8_lossy(&data).into_owned(),
        other => bail!("the loser of {id} is shown as {other:?}"),
    };
    ledger.restore(id, shown.context).await?;
    shows(home, &Tour::default_keys(home), &key, &[&lost]).await?;
    for site in others {
        shows(site, &Tour::default_keys(site), &key, &[&lost]).await?;
    }
    tour.check_no_crash()?;
    Ok(format!(
        "conflict {id} in {} regions; after the restore in {} all show {lost:?}",
        noted.len(),
        home.region
    ))
}

async fn counts(tour: &mut Tour) -> anyhow::Result<String> {
    const ADDITIONS: i64 = 50;
    let namespace = format!("{}-counts", tour.prefix);
    create_namespace(tour, &namespace, Rule::Counter).await?;
    let keys = |site: &Site| site.client.namespace(namespace.clone());
    let shows_sum = |expected: i64| {
        let keys = &keys;
        try_join_all(tour.sites.iter().map(move |site| {
            eventually(PATIENCE, move || async move {
                match keys(site).get("visits").await {
                    Ok(got) if got.counter() == expected => Ok(()),
                    Ok(got) => {
                        Err(format!("{} counts {}, not {expected}", site.region, got.counter()))
                    }
                    Err(error) => Err(format!("reading in {}: {error}", site.region)),
                }
            })
        }))
    };

    tour.demo.network().partition_all();
    for site in &tour.sites {
        for number in 1..=ADDITIONS {
            let counted = keys(site).add("visits", 1).await?;
            ensure!(
                counted.sum == Some(number),
                "while cut, addition {number} in {} answered {:?}",
                site.region,
                counted.sum
            );
        }
    }
    tour.heal();
    let regions = i64::try_from(tour.sites.len())?;
    shows_sum(ADDITIONS * regions).await?;

    // One resets what it has seen; what the others add meanwhile stays.
    tour.demo.network().partition_all();
    let (home, others) = home_and_others(tour)?;
    keys(home).delete("visits").await?;
    for site in others {
        keys(site).add("visits", 7).await?;
    }
    tour.heal();
    shows_sum(7 * (regions - 1)).await?;
    tour.partitions += 2;
    tour.check_no_crash()?;
    Ok(format!(
        "{ADDITIONS} additions in each of {regions} cut regions make {}; after a reset in {} only what \
         it had not seen is left, {} everywhere",
        ADDITIONS * regions,
        tour.sites[0].region,
        7 * (regions - 1)
    ))
}

async fn deletes(tour: &mut Tour) -> anyhow::Result<String> {
    let key = tour.key("deleted");
    let (home, others) = home_and_others(tour)?;
    let home = home.clone();
    let others = others.to_vec();
    Tour::default_keys(&home).put(&key, "still here").await?;
    for site in &tour.sites {
        shows(site, &Tour::default_keys(site), &key, &["still here"]).await?;
    }

    tour.cut();
    Tour::default_keys(&home).delete(&key).await?;
    for site in &others {
        let keys = Tour::default_keys(site);
        keys.put(tour.key(&format!("bystander-{}", site.region)), "written while cut").await?;
        let got = keys.get(&key).await?;
        ensure!(
            same_values(&got, &["still here"]),
            "while cut, {} shows {}",
            site.region,
            show(&got)
        );
    }

    tour.heal();
    for site in &tour.sites {
        shows(site, &Tour::default_keys(site), &key, &[]).await?;
    }
    for site in &tour.sites {
        for other in &others {
            let bystander = tour.key(&format!("bystander-{}", other.region));
            shows(site, &Tour::default_keys(site), &bystander, &["written while cut"]).await?;
        }
        let got = Tour::default_keys(site).get(&key).await?;
        ensure!(got.versions.is_empty(), "it came back in {}: {}", site.region, show(&got));
    }
    tour.deleted.push(key);
    tour.check_no_crash()?;
    Ok(format!(
        "deleted in {} while {} regions still had it; gone in all after healing",
        home.region,
        others.len()
    ))
}

async fn repairs(tour: &mut Tour) -> anyhow::Result<String> {
    // Several times the change log's budget, in every shard.
    const WRITES: usize = 400;
    const VALUE_BYTES: usize = 8 << 10;
    let (home, others) = home_and_others(tour)?;
    let away = others.last().context("too few regions")?;
    let gone = tour.key("deleted-while-away");
    Tour::default_keys(home).put(&gone, "still here").await?;
    shows(away, &Tour::default_keys(away), &gone, &["still here"]).await?;

    tour.demo.network().isolate(&away.region, Cut::default())?;
    let mut written = BTreeMap::new();
    let keys = Tour::default_keys(home);
    for number in 0..WRITES {
        let value = format!("{number} ").repeat(VALUE_BYTES / 5);
        keys.put(tour.key(&format!("missed-{number}")), &value).await?;
        written.insert(tour.key(&format!("missed-{number}")), value);
    }
    keys.delete(&gone).await?;
    let alone = tour.key("written-while-away");
    Tour::default_keys(away).put(&alone, "kept").await?;
    eventually(PATIENCE, || async {
        let links = home.client.admin().list_links(Some(&away.region)).await;
        let links = links.map_err(|error| format!("links of {}: {error}", home.region))?.links;
        let kept: u64 = links.iter().map(|link| link.unacknowledged_bytes).sum();
        let shards = links.iter().filter(|link| link.namespace == "default").count() as u64;
        // Of at least 3 MB; the budget is for each shard and namespace.
        if kept <= (shards + 2) * CHANGE_LOG_BYTES {
            return Ok(());
        }
        Err(format!("the change log for {} still holds {kept} bytes", away.region))
    })
    .await?;

    let begun = Instant::now();
    tour.heal();
    let repaired = async {
        loop {
            let links = away.client.admin().list_links(None).await?.links;
            if links.iter().any(|link| link.phase() == LinkPhase::Repairing) {
                return anyhow::Ok(());
            }
            tokio::time::sleep(POLL_PAUSE).await;
        }
    };
    tokio::time::timeout(PATIENCE, repaired)
        .await
        .with_context(|| format!("no link of {} has repaired", away.region))??;
    holds_all(away, &Tour::default_keys(away), &written).await?;
    let took = begun.elapsed();
    for site in &tour.sites {
        shows(site, &Tour::default_keys(site), &gone, &[]).await?;
        shows(site, &Tour::default_keys(site), &alone, &["kept"]).await?;
    }
    let (home, away) = (home.region.clone(), away.region.clone());
    tour.partitions += 1;
    tour.deleted.push(gone);
    tour.check_no_crash()?;
    Ok(format!(
        "{home} wrote {WRITES} values and trimmed its change log while {away} was away; {away} had \
         them {:.1} s after healing, by repair; what was deleted stayed deleted, what {away} wrote \
         alone was kept",
        took.as_secs_f64()
    ))
}

async fn commits(tour: &mut Tour) -> anyhow::Result<String> {
    const COMMITS: usize = 10;
    const PARTS: usize = 3;
    let (home, others) = home_and_others(tour)?;
    for commit in 0..COMMITS {
        // The tag in braces puts all parts into one shard.
        let parts: Vec<String> =
            (0..PARTS).map(|part| tour.key(&format!("{{order-{commit}}}/part-{part}"))).collect();
        let mut request = Tour::default_keys(home).commit().check_absent(&parts[0]);
        for part in &parts {
            request = request.put(part, "ordered");
        }
        let committed = request.await.with_context(|| format!("commit in {}", home.region))?;
        ensure!(committed.committed, "a commit on absent keys was not carried out");
        let again = Tour::default_keys(home)
            .commit()
            .check_absent(&parts[0])
            .put(&parts[0], "ordered twice")
            .await?;
        ensure!(!again.committed, "a commit whose check does not hold was carried out");
        for site in others {
            let keys = Tour::default_keys(site);
            // Once one part is seen, later reads must see all: whichever part is looked at first.
            shows(site, &keys, &parts[commit % PARTS], &["ordered"]).await?;
            for got in keys.batch_get(&parts).await? {
                ensure!(
                    same_values(&got, &["ordered"]),
                    "in {} a commit is there in part: {} shows {}",
                    site.region,
                    String::from_utf8_lossy(&got.key),
                    show(&got)
                );
            }
        }
    }
    tour.check_no_crash()?;
    Ok(format!(
        "{COMMITS} commits of {PARTS} keys; whoever saw one key of a commit saw all of them"
    ))
}

async fn kill_leader(tour: &mut Tour) -> anyhow::Result<String> {
    let (home, _) = home_and_others(tour)?;
    let home = home.clone();
    let load = Load::start(&Tour::default_keys(&home), &tour.key("load"), WRITERS);
    tokio::time::sleep(tour.load).await;

    let (victim, led) = busiest_leader(tour, &home).await?;
    tour.demo.fleet().kill(&victim).await?;
    tour.processes_killed += 1;
    let killed = Instant::now();
    let before = load.progress();
    let resumed = eventually(FAILOVER_PATIENCE, || async {
        let behind = load
            .progress()
            .iter()
            .zip(&before)
            .filter(|(now, before)| **now < **before + ACKS_AFTER_FAULT)
            .count();
        if behind == 0 {
            return Ok(killed.elapsed());
        }
        Err(format!("{behind} of {WRITERS} writers have not gone on since {victim} was killed"))
    })
    .await?;
    tokio::time::sleep(tour.load).await;

    let report = load.finish().await?;
    ensure!(!report.acknowledged.is_empty(), "no write was acknowledged");
    holds_all(&home, &Tour::default_keys(&home), &report.acknowledged).await?;
    tour.demo.restart(&victim).await?;
    for site in &tour.sites {
        holds_all(site, &Tour::default_keys(site), &report.acknowledged).await?;
    }
    let writes = report.acknowledged.len();
    tour.acknowledged.extend(report.acknowledged);
    tour.check_no_crash()?;
    Ok(format!(
        "killed {victim}, leader of {led} shards; longest pause of a writer {:.1} s, all went on \
         within {:.1} s; {writes} acknowledged writes found in every region, {} not acknowledged",
        report.longest_gap.as_secs_f64(),
        resumed.as_secs_f64(),
        report.not_acknowledged
    ))
}

async fn kill_everything(tour: &mut Tour) -> anyhow::Result<String> {
    let loads: Vec<Load> = tour
        .sites
        .iter()
        .map(|site| {
            let prefix = tour.key(&format!("crash-{}", site.region));
            Load::start(&Tour::default_keys(site), &prefix, 2)
        })
        .collect();
    tokio::time::sleep(tour.load).await;
    tour.demo.fleet().kill_all().await?;
    tour.processes_killed += tour.demo.layout().nodes.len();
    let mut acknowledged = BTreeMap::new();
    for load in loads {
        let report = load.finish().await?;
        ensure!(!report.acknowledged.is_empty(), "a region acknowledged no write");
        acknowledged.extend(report.acknowledged);
    }

    let begun = Instant::now();
    tour.demo.fleet().start_all().await?;
    tour.demo.wait_ready(READY_PATIENCE).await?;
    let ready = begun.elapsed();
    let writes = acknowledged.len();
    tour.acknowledged.extend(acknowledged);
    for site in &tour.sites {
        holds_all(site, &Tour::default_keys(site), &tour.acknowledged).await?;
    }
    tour.check_no_crash()?;
    Ok(format!(
        "{} processes ready again after {:.1} s; {writes} writes acknowledged just before, and \
         all earlier ones, found in every region",
        tour.demo.layout().nodes.len(),
        ready.as_secs_f64()
    ))
}

async fn converged(tour: &mut Tour) -> anyhow::Result<String> {
    let mut compared = 0;
    for namespace in ["default", &tour.siblings_namespace] {
        compared += eventually(PATIENCE, || async {
            let scans = tour.sites.iter().map(|site| async {
                let content = content(&site.client.namespace(namespace)).await;
                content.map_err(|error| format!("scanning {namespace} in {}: {error}", site.region))
            });
            let contents: Vec<Content> = try_join_all(scans).await?;
            let sites = tour.sites.iter().zip(&contents).collect::<Vec<_>>();
            for pair in sites.windows(2) {
                let ((a, in_a), (b, in_b)) = (pair[0], pair[1]);
                if let Some(difference) = difference(a, in_a, b, in_b) {
                    return Err(format!("{namespace}: {difference}"));
                }
            }
            Ok(contents.first().map_or(0, |content| content.len()))
        })
        .await?;
    }
    ensure!(compared >= tour.acknowledged.len(), "a scan shows fewer keys than were written");
    for site in &tour.sites {
        for key in &tour.deleted {
            let got = Tour::default_keys(site).get(key).await?;
            ensure!(got.versions.is_empty(), "{key} came back in {}", site.region);
        }
    }
    tour.keys_compared = compared;
    tour.check_no_crash()?;
    Ok(format!(
        "{compared} keys of 2 namespaces have the same versions in {} regions; the deleted key is \
         still deleted",
        tour.sites.len()
    ))
}

/// The one that joins has one node: what is shown is the region.
const GUEST_NODES: u16 = 1;

async fn region_joins(tour: &mut Tour) -> anyhow::Result<String> {
    let (home, others) = home_and_others(tour)?;
    let (home, others) = (&home.clone(), others.to_vec());
    let admin = home.client.admin();
    let known = admin.list_regions().await?.regions;
    let highest = known.iter().map(|region| region.number).max().unwrap_or_default();
    let number = u16::try_from(highest + 1).context("no number is left for a region")?;
    let name = format!("guest-{number}");
    let guest = Guest::start(&tour.demo, &name, number, GUEST_NODES).await?;
    let config = ClientConfig {
        endpoints: guest.endpoints(),
        deadline: GUEST_DEADLINE,
        ..Default::default()
    };
    let client = Client::connect(config).await.context("connecting to the region that joins")?;
    let refused = client.namespace("default").get("anything").await;
    ensure!(refused.is_err(), "a region that has no data yet answered a read");

    let load = Load::start(&Tour::default_keys(home), &tour.key("joining"), 2);
    let begun = Instant::now();
    admin.add_region(&name, u32::from(number), guest.links()).await?;
    let active = |regions: Vec<Region>| {
        regions.iter().any(|it| it.name == name && it.membership() == Membership::Active)
    };
    eventually(PATIENCE, || async {
        let regions = admin.list_regions().await.map_err(|error| error.to_string())?.regions;
        if active(regions) { Ok(()) } else { Err(format!("{name} is not active")) }
    })
    .await?;
    let took = begun.elapsed();
    let report = load.finish().await?;
    ensure!(!report.acknowledged.is_empty(), "no write was acknowledged while {name} joined");

    let site = Site { region: name.clone(), client };
    let guest_key = tour.key("from-guest");
    Tour::default_keys(&site)
        .put(&guest_key, "hello")
        .await
        .context("writing in the new region")?;
    for other in std::iter::once(home).chain(&others) {
        shows(other, &Tour::default_keys(other), &guest_key, &["hello"]).await?;
    }
    let compared = eventually(PATIENCE, || async {
        let mut contents = Vec::new();
        for side in [home, &site] {
            let found = content(&Tour::default_keys(side)).await;
            contents.push(found.map_err(|error| format!("{}: {error}", side.region))?);
        }
        match difference(home, &contents[0], &site, &contents[1]) {
            Some(difference) => Err(difference),
            None => Ok(contents[0].len()),
        }
    })
    .await?;

    admin.remove_region(&name).await?;
    guest.stop().await;
    for directory in guest.directories() {
        std::fs::remove_dir_all(&directory).ok();
    }
    tour.acknowledged.extend(report.acknowledged);
    tour.check_no_crash()?;
    Ok(format!(
        "{name} had all {compared} keys and took writes {:.1} s after it was admitted, while {} \
         kept writing; then it was removed",
        took.as_secs_f64(),
        home.region
    ))
}

fn home_and_others(tour: &Tour) -> anyhow::Result<(&Site, &[Site])> {
    tour.sites.split_first().filter(|(_, others)| !others.is_empty()).context("too few regions")
}

/// What a region writes when regions write at the same time.
fn value_of(site: &Site) -> String {
    format!("from {}", site.region)
}

/// Writes one key in the first two regions; with `context`, each replaces what it sees there.
/// Returns how long the slower write took.
async fn write_on_both_sides(tour: &Tour, key: &str, context: bool) -> anyhow::Result<Duration> {
    let mut slowest = Duration::ZERO;
    for site in &tour.sites[..2] {
        let keys = if context { tour.sibling_keys(site) } else { Tour::default_keys(site) };
        let mut put = keys.put(key, value_of(site));
        if context {
            put = put.context(keys.get(key).await?.context);
        }
        let begun = Instant::now();
        let _: Written =
            put.await.with_context(|| format!("writing in {} while it is cut", site.region))?;
        slowest = slowest.max(begun.elapsed());
    }
    Ok(slowest)
}

/// Creates a namespace and waits until every region knows it.
async fn create_namespace(tour: &Tour, name: &str, rule: Rule) -> anyhow::Result<()> {
    let (home, _) = home_and_others(tour)?;
    home.client
        .admin()
        .create_namespace(name, rule)
        .await
        .with_context(|| format!("creating namespace {name} in {}", home.region))?;
    for site in &tour.sites {
        eventually(PATIENCE, || async {
            let found = site.client.admin().get_namespace(name).await;
            found.map(drop).map_err(|error| format!("no {name} in {}: {error}", site.region))
        })
        .await?;
    }
    Ok(())
}

/// The node that leads most shards of a region, and how many.
async fn busiest_leader(tour: &Tour, site: &Site) -> anyhow::Result<(String, usize)> {
    let cluster = match site.client.cluster().await {
        Ok(cluster) => cluster,
        Err(error @ Error::Unavailable { .. }) => {
            return Err(error).context("no node tells who leads");
        }
        Err(error) => return Err(error.into()),
    };
    let mut led = BTreeMap::<u64, usize>::new();
    for leader in cluster.leaders.iter().filter(|leader| leader.leader_node_id != 0) {
        *led.entry(leader.leader_node_id).or_default() += 1;
    }
    let Some((node_id, shards)) = led.into_iter().max_by_key(|(_, shards)| *shards) else {
        bail!("{} says that no shard has a leader", site.region);
    };
    let node = tour.demo.layout().nodes_of(&site.region).find(|node| node.node_id == node_id);
    let node = node.with_context(|| format!("{} has no node {node_id}", site.region))?;
    Ok((node.name.clone(), shards))
}
