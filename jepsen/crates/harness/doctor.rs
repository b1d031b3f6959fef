//! Whether this machine can do what the suite needs; what is missing is said, never passed over.

use crate::plan::NetworkKind;
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// The best network that can be had here, and why it is not a better one.
pub(crate) fn network() -> (NetworkKind, Option<String>) {
    match tombolo_jepsen_netsim::obstacle() {
        None => (NetworkKind::Namespaces, None),
        Some(obstacle) => (NetworkKind::LoopbackProxy, Some(obstacle)),
    }
}

/// Prints what is there; true if everything is.
pub(crate) fn examine(program: &Path, out: &mut dyn Write) -> anyhow::Result<bool> {
    let mut complete = true;
    let mut line = |name: &str, obstacle: Option<String>| -> std::io::Result<()> {
        complete &= obstacle.is_none();
        match obstacle {
            None => writeln!(out, "ok       {name}"),
            Some(why) => writeln!(out, "MISSING  {name}: {why}"),
        }
    };
    line("network namespaces with a switch", network().1)?;
    line(&format!("server {}", program.display()), version(program).err())?;
    line("two cores", cores().err())?;
    if !complete {
        writeln!(out, "Runs that need what is missing are reported as unknown, never as valid.")?;
    }
    Ok(complete)
}

fn version(program: &Path) -> Result<(), String> {
    let output =
        Command::new(program).arg("--version").output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(output.status.to_string()) }
}

fn cores() -> Result<(), String> {
    match std::thread::available_parallelism() {
        Ok(cores) if cores.get() >= 2 => Ok(()),
        Ok(cores) => Err(format!("{cores} only")),
        Err(error) => Err(error.to_string()),
    }
}
