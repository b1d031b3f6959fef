//! Sessions: what one user has seen, carried from call to call and from region to region.
//!
//! Every reply carries a token that covers the request's token and what the reply shows. Calls
//! that run side by side in one session each return their own; the session joins them, so that
//! nothing seen is forgotten whichever reply comes last.
//!
//! The token is opaque: servers seal and check it, and it is only joined here, for which no key is
//! needed. A session has one token at a time, whatever the number of calls that run in it.

use crate::error::{Error, Result};
use crate::types::Consistency;
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;

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
#[derive(Clone, Debug, Default)]
pub struct Session {
    token: Arc<Mutex<Bytes>>,
    consistency: Option<Consistency>,
}

impl Session {
    /// A session that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Continues a session, for example one that arrived in a cookie. The token is checked by
    /// the first server that sees it.
    pub fn from_token(token: impl Into<Bytes>) -> Self {
        Self { token: Arc::new(Mutex::new(token.into())), consistency: None }
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
        self.token.lock().clone()
    }

    /// Adds what another session has seen, for example that of a message's sender.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the token cannot be read. The session is unchanged then.
    pub fn merge(&self, token: &Bytes) -> Result<()> {
        self.observe(&Bytes::new(), token)
            .map_err(|error| Error::invalid(format!("session token: {error}")))
    }

    /// Takes in a reply's token. `sent` is the token that the request carried.
    pub(crate) fn observe(&self, sent: &Bytes, reply: &Bytes) -> Result<()> {
        if reply.is_empty() {
            return Ok(());
        }
        let mut token = self.token.lock();
        // The server has joined what was sent; nothing else happened meanwhile.
        if token.is_empty() || *token == *sent || *token == *reply {
            *token = reply.clone();
            return Ok(());
        }
        *token = join(&token, reply)?;
        Ok(())
    }
}

fn join(left: &Bytes, right: &Bytes) -> Result<Bytes> {
    tombolo_core::token::merge(&[left, right])
        .map_err(|error| Error::protocol(format!("session token: {error}")))
}
