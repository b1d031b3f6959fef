//! What a watcher asks for, checked.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use tombolo_core::{
    RegionId, element,
    feed::{Cursor, Filter, Origins},
    key::KEY_BYTES_MAX,
    namespace::Namespace,
    token::ResumeToken,
};
use tombolo_proto::v1 as pb;
use tombolo_shard::{FeedRequest, end_of_prefix};
use tonic::Status;

use super::WatchConfig;
use crate::{gateway::Gateway, reason::Reason, status::of_token_error};

const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);
const CHECKPOINT_INTERVAL_MIN: Duration = Duration::from_millis(100);
const CHECKPOINT_INTERVAL_MAX: Duration = Duration::from_secs(3600);
/// Left in a response for all but values.
const OVERHEAD_BYTES: usize = 64 << 10;

/// A request that makes sense.
pub(super) struct Asked {
    pub(super) request: FeedRequest,
    /// Where to begin, by shard.
    pub(super) cursors: Vec<Cursor>,
    pub(super) checkpoint_interval: Duration,
}

/// Reads a request.
pub(super) fn read(
    gateway: &Gateway,
    namespace: &Namespace,
    message: pb::WatchRequest,
    config: &WatchConfig,
) -> Result<Asked, Status> {
    let (mut start, mut end) = range(&message)?;
    if namespace.rule.is_typed() {
        // Elements lie in the order of their keys.
        start = element::bound(&start).into();
        end = end.map(|end| element::bound(&end).into());
    }
    let filter = Filter { start, end, origins: origins(gateway, &message)? };
    let checkpoint_interval = checkpoint_interval(&message)?;
    let cursors = cursors(gateway, namespace, message.start, &filter)?;
    let previous_bytes_max =
        message.previous.then(|| config.message_bytes_max.saturating_sub(OVERHEAD_BYTES));
    let request = FeedRequest { namespace: namespace.id, filter, previous_bytes_max };
    Ok(Asked { request, cursors, checkpoint_interval })
}

/// The first key, and the one after the last.
fn range(message: &pb::WatchRequest) -> Result<(Bytes, Option<Bytes>), Status> {
    for bound in [&message.start_key, &message.end_key, &message.prefix] {
        if bound.len() > KEY_BYTES_MAX {
            return Err(Reason::KeyTooLong.status(
                format!("a bound has {} bytes; keys have at most {KEY_BYTES_MAX}", bound.len()),
                &[("max_bytes", KEY_BYTES_MAX.to_string())],
            ));
        }
    }
    let start = message.start_key.clone().max(message.prefix.clone());
    let mut end = (!message.end_key.is_empty()).then(|| message.end_key.clone());
    if let Some(prefix_end) = end_of_prefix(&message.prefix) {
        end = Some(end.map_or(prefix_end.clone(), |end| end.min(prefix_end)));
    }
    if end.as_ref().is_some_and(|end| *end <= start) {
        return Err(invalid("no key lies in the range: `end_key` must come after `start_key`"));
    }
    Ok((start, end))
}

fn origins(gateway: &Gateway, message: &pb::WatchRequest) -> Result<Origins, Status> {
    let topology = gateway.topology();
    let local = || BTreeSet::from([topology.region]);
    let by_place = match message.origin_filter() {
        pb::OriginFilter::Unspecified if message.origin_filter != 0 => {
            return Err(invalid("`origin_filter` has a number that is not known"));
        }
        pb::OriginFilter::Unspecified => Origins::All,
        pb::OriginFilter::Local => Origins::Only(local()),
        pb::OriginFilter::Remote => Origins::AllBut(local()),
    };
    if message.origin_regions.is_empty() {
        return Ok(by_place);
    }
    if by_place != Origins::All {
        return Err(invalid("give `origin_filter` or `origin_regions`, not both"));
    }
    let id_of = |name: &String| -> Result<RegionId, Status> {
        let region = topology.region_named(name);
        region.map(|region| region.id).ok_or_else(|| {
            let text = format!("the cluster has no region `{name}`");
            Reason::RegionNotFound.status(text, &[("region", name.clone())])
        })
    };
    let regions = message.origin_regions.iter().map(id_of).collect::<Result<_, _>>()?;
    Ok(Origins::Only(regions))
}

fn checkpoint_interval(message: &pb::WatchRequest) -> Result<Duration, Status> {
    let Some(asked) = message.checkpoint_interval else { return Ok(CHECKPOINT_INTERVAL) };
    let bounds = CHECKPOINT_INTERVAL_MIN..=CHECKPOINT_INTERVAL_MAX;
    let interval = Duration::try_from(asked).ok().filter(|asked| bounds.contains(asked));
    interval.ok_or_else(|| invalid("`checkpoint_interval` must lie between 100 ms and 1 h"))
}

fn cursors(
    gateway: &Gateway,
    namespace: &Namespace,
    start: Option<pb::watch_request::Start>,
    filter: &Filter,
) -> Result<Vec<Cursor>, Status> {
    let shards = gateway.shards();
    let token = match start {
        None => {
            let now = shards.iter().map(|shard| Cursor::live(shard.frontier(namespace.id)));
            return Ok(now.collect());
        }
        Some(pb::watch_request::Start::Snapshot(pb::Snapshot {})) => {
            return Ok(shards.iter().map(|_| Cursor::snapshot()).collect());
        }
        Some(pb::watch_request::Start::ResumeToken(token)) => token,
    };
    let ResumeToken { namespace: of, filter: shown, cursors } =
        ResumeToken::decode(gateway.cluster(), &token)
            .map_err(|error| of_token_error(Reason::ResumeTokenInvalid, &error))?;
    if of != namespace.id {
        let text = format!(
            "the token belongs to another namespace, or to one that was also called `{}`",
            namespace.name
        );
        return Err(Reason::ResumeTokenMismatch.status(text, &[]));
    }
    if shown != filter.fingerprint() {
        let text = "the token belongs to a watch of another range or other regions' writes";
        return Err(Reason::ResumeTokenMismatch.status(text, &[]));
    }
    if cursors.len() != shards.iter().len() {
        let text = format!("the token has {} shards", cursors.len());
        return Err(Reason::ResumeTokenInvalid.status(text, &[]));
    }
    Ok(cursors)
}

fn invalid(text: &str) -> Status {
    Reason::RequestInvalid.status(text, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(prefix: &str, start: &str, end: &str) -> pb::WatchRequest {
        let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        pb::WatchRequest {
            prefix: bytes(prefix),
            start_key: bytes(start),
            end_key: bytes(end),
            ..Default::default()
        }
    }

    #[test]
    fn prefix_and_range_are_intersected_and_an_empty_one_is_refused() {
        let ranges = [
            (("", "", ""), ("", None)),
            (("ab", "", ""), ("ab", Some("ac"))),
            (("ab", "abc", "x"), ("abc", Some("ac"))),
            (("a", "", "ab"), ("a", Some("ab"))),
        ];
        for ((prefix, start, end), (first, last)) in ranges {
            let read = range(&message(prefix, start, end)).unwrap();
            let wanted = (Bytes::copy_from_slice(first.as_bytes()), last.map(Bytes::from));
            assert_eq!(read, wanted);
        }
        for (prefix, start, end) in [("", "b", "a"), ("", "a", "a"), ("a", "b", "")] {
            let status = range(&message(prefix, start, end)).unwrap_err();
            assert_eq!(Reason::of(&status), Some(Reason::RequestInvalid));
        }
        let long = range(&message(&"x".repeat(KEY_BYTES_MAX + 1), "", "")).unwrap_err();
        assert_eq!(Reason::of(&long), Some(Reason::KeyTooLong));
    }

    #[test]
    fn checkpoints_come_neither_too_often_nor_never() {
        let with = |seconds, nanos| pb::WatchRequest {
            checkpoint_interval: Some(prost_types::Duration { seconds, nanos }),
            ..Default::default()
        };
        assert_eq!(checkpoint_interval(&Default::default()).unwrap(), CHECKPOINT_INTERVAL);
        let half = checkpoint_interval(&with(0, 500_000_000)).unwrap();
        assert_eq!(half, Duration::from_millis(500));
        for asked in [with(0, 0), with(-1, 0), with(3601, 0), with(0, 1)] {
            let status = checkpoint_interval(&asked).unwrap_err();
            assert_eq!(Reason::of(&status), Some(Reason::RequestInvalid));
        }
    }
}
