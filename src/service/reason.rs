//! The catalogue of errors: every reason a server gives for not doing what it was asked.
//!
//! Clients act on the gRPC code and on the reason, never on the message. So a reason is part of the
//! API: it may be added, but not renamed and not moved to another code. Each has a meaning, an
//! advice to the caller, and a rule for client libraries; `docs/errors.md` is made from here.
//!
//! Invariants:
//! * Each status this server makes carries exactly one reason, in `google.rpc.ErrorInfo`.
//! * A reason that says "refused" ([`Retry::Anywhere`]) means that nothing was written.
//!
//! Not here: which failure of which crate has which reason (the handlers decide that).

use std::collections::HashMap;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// `ErrorInfo.domain` of every error.
pub const DOMAIN: &str = "tombolo";

/// The page that explains the reasons; `Help` links to a section of it.
pub const HELP_PAGE: &str = "docs/errors.md";

/// What a client library may do by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same request will fail again.
    Never,
    /// Refused before anything was written: repeat, here or at another node, with backoff.
    Anywhere,
    /// It is open whether a write took effect: repeat only reads, and writes with a `request_id`.
    SameRequestId,
    /// Read the current state, decide again, then send a new request.
    AfterRead,
}

impl Retry {
    /// In words, for the reference page.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Never => "no",
            Self::Anywhere => "yes: nothing was written",
            Self::SameRequestId => "reads, and writes with the same `request_id`",
            Self::AfterRead => "no: read again and decide first",
        }
    }
}

macro_rules! reasons {
    ($($variant:ident $name:literal $code:ident $retry:ident $delay_ms:literal
        $meaning:literal $action:literal)*) => {
        /// Why a request was not done. See the module documentation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $(#[doc = $meaning] $variant,)*
        }

        impl Reason {
            /// Every reason, in the order of the reference page.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name on the wire, such as `KEY_EMPTY`.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The gRPC code it always comes with.
            pub const fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code,)* }
            }

            /// What a client library may do by itself.
            pub const fn retry(self) -> Retry {
                match self { $(Self::$variant => Retry::$retry,)* }
            }

            /// What it means, in one sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }

            /// What the caller should do, in one sentence.
            pub const fn action(self) -> &'static str {
                match self { $(Self::$variant => $action,)* }
            }

            const fn retry_delay_ms(self) -> u64 {
                match self { $(Self::$variant => $delay_ms,)* }
            }
        }
    };
}

// Columns: variant, wire name, gRPC code, retry rule, RetryInfo in ms (0: none), meaning, advice.
reasons! {
    KeyEmpty "KEY_EMPTY" InvalidArgument Never 0
        "The key has no bytes."
        "Send a key of at least one byte."
    KeyTooLong "KEY_TOO_LONG" InvalidArgument Never 0
        "The key is longer than the limit in metadata `max_bytes`."
        "Shorten the key, for example by hashing a part of it."
    ValueTooLarge "VALUE_TOO_LARGE" InvalidArgument Never 0
        "The value is larger than `limits.max_value_bytes`."
        "Split the value over several keys, or raise the limit on every node of every region."
    TtlInvalid "TTL_INVALID" InvalidArgument Never 0
        "The time to live is zero, negative or too long."
        "Send a positive time to live within the limit, or none."
    NamespaceInvalid "NAMESPACE_INVALID" InvalidArgument Never 0
        "The namespace's name or settings are not valid."
        "Correct the field named in the message."
    NamespaceReserved "NAMESPACE_RESERVED" InvalidArgument Never 0
        "The namespace belongs to the system."
        "Use another name."
    ContextInvalid "CONTEXT_INVALID" InvalidArgument Never 0
        "The causal context was not made by this cluster, or it was changed."
        "Send the context exactly as the last read returned it."
    SessionTokenInvalid "SESSION_TOKEN_INVALID" InvalidArgument Never 0
        "The session token was not made by this cluster, or it was changed."
        "Send the token exactly as the last reply returned it, or start a new session."
    SessionTokenTooLarge "SESSION_TOKEN_TOO_LARGE" InvalidArgument Never 0
        "The session token is longer, or made of more parts, than the limit in metadata `max`."
        "Start a new session; use one for each namespace, since a token grows with all that it has seen."
    PageTokenInvalid "PAGE_TOKEN_INVALID" InvalidArgument Never 0
        "The page token was not made by this cluster, or it was changed."
        "Start from the first page."
    PageTokenMismatch "PAGE_TOKEN_MISMATCH" InvalidArgument Never 0
        "The page token belongs to a request with other parameters."
        "Repeat the parameters of the first page, or start from the first page."
    ResumeTokenInvalid "RESUME_TOKEN_INVALID" InvalidArgument Never 0
        "The resume token of a watch was not made by this cluster, or it was changed."
        "Start a new watch."
    ResumeTokenMismatch "RESUME_TOKEN_MISMATCH" InvalidArgument Never 0
        "The resume token belongs to a watch of another namespace, range or choice of regions."
        "Repeat the parameters of the watch that the token came from, or start a new watch."
    RequestInvalid "REQUEST_INVALID" InvalidArgument Never 0
        "A field of the request is missing or has a value that is not accepted."
        "Correct the field named in the message."
    RequestIdInvalid "REQUEST_ID_INVALID" InvalidArgument Never 0
        "The request id's client is 0, or the id was used for another request."
        "Choose a random client number once, count up for each request, repeat an id only with it."
    TypeMismatch "TYPE_MISMATCH" FailedPrecondition Never 0
        "The operation does not fit the namespace's rule, metadata `rule`, or what a map's field is, `held`."
        "Use an operation of that rule or field; a field can be deleted first and then be something else."
    CounterOverflow "COUNTER_OVERFLOW" OutOfRange Never 0
        "The counter's sum leaves, or would leave, the range of a signed 64-bit number; nothing was added."
        "Add less. A sum that regions made at the same time, metadata `sum`, can be brought back by adding a negative number."
    TooManyElements "TOO_MANY_ELEMENTS" FailedPrecondition Never 0
        "The value or field has more elements than one deletion takes away."
        "Read the elements page by page and remove them, then delete what is left."
    CrossShardBatch "CROSS_SHARD_BATCH" FailedPrecondition Never 0
        "The keys of one atomic batch live in more than one shard."
        "Give keys that belong together the same hash tag, or send one batch for each shard."
    BatchTooLarge "BATCH_TOO_LARGE" InvalidArgument Never 0
        "The batch has more operations or bytes than allowed."
        "Split the batch."
    MessageTooLarge "MESSAGE_TOO_LARGE" InvalidArgument Never 0
        "The request is larger than `limits.max_message_bytes`."
        "Split the request, or raise the limit on every node of every region, and `max_message_bytes` of the clients."
    AckRegionsTooMany "ACK_REGIONS_TOO_MANY" InvalidArgument Never 0
        "The write or the wait asks for more other regions than there are."
        "Lower `ack_regions`, or `regions` of the wait."
    NamespaceNotFound "NAMESPACE_NOT_FOUND" NotFound Never 0
        "This region knows no namespace of that name."
        "Correct the name, create the namespace, or wait until its creation reached this region."
    ConflictNotFound "CONFLICT_NOT_FOUND" NotFound Never 0
        "The ledger of this region has no conflict with that id."
        "List the conflicts again; old ones are forgotten, after `ledger.retention`."
    RegionInvalid "REGION_INVALID" InvalidArgument Never 0
        "The region's name, number or addresses are not valid."
        "Correct what the message names."
    RegionNotFound "REGION_NOT_FOUND" NotFound Never 0
        "The cluster has no region of that name."
        "Correct the name; `tombolo ctl region list` shows them all."
    NodeNotFound "NODE_NOT_FOUND" NotFound Never 0
        "The region has no node with that id."
        "Correct the id; `tombolo ctl status` shows them all."
    ShardNotFound "SHARD_NOT_FOUND" NotFound Never 0
        "The region has no shard with that number."
        "Correct the number; shards count from 0."
    NamespaceExists "NAMESPACE_EXISTS" AlreadyExists Never 0
        "A namespace of that name exists already."
        "Use it, or choose another name."
    ClusterMismatch "CLUSTER_MISMATCH" FailedPrecondition Never 0
        "The caller belongs to another cluster or was configured with another region list."
        "Compare `cluster_id` and `[[regions]]` of both sides; they must be equal."
    NotCatalogHome "NOT_CATALOG_HOME" FailedPrecondition Never 0
        "Namespaces and new regions are changed in another region, named in metadata `home`."
        "Send the request to a node of that region."
    RegionBusy "REGION_BUSY" FailedPrecondition Never 0
        "Another region, named in metadata `region`, is taking over data; one region at a time."
        "Wait until `tombolo ctl region list` shows it as active, or fence it."
    RegionFenced "REGION_FENCED" FailedPrecondition Never 0
        "The other regions go on without this one, and what is written here would reach nobody."
        "Use another region; `tombolo ctl region add`, run there, takes this one back."
    CountersWentBack "COUNTERS_WENT_BACK" FailedPrecondition Never 0
        "This region's data is older than what it told other regions, and a write could be taken for another."
        "Use another region; `tombolo ctl region recover`, run there, gives this one a new incarnation."
    EtagMismatch "ETAG_MISMATCH" Aborted AfterRead 0
        "The resource was changed after the caller read it."
        "Read it again, apply the change to what is there now, and send the new etag."
    ConflictMoved "CONFLICT_MOVED" Aborted AfterRead 0
        "The key was written after the caller looked at it; nothing was overwritten."
        "Look at the key again, decide on what it holds now, and send the new context."
    ConflictExpired "CONFLICT_EXPIRED" FailedPrecondition Never 0
        "The value that was to be put back or chosen had a time to live, which has passed."
        "If it is still wanted, put it with a new time to live; the ledger still shows what was dropped."
    NotLeader "NOT_LEADER" Unavailable Anywhere 0
        "This node does not lead the key's shard; metadata `leader` names the node that may."
        "Send the request to that node, or to any node of the region if none is named."
    NoLeader "NO_LEADER" Unavailable Anywhere 200
        "The shard has no leader at the moment; an election is probably running."
        "Repeat after the time in RetryInfo."
    Draining "DRAINING" Unavailable Anywhere 0
        "The node is about to stop and takes no new requests."
        "Send the request to another node of the region."
    NoQuorum "NO_QUORUM" Unavailable SameRequestId 500
        "The leader could not reach a majority of the region's nodes in time."
        "Repeat after the time in RetryInfo; if it lasts, look for stopped nodes in this region."
    SessionNotCaughtUp "SESSION_NOT_CAUGHT_UP" Aborted Never 0
        "This region did not receive what the session has seen elsewhere before the deadline."
        "Repeat later, use the region the session used before, or drop the session token."
    ContextAhead "CONTEXT_AHEAD" Unavailable Anywhere 200
        "The write's context has seen versions that this region has not received yet."
        "Repeat later, or write in the region the context was read in; nothing was written."
    RegionSeeding "REGION_SEEDING" Unavailable Anywhere 1000
        "This region joins or is recovered, and does not have all data of the shard yet."
        "Use another region meanwhile; `tombolo ctl region list` shows how far it is."
    RegionUnreachable "REGION_UNREACHABLE" Unavailable Anywhere 1000
        "Another region that the request needs does not answer."
        "Repeat later; requests that stay in this region are not affected."
    ReplicaFailed "REPLICA_FAILED" Unavailable SameRequestId 200
        "This node's replica of the shard has stopped after a fault."
        "Use another node of the region; the operator finds the cause in this node's log."
    ClockOutOfBounds "CLOCK_OUT_OF_BOUNDS" Unavailable Anywhere 250
        "The leader's clock differs from most of its region's by more than `clock.max_offset`, or is not known to agree yet; it stamps nothing and hands over."
        "Repeat after the time in RetryInfo. Correct the clock (NTP) of the node named in metadata `node_id`."
    OutcomeUnknown "OUTCOME_UNKNOWN" Unavailable SameRequestId 100
        "The write was accepted for replication, then its fate was lost; it may or may not stand."
        "Repeat with the same `request_id`, which tells what happened, or read the key."
    Overloaded "OVERLOADED" ResourceExhausted Anywhere 250
        "The node has as many requests in work as `limits.max_in_flight` allows."
        "Repeat after the time in RetryInfo, with fewer requests at once."
    WatchTooSlow "WATCH_TOO_SLOW" ResourceExhausted Anywhere 100
        "The watcher took nothing for `watch.stall_timeout` and was cut."
        "Watch again with the last resume token; take events faster, or fewer of them."
    DiskFull "DISK_FULL" ResourceExhausted Never 0
        "The disk of a node is nearly full; writes are refused, reads go on."
        "Free or add disk space; deletes free space only after compaction."
    Deadline "DEADLINE" DeadlineExceeded SameRequestId 0
        "The request was not done before its deadline; a write may still take effect."
        "Repeat with the same `request_id` and a longer deadline."
    AckRegionsPending "ACK_REGIONS_PENDING" DeadlineExceeded Never 0
        "The write stands in this region, but `ack_regions` others did not confirm it in time."
        "Do not repeat: it will be replicated. Metadata: `dot` is the last write, `missing` who lacks some of it, `session_token` (base64, unless it is longer than 4 KiB) the session's token with it."
    ReplicationPending "REPLICATION_PENDING" DeadlineExceeded Never 0
        "By the deadline, fewer other regions than asked for had all that the session has seen."
        "Wait again; metadata `missing` names who lacks some of it, `behind` how many events each."
    NotImplemented "NOT_IMPLEMENTED" Unimplemented Never 0
        "This version of the server does not do that yet."
        "Leave out the field or call named in the message."
    StorageFailed "STORAGE_FAILED" Internal SameRequestId 0
        "The node could not read or write its disk."
        "Use another node of the region; the operator finds the cause in this node's log."
    Internal "INTERNAL" Internal Never 0
        "The server met a state that it should never be in."
        "Report it with the message and this node's log."
}

impl Reason {
    /// The reason of that wire name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.as_str() == name)
    }

    /// The reason that `status` carries, if it is one of ours.
    pub fn of(status: &Status) -> Option<Self> {
        let info = status.get_details_error_info()?;
        if info.domain == DOMAIN { Self::parse(&info.reason) } else { None }
    }

    /// The wait that `RetryInfo` asks for, unless the caller of [`Reason::status_after`] knows
    /// better.
    pub fn retry_delay(self) -> Option<Duration> {
        match self.retry_delay_ms() {
            0 => None,
            ms => Some(Duration::from_millis(ms)),
        }
    }

    /// The section of the reference page that explains this reason.
    pub fn help_link(self) -> String {
        format!("{HELP_PAGE}#{}", self.as_str().to_ascii_lowercase())
    }

    /// The status that tells a client this reason.
    ///
    /// `message` is for people: it may say anything but keys and values, and may change. What
    /// programs need goes into `metadata`.
    pub fn status(self, message: impl Into<String>, metadata: &[(&str, String)]) -> Status {
        self.build(message.into(), metadata, self.retry_delay())
    }

    /// As [`Reason::status`], asking the client to wait for `delay` before it tries again.
    pub fn status_after(
        self,
        message: impl Into<String>,
        metadata: &[(&str, String)],
        delay: Duration,
    ) -> Status {
        self.build(message.into(), metadata, Some(delay))
    }

    fn build(
        self,
        message: String,
        metadata: &[(&str, String)],
        retry_delay: Option<Duration>,
    ) -> Status {
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let mut details = ErrorDetails::with_error_info(self.as_str(), DOMAIN, metadata);
        if let Some(delay) = retry_delay {
            details.set_retry_info(Some(delay));
        }
        details.add_help_link("What it means and what to do", self.help_link());
        Status::with_error_details(self.code(), message, details)
    }
}

/// The name of a gRPC code as in `google.rpc.Code`.
pub const fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The reference page `docs/errors.md`.
pub fn render_markdown() -> String {
    let mut out = String::from(
        "# Errors\n\n\
         <!-- Made from src/service/reason.rs; update with: UPDATE=1 cargo test --test errors -->\n\n\
         Every error is a `google.rpc.Status` whose details hold\n\n\
         - `ErrorInfo` with one of the reasons below, the domain `tombolo` and metadata,\n\
         - `RetryInfo` when the server knows how long to wait,\n\
         - `Help` with a link to a section of this page.\n\n\
         Programs act on the code and the reason. Messages are for people and may change. A\n\
         status without a reason was made by something in between: the transport or a proxy.\n\n\
         | Reason | Code | Repeated by client libraries |\n\
         |---|---|---|\n",
    );
    for reason in Reason::ALL {
        let (name, code) = (reason.as_str(), code_name(reason.code()));
        let (anchor, retry) = (name.to_ascii_lowercase(), reason.retry().describe());
        out += &format!("| [`{name}`](#{anchor}) | {code} | {retry} |\n");
    }
    for reason in Reason::ALL {
        let (name, code) = (reason.as_str(), code_name(reason.code()));
        let (meaning, action) = (reason.meaning(), reason.action());
        out += &format!("\n## {name}\n\n`{code}`. {meaning}\n\n*What to do:* {action}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_reason_metadata_retry_delay_and_help() {
        let status = Reason::NoLeader.status("shard 3 has no leader", &[("shard", "3".into())]);

        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.message(), "shard 3 has no leader");
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("NO_LEADER", "tombolo"));
        assert_eq!(info.metadata.get("shard").map(String::as_str), Some("3"));
        let delay = details.retry_info().unwrap().retry_delay;
        assert_eq!(delay, Some(Duration::from_millis(200)));
        assert_eq!(details.help().unwrap().links[0].url, "docs/errors.md#no_leader");
        assert_eq!(Reason::of(&status), Some(Reason::NoLeader));
    }

    #[test]
    fn a_caller_may_ask_for_another_delay() {
        let status = Reason::Overloaded.status_after("busy", &[], Duration::from_secs(3));

        let delay = status.get_details_retry_info().unwrap().retry_delay;
        assert_eq!(delay, Some(Duration::from_secs(3)));
    }

    #[test]
    fn foreign_statuses_have_no_reason() {
        let details = ErrorDetails::with_error_info("NO_LEADER", "elsewhere", []);
        let foreign = Status::with_error_details(Code::Unavailable, "", details);

        assert_eq!(Reason::of(&foreign), None);
        assert_eq!(Reason::of(&Status::unavailable("no details")), None);
        let garbage = Status::with_details(Code::Internal, "", vec![0xff; 7].into());
        assert_eq!(Reason::of(&garbage), None);
    }
}
