#!/usr/bin/env bash
# From a fresh clone to a trained and evaluated vision transformer: packages, Release build, training, evaluation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'TEXT'
Usage: scripts/quickstart.sh [arguments of mesa-train]
Installs missing packages, builds into build/, trains configs/quickstart.yaml into runs/quickstart-<time>, and evaluates the result.
For example, with activations kept in 4 bits:  scripts/quickstart.sh --set storage=int4
TEXT
  exit 0
fi

say() { printf '\n==> %s\n' "$*"; }

say "1/4  Packages"
scripts/deps.sh

build=${MESA_BUILD_ROOT:+$MESA_BUILD_ROOT/}build
say "2/4  Release build in $build (the first takes a few minutes)"
start=$SECONDS
cmake --preset release -B "$build" >/dev/null
cmake --build "$build" -j "$(nproc)" --target mesa-train mesa-eval mesa-bench mesa-report
echo "built in $((SECONDS - start)) s"

run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
arguments=("$@")
for ((i = 0; i < $#; ++i)); do
  case "${arguments[i]}" in
    --output) run=${arguments[i + 1]:?--output needs a folder} ; unset "arguments[i]" "arguments[i + 1]"; break ;;
    --output=*) run=${arguments[i]#--output=}; unset "arguments[i]"; break ;;
  esac
done
say "3/4  Training a small vision transformer on the built-in shapes; everything it writes goes to $run"
start=$SECONDS
"$build/bin/mesa-train" --config configs/quickstart.yaml --output "$run" "${arguments[@]}" </dev/null
echo "trained in $((SECONDS - start)) s"

say "4/4  Evaluating the best checkpoint, which says by itself what model and data it needs"
"$build/bin/mesa-eval" "$run" </dev/null

cat <<TEXT

Done. What to try next:
  $build/bin/mesa-train --config configs/quickstart.yaml --dry-run --set storage=int4    what would be kept, site by site
  $build/bin/mesa-bench --config configs/quickstart.yaml --storage exact,int8,int4       speed, memory and gradient error
  $run/                                                          the run: report.html, summary.csv, memory.csv, checkpoints
TEXT
