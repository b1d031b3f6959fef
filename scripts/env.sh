# Sourced by the other scripts: where things are, and one cache of compiled code for all clones.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/tombolo/target}"
[ -d "$HOME/.cargo/bin" ] && PATH="$HOME/.cargo/bin:$PATH"
export PATH
# RocksDB is compiled once for every set of features it is built with. All scripts build the
# whole workspace with its tests, so that there is only one.
BUILD_ARGS=(--workspace --all-targets)
