//! What a client calls next: the same sequence for the same client number, whatever the target.

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// Different values. Random bytes, so that no server gains by compressing them.
const VALUES: u8 = 64;
const SEED: u64 = 0x746f_6d62_6f6c_6f21;

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Put(Bytes, Bytes),
    Get(Bytes),
}

/// Shared by all clients of a run.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    keys: u64,
    reads_percent: u32,
    values: Vec<Bytes>,
}

/// One client's sequence of calls; never ends.
#[derive(Debug)]
pub(crate) struct Sequence {
    workload: Workload,
    random: StdRng,
}

impl Workload {
    pub(crate) fn new(keys: u64, value_bytes: u32, reads_percent: u32) -> Self {
        let mut random = StdRng::seed_from_u64(SEED);
        let value = |_| {
            let mut value = vec![0; value_bytes as usize];
            random.fill_bytes(&mut value);
            Bytes::from(value)
        };
        Self { keys, reads_percent, values: (0..VALUES).map(value).collect() }
    }

    pub(crate) fn sequence(&self, client: usize) -> Sequence {
        let random = StdRng::seed_from_u64(SEED ^ (client as u64 + 1));
        Sequence { workload: self.clone(), random }
    }

    /// Stores a key for the first time.
    pub(crate) fn preload(&self, number: u64) -> (Bytes, Bytes) {
        let value = number.to_le_bytes()[0] % VALUES;
        (key(number), self.values[usize::from(value)].clone())
    }

    pub(crate) fn keys(&self) -> u64 {
        self.keys
    }
}

impl Sequence {
    pub(crate) fn next(&mut self) -> Operation {
        let workload = &self.workload;
        let key = key(self.random.random_range(0..workload.keys));
        if self.random.random_range(0..100) < workload.reads_percent {
            return Operation::Get(key);
        }
        let value = self.random.random_range(0..VALUES);
        Operation::Put(key, workload.values[usize::from(value)].clone())
    }
}

/// 16 bytes.
fn key(number: u64) -> Bytes {
    Bytes::from(format!("bench-{number:010}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_calls_the_same_again_and_another_does_not() {
        let workload = Workload::new(1000, 16, 50);
        let calls = |client| {
            let mut sequence = workload.sequence(client);
            (0..100).map(|_| sequence.next()).collect::<Vec<_>>()
        };
        assert_eq!(calls(3), calls(3));
        assert_ne!(calls(3), calls(4));
    }

    #[test]
    fn shares_and_sizes_are_those_asked_for() {
        for (percent, expected) in [(0, 0..=0), (50, 4700..=5300), (100, 10_000..=10_000)] {
            let mut sequence = Workload::new(10, 100, percent).sequence(0);
            let mut gets = 0;
            for _ in 0..10_000 {
                match sequence.next() {
                    Operation::Get(key) => {
                        assert_eq!(key.len(), 16);
                        gets += 1;
                    }
                    Operation::Put(key, value) => assert_eq!((key.len(), value.len()), (16, 100)),
                }
            }
            assert!(expected.contains(&gets), "{percent} %: {gets}");
        }
    }
}
