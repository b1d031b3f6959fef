//! Lists of runs.

use crate::plan::{Nemesis, Plan, Rule, Sabotage, Workload};

/// One line of a suite: workload, nemesis, regions, nodes a region, seconds.
type Line = (Workload, Nemesis, usize, u16, u64);

/// At most ten minutes on two cores: every workload, every nemesis, 2, 3 and 5 regions.
const QUICK: [Line; 15] = [
    (Workload::Register, Nemesis::None, 2, 3, 10),
    (Workload::Register, Nemesis::Partition, 2, 3, 26),
    (Workload::Register, Nemesis::LeaderKill, 2, 3, 26),
    (Workload::Register, Nemesis::Pause, 2, 3, 20),
    (Workload::Register, Nemesis::Isolation, 2, 3, 12),
    (Workload::GSet, Nemesis::None, 5, 1, 10),
    (Workload::GSet, Nemesis::Isolation, 3, 3, 24),
    (Workload::GSet, Nemesis::LeaderKill, 2, 3, 20),
    (Workload::GSet, Nemesis::Bridge, 5, 1, 24),
    (Workload::GSet, Nemesis::LongIsolation, 2, 3, 25),
    (Workload::Delete, Nemesis::Partition, 2, 3, 20),
    (Workload::Delete, Nemesis::Bridge, 3, 3, 24),
    (Workload::Delete, Nemesis::LongIsolation, 3, 1, 25),
    (Workload::Delete, Nemesis::RepairKill, 2, 3, 30),
    (Workload::Delete, Nemesis::Storm, 3, 3, 22),
];

/// Lies that must be found out, each in a short run.
const LIES: [(Workload, Nemesis, Sabotage); 3] = [
    // Only a node that is cut off is far enough behind.
    (Workload::Register, Nemesis::Partition, Sabotage::LocalReads),
    (Workload::GSet, Nemesis::None, Sabotage::LostAdd),
    (Workload::Delete, Nemesis::None, Sabotage::Resurrection),
];
const LIE_SECS: u64 = 8;

/// The runs of the quick suite, made from one plan that gives the rest.
pub(crate) fn quick(base: &Plan) -> Vec<Plan> {
    let rules = [Rule::Lww, Rule::Siblings];
    let lies = LIES.into_iter().map(|(workload, nemesis, lie)| Plan {
        workload,
        nemesis,
        sabotage: Some(lie),
        secs: LIE_SECS,
        ..base.clone()
    });
    let honest =
        QUICK.into_iter().zip(0..).map(|((workload, nemesis, regions, nodes, secs), number)| {
            // Registers belong to one region each, so that the rule does not matter.
            let rule = match workload {
                Workload::Register => Rule::Lww,
                Workload::GSet | Workload::Delete => rules[number % rules.len()],
            };
            let seed = base.seed + number as u64;
            Plan { workload, nemesis, regions, nodes, secs, rule, seed, ..base.clone() }
        });
    lies.chain(honest).collect()
}
