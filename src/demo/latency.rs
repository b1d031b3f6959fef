//! How far apart the regions of a demo are: parsing of `--latency`.
//!
//! A latency is a *round trip*, the number that `ping` would print between two regions. The proxy
//! spends half of it on each direction.
//!
//! Not here: spending it (`proxy`), changing it while the demo runs (`network`).

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

/// Longest round trip that is accepted; more would only look like a cut.
pub const MAX_ROUND_TRIP: Duration = Duration::from_secs(60);

/// Round trips between regions: one for all pairs, and exceptions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    everywhere: Duration,
    /// Keyed by the pair in order of names, since a round trip has no direction.
    pairs: BTreeMap<(String, String), Duration>,
}

impl Latencies {
    /// The same round trip between any two regions.
    #[must_use]
    pub fn uniform(round_trip: Duration) -> Self {
        Self { everywhere: round_trip, pairs: BTreeMap::new() }
    }

    /// The round trip between two regions, in either order.
    #[must_use]
    pub fn between(&self, a: &str, b: &str) -> Duration {
        self.pairs.get(&ordered(a, b)).copied().unwrap_or(self.everywhere)
    }

    /// Fails on the first pair that names a region not in `regions`.
    ///
    /// # Errors
    /// [`LatencyError::UnknownRegion`].
    pub fn check(&self, regions: &[String]) -> Result<(), LatencyError> {
        for (a, b) in self.pairs.keys() {
            for name in [a, b] {
                if !regions.contains(name) {
                    return Err(LatencyError::UnknownRegion {
                        name: name.clone(),
                        known: regions.join(", "),
                    });
                }
            }
        }
        Ok(())
    }
}

impl FromStr for Latencies {
    type Err = LatencyError;

    /// Parses `40ms`, `us-eu=80ms,us-ap=140ms`, or `40ms,us-eu=80ms`.
    fn from_str(text: &str) -> Result<Self, LatencyError> {
        let mut latencies = Self::default();
        let mut everywhere = None;
        for part in text.split(',').map(str::trim) {
            match part.split_once('=') {
                None => {
                    if everywhere.replace(parse_round_trip(part)?).is_some() {
                        return Err(LatencyError::TwoDefaults);
                    }
                }
                Some((pair, round_trip)) => {
                    let pair = pair.trim();
                    let (a, b) = pair
                        .split_once('-')
                        .filter(|(a, b)| !a.is_empty() && !b.is_empty() && a != b)
                        .ok_or_else(|| LatencyError::Pair { pair: pair.into() })?;
                    let round_trip = parse_round_trip(round_trip.trim())?;
                    if latencies.pairs.insert(ordered(a, b), round_trip).is_some() {
                        return Err(LatencyError::PairTwice { pair: pair.into() });
                    }
                }
            }
        }
        latencies.everywhere = everywhere.unwrap_or_default();
        Ok(latencies)
    }
}

/// Parses one round trip such as `80ms`.
///
/// # Errors
/// [`LatencyError::Duration`] when it is not a duration, [`LatencyError::TooLong`] above
/// [`MAX_ROUND_TRIP`].
pub fn parse_round_trip(text: &str) -> Result<Duration, LatencyError> {
    let round_trip = humantime::parse_duration(text)
        .map_err(|source| LatencyError::Duration { text: text.into(), source })?;
    if round_trip > MAX_ROUND_TRIP {
        return Err(LatencyError::TooLong { text: text.into() });
    }
    Ok(round_trip)
}

fn ordered(a: &str, b: &str) -> (String, String) {
    let (low, high) = if a <= b { (a, b) } else { (b, a) };
    (low.to_owned(), high.to_owned())
}

/// What is wrong with a latency; the caller corrects its text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LatencyError {
    /// Not a duration.
    #[error("`{text}` is not a duration such as 40ms: {source}")]
    Duration {
        /// As given.
        text: String,
        /// What the parser says.
        source: humantime::DurationError,
    },
    /// Above the maximum.
    #[error("`{text}` is longer than the 60 s that a round trip may take here")]
    TooLong {
        /// As given.
        text: String,
    },
    /// Not two different regions.
    #[error("`{pair}` is not a pair of two regions such as us-eu")]
    Pair {
        /// As given.
        pair: String,
    },
    /// A pair is given twice.
    #[error("the pair `{pair}` is given twice")]
    PairTwice {
        /// The second mention.
        pair: String,
    },
    /// More than one duration without a pair.
    #[error("more than one latency is given for all pairs")]
    TwoDefaults,
    /// A pair names a region that the demo does not have.
    #[error("no region `{name}`; the regions are {known}")]
    UnknownRegion {
        /// As given.
        name: String,
        /// Names that exist.
        known: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn one_duration_holds_between_all_regions() {
        let latencies: Latencies = "40ms".parse().unwrap();

        assert_eq!(latencies.between("us", "eu"), millis(40));
        assert_eq!(latencies.between("ap", "us"), millis(40));
    }

    #[test]
    fn a_pair_has_one_round_trip_in_either_order_and_overrides_the_default() {
        let latencies: Latencies = "us-eu=80ms, 10ms ,ap-us=1s".parse().unwrap();

        assert_eq!(latencies.between("eu", "us"), millis(80));
        assert_eq!(latencies.between("us", "ap"), millis(1000));
        assert_eq!(latencies.between("eu", "ap"), millis(10));
    }

    #[test]
    fn pairs_alone_leave_the_others_without_latency() {
        let latencies: Latencies = "us-eu=80ms".parse().unwrap();

        assert_eq!(latencies.between("us", "ap"), Duration::ZERO);
    }

    #[test]
    fn bad_latencies_are_refused_with_the_part_that_is_wrong() {
        for (text, part) in [
            ("fast", "fast"),
            ("", "``"),
            ("us=80ms", "`us`"),
            ("us-us=80ms", "`us-us`"),
            ("us-eu=80", "`80`"),
            ("us-eu=10ms,eu-us=20ms", "eu-us"),
            ("10ms,20ms", "more than one"),
            ("2h", "60 s"),
        ] {
            let error = text.parse::<Latencies>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_pair_with_an_unknown_region_names_the_known_ones() {
        let latencies: Latencies = "us-mars=80ms".parse().unwrap();

        let error = latencies.check(&["us".into(), "eu".into()]).unwrap_err();

        assert_eq!(error.to_string(), "no region `mars`; the regions are us, eu");
    }
}
