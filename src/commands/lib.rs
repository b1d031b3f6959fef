//! The user's commands: data, control, load and dump, over the client library.
//!
//! The binary flattens [`DataCommand`] into its own command and hands it to [`run`] with the
//! process's [`Io`]. Everything a command reads or writes goes through [`Io`].
//!
//! Invariants:
//! * Data goes to standard output, everything else to standard error.
//! * Exit codes and JSON shapes are interface; `docs/operate/cli.md` has them, tests hold them.
//! * Memory does not grow with the data.
//!
//! Not here: `server`, `demo` and `bench`, and how calls reach a leader (`tombolo-client`).

mod await_replication;
mod commit;
mod conflict;
mod connection;
mod ctl;
mod data;
mod dump;
mod exit;
mod io;
mod lines;
mod load;
mod meta;
mod mutate;
mod output;
mod progress;
mod region;
mod repair;
mod session_file;
mod status;
mod verify;
mod watch;
mod write;

pub use await_replication::AwaitReplication;
pub use commit::Commit;
pub use conflict::ConflictCommand;
pub use connection::Connection;
pub use ctl::{Ctl, CtlCommand, LinkCommand, NamespaceCommand, Rule};
pub use data::{Delete, Get, Put, Scan};
pub use dump::Dump;
pub use exit::{Exit, Failure};
pub use io::Io;
pub use lines::LineFormat;
pub use load::{Load, LoadFormat};
pub use meta::{Completions, Version};
pub use mutate::Mutate;
pub use output::{Format, KeyEncoding};
pub use region::RegionCommand;
pub use session_file::SessionOptions;
pub use watch::Watch;
pub use write::WriteOptions;

use std::io::Write;

/// A command that needs no more than a connection.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum DataCommand {
    Put(Put),
    Get(Get),
    Delete(Delete),
    Scan(Scan),
    Mutate(Mutate),
    Watch(Watch),
    Commit(Commit),
    AwaitReplication(AwaitReplication),
    Load(Load),
    Dump(Dump),
    Ctl(Ctl),
    Completions(Completions),
    Version(Version),
}

/// Runs a command to its end, or until the user interrupts. Errors are printed on `io.err`.
///
/// `root` is the program's whole command line, from which completions are made.
pub async fn run(command: DataCommand, root: clap::Command, mut io: Io) -> Exit {
    let format = command.error_format();
    let is_list = matches!(command, DataCommand::Scan(_) | DataCommand::Dump(_));
    // These end by themselves when interrupted: they have to say how to continue.
    let ends_itself = matches!(command, DataCommand::Load(_) | DataCommand::Watch(_));
    let interrupt = if ends_itself {
        Box::pin(std::future::pending())
    } else {
        std::mem::replace(&mut io.interrupt, Box::pin(std::future::pending()))
    };
    let ended = tokio::select! {
        ended = Box::pin(dispatch(&command, root, &mut io)) => ended,
        () = interrupt => Err(Failure::Interrupted(String::new())),
    };
    let ended = match (ended, io.out.flush()) {
        (Ok(_), Err(error)) => Err(error.into()),
        (ended, _) => ended,
    };
    match ended {
        // Whoever reads a list may stop early.
        Err(Failure::PipeClosed) if is_list => Exit::Ok,
        Ok(exit) => exit,
        Err(failure) => {
            // Where standard error is gone there is nobody left to tell.
            failure.print(format, &mut io.err).ok();
            io.err.flush().ok();
            failure.exit()
        }
    }
}

async fn dispatch(
    command: &DataCommand,
    mut root: clap::Command,
    io: &mut Io,
) -> Result<Exit, Failure> {
    match command {
        DataCommand::Put(args) => data::put(args, io).await,
        DataCommand::Get(args) => data::get(args, io).await,
        DataCommand::Delete(args) => data::delete(args, io).await,
        DataCommand::Scan(args) => data::scan(args, io).await,
        DataCommand::Mutate(args) => mutate::mutate(args, io).await,
        DataCommand::Watch(args) => watch::watch(args, io).await,
        DataCommand::Commit(args) => commit::commit(args, io).await,
        DataCommand::AwaitReplication(args) => await_replication::await_replication(args, io).await,
        DataCommand::Load(args) => load::load(args, io).await,
        DataCommand::Dump(args) => dump::dump(args, io).await,
        DataCommand::Ctl(args) => ctl::ctl(args, io).await,
        DataCommand::Completions(args) => Ok(meta::completions(args, &mut root, io)),
        DataCommand::Version(args) => meta::version(args, io),
    }
}

impl DataCommand {
    /// Errors are JSON only where JSON was asked for.
    fn error_format(&self) -> Format {
        let asked = match self {
            Self::Put(args) => args.connection.output,
            Self::Get(args) => args.connection.output,
            Self::Delete(args) => args.connection.output,
            Self::Scan(args) => args.connection.output,
            Self::Mutate(args) => args.connection.output,
            Self::Watch(args) => args.connection.output,
            Self::Commit(args) => args.connection.output,
            Self::AwaitReplication(args) => args.connection.output,
            Self::Load(args) => args.connection.output,
            Self::Dump(args) => args.connection.output,
            Self::Ctl(args) => args.connection().output,
            Self::Completions(_) => None,
            Self::Version(args) => args.output,
        };
        asked.unwrap_or(Format::Table)
    }
}
