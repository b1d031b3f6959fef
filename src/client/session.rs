//! Sessions: what one user has seen, carried from call to call and from region to region.
//!
//! Every reply carries a token that covers the request's token and what the reply shows. Calls
//! that run side by side in one session each return their own; the session joins them, so that
//! nothing seen is forgotten whichever reply comes last.
//!
//! The token is opaque: servers seal and check it, and it is only joined here, for which no key is
//! needed. A session has one token at a time, whatever the number of calls that run in it.
//!
//! Invariants:
//! * No answer of a server makes a call fail that it answered: a token that cannot be joined is kept
//!   apart.
//! * No read misses what is kept apart: it is refused, until all of it can be joined.

use crate::error::{Error, Result};
use crate::types::Consistency;
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use tombolo_core::codec::DecodeError;
use tombolo_core::token::merge;

/// What one user has seen. Clones share it.
///
/// ```no_run
/// # async fn example(us: tombolo_client::Client, eu: tombolo_client::Client)
/// # -> Result<(), tombolo_client::Error> {
/// let session = us.session();
/// us.namespace("default").put("k", "v").session(&session).await?;
/// // In another region, perhaps in another process that was given `session.token()`:
/// eu.namespace("default").get("k").session(&session).await?;
/// # Ok(()) }
/// ```
///
/// A token that cannot be joined to the session's makes no call fail: it is of another cluster, or more
/// than 1,024 calls ran side by side. Reads and waits of the session are refused from then on, with
/// [`Error::Invalid`], because they could miss what it covers; until the answer to a write has made room
/// for it, or in a new session. Every answer has its own token, to begin one with.
#[derive(Clone, Debug, Default)]
pub struct Session {
    seen: Arc<Mutex<Seen>>,
    consistency: Option<Consistency>,
}

/// What the replies of a session said.
#[derive(Debug, Default)]
struct Seen {
    token: Bytes,
    /// Tokens that could not be joined to it. Full, it may lack some.
    apart: Vec<Bytes>,
}

/// Most tokens that are kept apart.
const APART_MAX: usize = 1024;

impl Session {
    /// A session that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Continues a session, for example one that arrived in a cookie. The token is checked by
    /// the first server that sees it.
    pub fn from_token(token: impl Into<Bytes>) -> Self {
        let seen = Seen { token: token.into(), apart: Vec::new() };
        Self { seen: Arc::new(Mutex::new(seen)), consistency: None }
    }

    /// The same session, whose reads through this handle are as fresh as this unless they say otherwise.
    /// Without it they are linearizable until the session has seen something, and causal from then on.
    ///
    /// [`Consistency::Local`] gives up what a session is for: it reads whatever is there.
    #[must_use]
    pub fn with_consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = Some(consistency);
        self
    }

    pub(crate) fn consistency(&self) -> Option<Consistency> {
        self.consistency
    }

    /// The token so far; empty if nothing was seen.
    pub fn token(&self) -> Bytes {
        self.seen.lock().token.clone()
    }

    /// The token that a read carries.
    ///
    /// # Errors
    /// [`Error::Invalid`] if something was seen that it does not cover.
    pub(crate) fn token_to_read(&self) -> Result<Bytes> {
        let seen = self.seen.lock();
        let Some(apart) = seen.apart.first() else { return Ok(seen.token.clone()) };
        let why = join(&seen.token, apart).err();
        let why = why.map_or_else(|| "there were too many".to_owned(), |error| error.to_string());
        Err(Error::invalid(format!(
            "the session does not cover all that it was answered, and a read could miss some of it: {why}"
        )))
    }

    /// Adds what another session has seen, for example that of a message's sender.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the token cannot be read. The session is unchanged then.
    pub fn merge(&self, token: &Bytes) -> Result<()> {
        let mut seen = self.seen.lock();
        let joined = join(&seen.token, token);
        seen.token = joined.map_err(|error| Error::invalid(format!("session token: {error}")))?;
        Ok(())
    }

    /// Takes in a reply's token, which covers `sent`, the token that the request carried.
    pub(crate) fn observe(&self, sent: &Bytes, reply: &Bytes) {
        if !reply.is_empty() {
            self.seen.lock().take(sent, reply);
        }
    }

    /// Takes in a token that covers nothing but what it says.
    pub(crate) fn add(&self, token: &Bytes) {
        self.observe(&Bytes::new(), token);
    }
}

impl Seen {
    fn take(&mut self, sent: &Bytes, reply: &Bytes) {
        // The server has joined what was sent; nothing else happened meanwhile.
        if self.token.is_empty() || self.token == *sent || self.token == *reply {
            self.token = reply.clone();
        } else if !self.has_joined(reply) {
            self.apart.push(reply.clone());
            self.apart.truncate(APART_MAX);
            return;
        }
        // What did not fit may do so now: a reply takes the place of many tokens.
        if self.apart.len() < APART_MAX {
            let apart = std::mem::take(&mut self.apart);
            self.apart = apart.into_iter().filter(|token| !self.has_joined(token)).collect();
        }
    }

    /// Joins a token to the session's, if that can be done.
    fn has_joined(&mut self, token: &Bytes) -> bool {
        join(&self.token, token).map(|joined| self.token = joined).is_ok()
    }
}

fn join(left: &Bytes, right: &Bytes) -> Result<Bytes, DecodeError> {
    merge(&[left, right])
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_core::id::{Actor, NamespaceId, RegionId, ShardId};
    use tombolo_core::token::{BAG_TOKENS_MAX, SessionToken, TokenKey};
    use tombolo_core::vector::VersionVector;

    fn covering(namespaces: impl IntoIterator<Item = usize>) -> Bytes {
        let seen: VersionVector =
            [(Actor { region: RegionId(1), incarnation: 1 }, 1)].into_iter().collect();
        let mut token = SessionToken::default();
        for namespace in namespaces {
            let namespace = NamespaceId(u32::try_from(namespace).expect("small"));
            token.observe(namespace, ShardId(0), &seen);
        }
        token.encode(&TokenKey::without_secret("test"))
    }

    #[test]
    fn what_does_not_fit_a_bag_is_joined_when_a_reply_makes_room() {
        let tokens: Vec<Bytes> = (0..BAG_TOKENS_MAX + 2).map(|it| covering([it])).collect();
        let (fit, more) = tokens.split_at(BAG_TOKENS_MAX);
        let bag = merge(&fit.iter().map(|token| &token[..]).collect::<Vec<_>>()).expect("a bag");
        let session = Session::from_token(bag.clone());
        more.iter().for_each(|token| session.add(token));
        assert_eq!(session.token(), bag);
        assert!(matches!(session.token_to_read(), Err(Error::Invalid { .. })));

        session.observe(&bag, &covering(0..BAG_TOKENS_MAX));
        let token = session.token_to_read().expect("it covers everything again");
        let everything = covering(0..tokens.len());
        assert_eq!(join(&token, &everything), Ok(everything));
    }

    #[test]
    fn what_no_reply_can_bring_back_is_never_forgotten() {
        let session = Session::from_token(covering([1]));
        for number in 0..2 * APART_MAX {
            session.add(&Bytes::from(format!("junk {number}")));
        }
        session.observe(&session.token(), &covering([1, 2]));
        assert_eq!(session.token(), covering([1, 2]));
        let refused = session.token_to_read().expect_err("junk is no token");
        assert!(refused.to_string().contains("could miss"), "{refused}");
    }
}
