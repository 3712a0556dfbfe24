#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call: tests on the device, compute-sanitizer, the speed of each kernel, and training beside PyTorch.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: scripts/gpu_check.sh OUT [BUNDLE]
  OUT      folder for logs, tables and JSON
  BUNDLE   what scripts/bundle.sh made (default: bundle, if it is there; otherwise build/ is built first)
Environment:
  MESA_CHECK_SECONDS   time for all of it (default 560); what does not fit is left out and named in OUT/summary.txt
  MESA_CHECK_ONLY      stages to run, of: tests sanitizer kernels training (default: all)
Exit code: 0 if every stage that ran passed.
TEXT
}
[[ ${1:-} == -h || ${1:-} == --help ]] && { usage; exit 0; }
(($# == 1 || $# == 2)) || { usage >&2; exit 2; }
out=$1 bundle=${2:-bundle}
mkdir -p "$out"
budget=${MESA_CHECK_SECONDS:-560}
only=${MESA_CHECK_ONLY:-tests sanitizer kernels training}
failed=0
left() { echo $((budget - SECONDS)); }
say() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$out/summary.txt"; }
wanted() { [[ " $only " == *" $1 "* ]]; }

# attempt NAME SECONDS command...: runs it within the time that is left, output to OUT/NAME.log
attempt() {
  local name=$1 limit=$2
  shift 2
  (($(left) < limit)) && limit=$(left)
  if ((limit < 5)); then say "LEFT OUT  $name: no time left"; return 1; fi
  local start=$SECONDS
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  if ((code == 0)); then say "ok        $name ($((SECONDS - start)) s)"
  elif ((code == 124 || code == 137)); then say "TIME OUT  $name after $limit s"; failed=1
  else say "FAILED    $name (exit code $code): $(tail -n 1 "$out/$name.log" | cut -c1-160)"; failed=1; fi
  return $code
}

: >"$out/summary.txt"
{
  date -u
  nvidia-smi 2>&1
  nvcc --version 2>&1 | tail -n 2
  git rev-parse HEAD 2>/dev/null
} >"$out/machine.txt"
export LD_LIBRARY_PATH="/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

if [[ -x $bundle/bin/mesa-train ]]; then
  bin=$PWD/$bundle/bin
  say "bundle    $bundle: $("$bin/mesa-train" --version | head -n 1)"
else
  attempt build 300 bash -c "cmake --preset release && cmake --build build -j$(nproc)" || { say "nothing to check"; exit 1; }
  bin=$PWD/build/bin
fi
"$bin/mesa-train" --version >>"$out/machine.txt"

export MESA_TEST_SOURCE_DIR=$PWD MESA_CONFIG_DIR=$PWD/configs
kernel_tests='[kernels]'
computing='[#gradient_test],[#case_codec_test],[#case_bytes_test],[#policy_test],[#decoded_attention_test],[#adamw_test],[#vit_test],[#golden_test],[#tape_test],[#device_test],[#fused_attention_test]'
if wanted tests; then
  attempt tests_kernels 120 env MESA_TEST_DEVICE=cuda "$bin/mesa-tests" "$kernel_tests"
  attempt tests_engine 150 env MESA_TEST_DEVICE=cuda "$bin/mesa-tests" -\# "$computing"
fi
if wanted sanitizer && command -v compute-sanitizer >/dev/null; then
  sanitize() { attempt "sanitizer_$1" 80 env MESA_TEST_DEVICE=cuda compute-sanitizer --tool "$1" --error-exitcode 9 --launch-timeout 60 "$bin/mesa-tests" "${@:2}"; }
  sanitize memcheck "$kernel_tests"
  sanitize racecheck "[fused]" "[codec]" "layer_norm follows its definition" "softmax*" "sum*"
fi
if wanted kernels; then
  attempt kernels 60 "$bin/mesa-bench" --config bench/deit_small.yaml --device cuda --set train.batch_size=128 --set train.precision=bf16 --kernels \
    --json "$out/kernels.json" && cat "$out/kernels.log"
fi
if wanted training; then
  # The same work in turns: A B A B.
  for round in 1 2; do
    for model in deit_small:128 deit_base:128 deit_tiny:256; do
      name=${model%:*} batch=${model#*:}
      attempt "mesa_${name}_$round" 60 "$bin/mesa-bench" --config "bench/$name.yaml" --device cuda --storage exact,int8,int4 --steps 20 --warmup 5 \
        --set "train.batch_size=$batch" --set train.precision=bf16 --json "$out/mesa_${name}_$round.json"
      attempt "torch_${name}_$round" 60 python3 tools/peers/torch_vit.py --model "$name" --batch "$batch" --steps 20
      attempt "torch_compile_${name}_$round" 90 python3 tools/peers/torch_vit.py --model "$name" --batch "$batch" --steps 20 --compile
    done
  done
  attempt torch_largest_batch 60 python3 tools/peers/torch_vit.py --model deit_base --largest-batch 24e9
  attempt mesa_largest_batch 30 "$bin/mesa-train" --config deit_b.yaml --dry-run --device cuda --set data.kind=random --set train.precision=bf16 --set storage=int4
fi
say "$( ((failed)) && echo 'SOMETHING FAILED' || echo 'all that ran passed')"
exit $failed
