//! What `put`, `delete`, `mutate` and `commit` have in common: the id and the session of the write, and
//! what is said when nobody knows whether it was applied.

use crate::connection::Connection;
use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::unbase64;
use crate::session_file::{KeptSession, SessionOptions};
use bytes::Bytes;
use tombolo_client::{Error, Keyspace, RequestId};

/// Options of every write.
#[derive(Clone, Debug, clap::Args)]
pub struct WriteOptions {
    /// Wait until this many other regions have the write
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub ack_regions: u32,
    /// Repeat a write of unknown outcome: the one of this id is applied once (CLIENT-NUMBER, from the
    /// error)
    #[arg(long, value_name = "ID", value_parser = parse_request_id)]
    pub request_id: Option<RequestId>,
    #[command(flatten)]
    pub session: SessionOptions,
}

/// A write about to be sent.
pub(crate) struct Writing {
    pub(crate) keys: Keyspace,
    pub(crate) id: RequestId,
    session: KeptSession,
}

impl WriteOptions {
    pub(crate) async fn begin(&self, connection: &Connection, io: &Io) -> Result<Writing, Failure> {
        let session = self.session.open()?;
        let (client, keys) = connection.connect(io, None).await?;
        let id = self.request_id.unwrap_or_else(|| client.next_request_id());
        Ok(Writing { keys: session.enter(keys), id, session })
    }
}

impl Writing {
    /// Waits for the answer and prints it. If the write stands, with or without its acknowledgements,
    /// the session is kept.
    pub(crate) async fn finish<T>(
        self,
        write: impl IntoFuture<Output = Result<T, Error>>,
        io: &mut Io,
        print: impl FnOnce(&T, &mut Io) -> Result<Exit, Failure>,
    ) -> Result<Exit, Failure> {
        let answer = write.await;
        let stands = matches!(answer, Ok(_) | Err(Error::Deadline { dot: Some(_), .. }));
        let said = match answer {
            Ok(answer) => print(&answer, io),
            Err(error) if error.outcome_unknown() => {
                Err(Failure::OutcomeUnknown { error, id: self.id })
            }
            Err(error) => Err(Failure::Remote(error)),
        };
        if stands { self.session.end(said, io) } else { said }
    }
}

/// Reads `--context-token`.
pub(crate) fn parse_context(text: &str) -> Result<Bytes, Failure> {
    unbase64(text).map_err(|error| Failure::Usage(format!("--context-token: {error}")))
}

/// The context of a write: an empty one would replace whatever is there.
pub(crate) fn some_context(context: Bytes) -> Result<Bytes, Failure> {
    if context.is_empty() {
        let text = "the context is empty; leave the flag out to replace whatever is there";
        return Err(Failure::Usage(text.into()));
    }
    Ok(context)
}

/// Reads `--request-id`.
fn parse_request_id(text: &str) -> Result<RequestId, String> {
    let numbers = text.split_once('-').map(|(client, number)| (client.parse(), number.parse()));
    match numbers {
        Some((Ok(client), Ok(number))) => Ok(RequestId { client, number }),
        _ => Err("two numbers with a - between them, as in 4711-1".to_owned()),
    }
}

/// Writes it as [`parse_request_id`] reads it.
pub(crate) fn show_request_id(id: &RequestId) -> String {
    format!("{}-{}", id.client, id.number)
}
