//! `completions` and `version`: about the program itself.

use crate::exit::{Exit, Failure};
use crate::io::Io;
use crate::output::{Format, json};
use clap_complete::Shell;
use serde::Serialize;
use std::io::Write;

/// Prints completions for a shell, to be sourced or put where it looks for them
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Example:
  tombolo completions bash > ~/.local/share/bash-completion/completions/tombolo")]
pub struct Completions {
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Prints the version
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = "\
Example:
  tombolo version -o json")]
pub struct Version {
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub output: Option<Format>,
}

#[derive(Serialize)]
struct VersionJson {
    name: &'static str,
    version: &'static str,
}

pub(crate) fn completions(args: &Completions, root: &mut clap::Command, io: &mut Io) -> Exit {
    // Collected first: the generator panics on a failing writer, such as a closed pipe.
    let mut script = Vec::new();
    let name = root.get_name().to_owned();
    clap_complete::generate(args.shell, root, name, &mut script);
    match io.out.write_all(&script) {
        Ok(()) => Exit::Ok,
        Err(_) => Exit::Other,
    }
}

pub(crate) fn version(args: &Version, io: &mut Io) -> Result<Exit, Failure> {
    let version = env!("CARGO_PKG_VERSION");
    match args.output {
        Some(format @ (Format::Json | Format::Jsonl)) => {
            json(&mut io.out, format, &VersionJson { name: "tombolo", version })?;
        }
        Some(Format::Table | Format::Raw) | None => writeln!(io.out, "tombolo {version}")?,
    }
    Ok(Exit::Ok)
}
