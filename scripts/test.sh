#!/usr/bin/env bash
# Everything that must hold before a change lands: a Release build with all tests on each instruction set, the packages,
# the sanitizers, and the fuzzers. Stops at the first failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: scripts/test.sh [--quick]
  --quick   Release build and its tests only: no sanitizers, no fuzzing
Environment:
  MESA_BUILD_ROOT     where build/, build-asan/ and build-fuzz/ go (default: the repository)
  MESA_NO_CUDA=1      for machines without nvcc: otherwise it is an error if the CUDA sources were not compiled
  MESA_FUZZ_SECONDS   time for each fuzzer (default 15)
  MESA_SHARED_DATA    folder with real data sets and hostile files (default: ../shared/data); tests that need them warn where it is absent
TEXT
}

quick=0
for argument in "$@"; do
  case "$argument" in
    --quick) quick=1 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "test.sh: unknown argument '$argument'" >&2; usage >&2; exit 2 ;;
  esac
done

root=${MESA_BUILD_ROOT:-$PWD}
jobs=$(nproc)
log=$(mktemp)
stage_name="" stage_start=0
report=()

finish_stage() {
  [[ -n $stage_name ]] || return 0
  local tests
  tests=$(grep -E '^[0-9]+% tests passed' "$log" | tail -n 1) || true
  report+=("$(printf '%6d s  %-34s %s' $((SECONDS - stage_start)) "$stage_name" "$tests")")
  stage_name=""
}
stage() {
  finish_stage
  : >"$log"
  stage_name=$1 stage_start=$SECONDS
  printf '\n==== %s ====\n' "$1"
}
finish() {
  local status=$?
  if ((status != 0)) && [[ -n $stage_name ]]; then
    printf '\n==== FAILED in: %s, after %d s (exit code %d) ====\n' "$stage_name" $((SECONDS - stage_start)) "$status" >&2
  fi
  rm -f "$log"
}
trap finish EXIT

# Tests run side by side. Passive: OpenMP threads that spin while they wait would take the cores from each other's programs.
export OMP_WAIT_POLICY=passive
run_ctest() {  # its summary goes into the report; more tests than there are cores, since those of ranks wait for much of their time
  ctest --output-on-failure --no-tests=error -j $((jobs + 2)) "$@" | tee "$log"
}

stage "packages"
if ((quick)); then scripts/deps.sh; else scripts/deps.sh --test; fi

stage "Release: configure and build"
cmake --preset release -B "$root/build" -DCMAKE_CUDA_ARCHITECTURES="80-real;90"  # every architecture that docs/cuda.md names
cmake --build "$root/build" -j "$jobs"

# Without nvcc, or without Boost.Context for the emulated GPU, all of CUDA would be missing from a green run.
if [[ ${MESA_NO_CUDA:-0} == 1 ]]; then
  echo "test.sh: MESA_NO_CUDA=1: whether the CUDA sources were compiled is not looked at"
else
  for built in kernels/cuda/*.cu kernels/cuda/*.cpp; do
    built=$root/build/CMakeFiles/mesa_cuda.dir/$built.o
    [[ -s $built ]] || { echo "test.sh: the build has no $built; on a machine without a CUDA toolkit (nvcc, cuDNN) set MESA_NO_CUDA=1" >&2; exit 1; }
  done
  [[ -x $root/build/bin/mesa-tests-emulated ]] || { echo "test.sh: the build has no mesa-tests-emulated (libboost-context-dev)" >&2; exit 1; }
fi

stage "Release: tests"
run_ctest --test-dir "$root/build" -LE isa

stage "Release: lower instruction sets"
run_ctest --test-dir "$root/build" -L isa

stage "Release: packages"
scripts/check_package.sh "$root/build"

if ((!quick)); then
  stage "sanitizers: configure and build"
  cmake --preset asan -B "$root/build-asan"
  cmake --build "$root/build-asan" -j "$jobs"

  stage "sanitizers: tests"
  # Leak detection needs ptrace, which some containers refuse.
  leaks=1
  echo 'int main() {}' | g++ -x c++ - -fsanitize=address -o "$root/build-asan/leak_probe"
  ASAN_OPTIONS=detect_leaks=1 "$root/build-asan/leak_probe" >/dev/null 2>&1 || leaks=0
  ((leaks)) || echo "leaks cannot be detected on this machine; the other checks run"
  # A request for too much memory must reach our own error, so the allocator returns null as malloc does.
  export ASAN_OPTIONS="detect_leaks=$leaks:allocator_may_return_null=1:strict_string_checks=1:detect_stack_use_after_return=1"
  export UBSAN_OPTIONS=print_stacktrace=1
  run_ctest --test-dir "$root/build-asan"

  stage "fuzzing: configure and build"
  cmake -S tests/fuzz -B "$root/build-fuzz" -G Ninja -DCMAKE_CXX_COMPILER=clang++ -DMESA_FUZZ_SECONDS="${MESA_FUZZ_SECONDS:-15}" \
    -DMESA_SHARED_DATA="${MESA_SHARED_DATA:-}"
  cmake --build "$root/build-fuzz" -j "$jobs"

  stage "fuzzing"
  run_ctest --test-dir "$root/build-fuzz" -j "$jobs"  # a fuzzer has a core for its time
fi

finish_stage
printf '\n==== all passed in %d min %02d s ====\n' $((SECONDS / 60)) $((SECONDS % 60))
printf '%s\n' "${report[@]}"
