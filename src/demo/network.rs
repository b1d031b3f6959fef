//! The network between the regions of a demo: every direction by name, and the faults on it.
//!
//! For each ordered pair of regions there is one [`Direction`], and for each node of the target
//! region one proxy address, which is what the other region's configuration names. Traffic inside
//! a region takes no proxy.
//!
//! Invariant: a request that names an unknown region changes nothing.
//!
//! Not here: how bytes are delayed or lost (`proxy`).

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::latency::Latencies;
use crate::proxy::{self, Direction, Mode};

/// All directions between the regions of a demo, and their proxies.
///
/// Dropping it ends every proxy and connection.
#[derive(Debug)]
pub struct Network {
    regions: Vec<String>,
    directions: BTreeMap<(String, String), Direction>,
    proxies: TaskTracker,
    shutdown: CancellationToken,
}

/// How a partition is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Cut only from the first region to the second.
    #[serde(default)]
    pub one_way: bool,
    /// Reset connections instead of letting them hang.
    #[serde(default)]
    pub reset: bool,
}

impl Cut {
    fn mode(self) -> Mode {
        if self.reset { Mode::Reset } else { Mode::Blackhole }
    }
}

/// One direction, for people and scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionStatus {
    /// Region at the start.
    pub from: String,
    /// Region at the end.
    pub to: String,
    /// Whether bytes pass.
    pub mode: Mode,
    /// One-way delay in milliseconds.
    pub delay_ms: u64,
    /// Open connections that `from` made to `to`.
    pub connections: u64,
    /// Bytes delivered since the start, on connections of either side.
    pub delivered_bytes: u64,
}

/// A request that cannot mean anything; the caller corrects the name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// No region has this name.
    #[error("no region `{name}`; the regions are {known}")]
    UnknownRegion {
        /// As given.
        name: String,
        /// Names that exist.
        known: String,
    },
    /// Both names are the same region.
    #[error("`{name}` twice: there is no link from a region to itself")]
    SameRegion {
        /// As given.
        name: String,
    },
}

impl Network {
    /// All directions between `regions`, passing, with half the round trip each. No proxy yet.
    #[must_use]
    pub fn new(regions: &[String], latencies: &Latencies) -> Self {
        let mut directions = BTreeMap::new();
        for from in regions {
            for to in regions.iter().filter(|to| *to != from) {
                let delay = latencies.between(from, to) / 2;
                directions.insert((from.clone(), to.clone()), Direction::new(delay));
            }
        }
        Self {
            regions: regions.to_vec(),
            directions,
            proxies: TaskTracker::new(),
            shutdown: CancellationToken::new(),
        }
    }

    /// Opens a loopback address through which region `from` reaches `target` in region `to`.
    ///
    /// # Errors
    /// An unknown pair of regions is [`io::ErrorKind::InvalidInput`]; the rest is the system's.
    pub async fn open(&self, from: &str, to: &str, target: SocketAddr) -> io::Result<SocketAddr> {
        let find = |from: &str, to: &str| {
            self.directions
                .get(&(from.to_owned(), to.to_owned()))
                .cloned()
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no such direction"))
        };
        let (there, back) = (find(from, to)?, find(to, from)?);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shutdown = self.shutdown.clone();
        self.proxies.spawn(proxy::serve(listener, target, there, back, shutdown));
        Ok(address)
    }

    /// Cuts two regions from each other.
    ///
    /// # Errors
    /// [`NetworkError`]; nothing is changed then.
    pub fn partition(&self, a: &str, b: &str, cut: Cut) -> Result<(), NetworkError> {
        self.check_pair(a, b)?;
        for (from, to) in if cut.one_way { vec![(a, b)] } else { vec![(a, b), (b, a)] } {
            self.set_mode(|pair| pair == (from, to), cut.mode());
        }
        Ok(())
    }

    /// Cuts one region from all others.
    ///
    /// # Errors
    /// [`NetworkError::UnknownRegion`]; nothing is changed then.
    pub fn isolate(&self, region: &str, cut: Cut) -> Result<(), NetworkError> {
        self.check(region)?;
        self.set_mode(|(from, to)| from == region || (to == region && !cut.one_way), cut.mode());
        Ok(())
    }

    /// Cuts every region from every other.
    pub fn partition_all(&self) {
        self.set_mode(|_| true, Mode::Blackhole);
    }

    /// Ends all cuts. Connections that a cut has touched are reset.
    pub fn heal(&self) {
        self.set_mode(|_| true, Mode::Pass);
    }

    /// Sets the round trip between two regions.
    ///
    /// # Errors
    /// [`NetworkError`]; nothing is changed then.
    pub fn set_latency(&self, a: &str, b: &str, round_trip: Duration) -> Result<(), NetworkError> {
        self.check_pair(a, b)?;
        for ((from, to), direction) in &self.directions {
            if (from == a && to == b) || (from == b && to == a) {
                direction.set_delay(round_trip / 2);
            }
        }
        Ok(())
    }

    /// All directions, in order of names.
    #[must_use]
    pub fn status(&self) -> Vec<DirectionStatus> {
        self.directions
            .iter()
            .map(|((from, to), direction)| DirectionStatus {
                from: from.clone(),
                to: to.clone(),
                mode: direction.mode(),
                delay_ms: u64::try_from(direction.delay().as_millis()).unwrap_or(u64::MAX),
                connections: direction.connections(),
                delivered_bytes: direction.delivered_bytes(),
            })
            .collect()
    }

    /// Ends all proxies and waits until their ports are free.
    pub async fn close(&self) {
        self.shutdown.cancel();
        self.proxies.close();
        self.proxies.wait().await;
    }

    fn set_mode(&self, affects: impl Fn((&str, &str)) -> bool, mode: Mode) {
        for ((from, to), direction) in &self.directions {
            if affects((from, to)) {
                direction.set_mode(mode);
            }
        }
    }

    fn check(&self, region: &str) -> Result<(), NetworkError> {
        if self.regions.iter().any(|known| known == region) {
            return Ok(());
        }
        Err(NetworkError::UnknownRegion { name: region.into(), known: self.regions.join(", ") })
    }

    fn check_pair(&self, a: &str, b: &str) -> Result<(), NetworkError> {
        self.check(a)?;
        self.check(b)?;
        if a == b {
            return Err(NetworkError::SameRegion { name: a.into() });
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> Network {
        let regions = ["us", "eu", "ap"].map(str::to_owned);
        Network::new(&regions, &"40ms,us-eu=80ms".parse().unwrap())
    }

    fn cut_pairs(network: &Network) -> Vec<String> {
        let cut = network.status().into_iter().filter(|direction| direction.mode != Mode::Pass);
        cut.map(|direction| format!("{}>{}", direction.from, direction.to)).collect()
    }

    #[test]
    fn each_direction_gets_half_the_round_trip() {
        let status = network().status();

        let delays: Vec<_> = status.iter().map(|d| (&*d.from, &*d.to, d.delay_ms)).collect();
        assert_eq!(delays.len(), 6);
        assert!(delays.contains(&("us", "eu", 40)) && delays.contains(&("eu", "us", 40)));
        assert!(delays.contains(&("ap", "eu", 20)));
    }

    #[test]
    fn a_partition_cuts_both_directions_of_one_pair_until_healed() {
        let network = network();

        network.partition("us", "eu", Cut::default()).unwrap();
        assert_eq!(cut_pairs(&network), ["eu>us", "us>eu"]);

        network.heal();
        assert!(cut_pairs(&network).is_empty());
    }

    #[test]
    fn a_one_way_partition_cuts_one_direction() {
        let network = network();

        network.partition("us", "eu", Cut { one_way: true, reset: true }).unwrap();

        assert_eq!(cut_pairs(&network), ["us>eu"]);
    }

    #[test]
    fn isolation_cuts_all_directions_of_one_region() {
        let network = network();

        network.isolate("eu", Cut::default()).unwrap();

        assert_eq!(cut_pairs(&network), ["ap>eu", "eu>ap", "eu>us", "us>eu"]);
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones_and_change_nothing() {
        let network = network();

        let unknown = network.partition("us", "mars", Cut::default()).unwrap_err();
        let same = network.set_latency("us", "us", Duration::ZERO).unwrap_err();

        assert_eq!(unknown.to_string(), "no region `mars`; the regions are us, eu, ap");
        assert!(same.to_string().contains("itself"));
        assert!(cut_pairs(&network).is_empty());
    }

    #[test]
    fn latency_changes_both_directions_of_one_pair() {
        let network = network();

        network.set_latency("ap", "us", Duration::from_millis(200)).unwrap();

        let changed = network.status().into_iter().filter(|d| d.delay_ms == 100);
        assert_eq!(changed.map(|d| d.from).collect::<Vec<_>>(), ["ap", "us"]);
    }
}
