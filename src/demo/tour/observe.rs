//! Polling regions until they show what is expected, and comparing what they hold.
//!
//! Not here: what is expected (`steps`).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::bail;
use bytes::Bytes;
use futures::StreamExt;
use tombolo_client::{Dot, Entry, Got, Keyspace};

use super::Site;

/// Bounds every wait for regions to agree.
pub(super) const PATIENCE: Duration = Duration::from_secs(45);

const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The most that a batch may ask for.
const BATCH: usize = 128;
const BATCHES_AT_ONCE: usize = 4;

/// Polls until `look` returns `Ok`; its `Err` says what is missing, and is the error when
/// `patience` is over.
pub(super) async fn eventually<T, F>(patience: Duration, look: impl Fn() -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<T, String>>,
{
    let begun = Instant::now();
    loop {
        match look().await {
            Ok(seen) => return Ok(seen),
            Err(missing) if begun.elapsed() >= patience => {
                bail!("after {patience:?} still: {missing}")
            }
            Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}

/// Waits until a linearizable read of `key` in a region shows exactly `values`, in any order.
pub(super) async fn shows(
    site: &Site,
    keys: &Keyspace,
    key: &str,
    values: &[&str],
) -> anyhow::Result<Got> {
    eventually(PATIENCE, || async {
        let got = keys.get(key).await;
        let got = got.map_err(|error| format!("reading {key} in {}: {error}", site.region))?;
        if same_values(&got, values) {
            return Ok(got);
        }
        Err(format!("{} shows {} for {key}, not {values:?}", site.region, show(&got)))
    })
    .await
}

/// Whether a read shows exactly these values, in any order.
pub(super) fn same_values(got: &Got, values: &[&str]) -> bool {
    let mut seen: Vec<&[u8]> = got.versions.iter().map(|version| &*version.value).collect();
    let mut wanted: Vec<&[u8]> = values.iter().map(|value| value.as_bytes()).collect();
    seen.sort_unstable();
    wanted.sort_unstable();
    seen == wanted
}

/// The values of a read, for messages.
pub(super) fn show(got: &Got) -> String {
    let values = got.versions.iter().map(|version| String::from_utf8_lossy(&version.value));
    format!("{:?}", values.collect::<Vec<_>>())
}

/// Waits until linearizable reads in a region show exactly the `expected` value of every key.
pub(super) async fn holds_all(
    site: &Site,
    keys: &Keyspace,
    expected: &BTreeMap<String, String>,
) -> anyhow::Result<()> {
    let expected: Vec<(&String, &String)> = expected.iter().collect();
    eventually(PATIENCE, || async {
        let batches = expected.chunks(BATCH).map(|batch| missing_of(keys, batch));
        let mut results = futures::stream::iter(batches).buffer_unordered(BATCHES_AT_ONCE);
        let (mut missing, mut example) = (0, None);
        while let Some(result) = results.next().await {
            let found = result.map_err(|error| format!("reading in {}: {error}", site.region))?;
            missing += found.len();
            example = example.or(found.into_iter().next());
        }
        match example {
            None => Ok(()),
            Some(example) => Err(format!(
                "{missing} of {} acknowledged writes are not in {}, such as {example}",
                expected.len(),
                site.region
            )),
        }
    })
    .await
}

/// The keys of a batch that do not have their value.
async fn missing_of(
    keys: &Keyspace,
    batch: &[(&String, &String)],
) -> tombolo_client::Result<Vec<String>> {
    let got = keys.batch_get(batch.iter().map(|(key, _)| key.as_str())).await?;
    let mut missing = Vec::new();
    // A reply that is too short leaves the rest missing.
    let mut got = got.into_iter();
    for (key, value) in batch {
        if !got.next().is_some_and(|got| same_values(&got, &[value])) {
            missing.push((*key).clone());
        }
    }
    Ok(missing)
}

/// What a region holds: for each key its versions by dot.
pub(super) type Content = BTreeMap<Bytes, BTreeMap<Dot, Bytes>>;

/// Reads a whole namespace in one region.
pub(super) async fn content(keys: &Keyspace) -> tombolo_client::Result<Content> {
    Ok(arrange(keys.scan().collect().await?))
}

fn arrange(entries: Vec<Entry>) -> Content {
    let versions = |entry: Entry| {
        entry.versions.into_iter().map(|version| (version.dot, version.value)).collect()
    };
    entries.into_iter().map(|entry| (entry.key.clone(), versions(entry))).collect()
}

/// How two contents differ, in words; none when they are equal.
pub(super) fn difference(a: &Site, in_a: &Content, b: &Site, in_b: &Content) -> Option<String> {
    let differing = |key: &&Bytes| in_a.get(*key) != in_b.get(*key);
    let mut keys: Vec<&Bytes> = in_a.keys().chain(in_b.keys()).filter(differing).collect();
    keys.sort_unstable();
    keys.dedup();
    let first = keys.first()?;
    Some(format!(
        "{} and {} differ in {} keys, such as {}",
        a.region,
        b.region,
        keys.len(),
        String::from_utf8_lossy(first)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tombolo_client::{HybridTime, Version};

    fn version(value: &str, seq: u64) -> Version {
        Version {
            value: Bytes::copy_from_slice(value.as_bytes()),
            typed: None,
            dot: Dot { region: 1, incarnation: 1, seq },
            origin_region: "us".into(),
            time: HybridTime(seq),
            expire_time: None,
        }
    }

    fn got(values: &[&str]) -> Got {
        Got {
            key: Bytes::from_static(b"k"),
            versions: values.iter().zip(1..).map(|(value, seq)| version(value, seq)).collect(),
            context: Bytes::new(),
            token: Bytes::new(),
            revision: None,
            partial: false,
            next_elements: Bytes::new(),
            settle_time: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_the_first_success() {
        let looks = AtomicU32::new(0);

        let seen = eventually(PATIENCE, || async {
            let look = looks.fetch_add(1, Ordering::Relaxed);
            if look == 3 { Ok(look) } else { Err("not yet".into()) }
        });

        assert_eq!(seen.await.unwrap(), 3);
    }

    #[tokio::test]
    async fn a_wait_that_is_over_says_what_was_missing() {
        let error = eventually(Duration::ZERO, || async { Err::<(), _>("no key in eu".into()) });

        assert!(error.await.unwrap_err().to_string().contains("no key in eu"));
    }

    #[test]
    fn values_are_compared_in_any_order_but_exactly() {
        assert!(same_values(&got(&["a", "b"]), &["b", "a"]));
        assert!(!same_values(&got(&["a", "b"]), &["a"]));
        assert!(!same_values(&got(&["a"]), &["a", "a"]));
        assert!(same_values(&got(&[]), &[]));
    }

    #[test]
    fn contents_are_equal_only_with_the_same_keys_dots_and_values() {
        let entry = |key: &'static str, versions: Vec<Version>| Entry {
            key: Bytes::from_static(key.as_bytes()),
            versions,
            context: Bytes::new(),
            partial: false,
            settle_time: None,
        };
        let a = arrange(vec![entry("x", vec![version("1", 1), version("2", 2)])]);
        let reordered = arrange(vec![entry("x", vec![version("2", 2), version("1", 1)])]);
        let other_dot = arrange(vec![entry("x", vec![version("1", 1), version("2", 3)])]);
        let more = arrange(vec![
            entry("x", vec![version("1", 1), version("2", 2)]),
            entry("y", vec![version("1", 9)]),
        ]);

        assert_eq!(a, reordered);
        assert_ne!(a, other_dot);
        assert_ne!(a, more);
    }
}
