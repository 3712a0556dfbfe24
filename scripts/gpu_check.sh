#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call: tests on the device, compute-sanitizer, the speed of each kernel, and training beside PyTorch.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: scripts/gpu_check.sh OUT [BUNDLE]
  OUT      folder for the summary, the kernels' table, PyTorch's results, and all logs and JSON in all.tgz
  BUNDLE   what scripts/bundle.sh made (default: bundle, if it is there; otherwise build/ is built first)
Environment:
  MESA_CHECK_SECONDS   time for all of it (default 560; two calls, `tests sanitizer` and `kernels training`, leave nothing out); what does not fit is left out and named in OUT/summary.txt
  MESA_CHECK_ONLY      stages to run, of: tests sanitizer kernels training (default: all)
Exit code: 0 if every stage that ran passed.
TEXT
}
[[ ${1:-} == -h || ${1:-} == --help ]] && { usage; exit 0; }
(($# == 1 || $# == 2)) || { usage >&2; exit 2; }
out=$1 bundle=${2:-bundle}
mkdir -p "$out"
out=$(cd "$out" && pwd)
logs=$(mktemp -d)  # all of them go into one archive
trap 'tar -czf "$out/all.tgz" -C "$logs" . && rm -rf "$logs"' EXIT
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
  timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
  local code=$?
  if ((code == 0)) && grep -qE 'No test cases matched|No tests ran' "$logs/$name.log"; then code=99; fi
  if ((code == 0)); then say "ok        $name ($((SECONDS - start)) s)"
  elif ((code == 124 || code == 137)); then say "TIME OUT  $name after $limit s"; failed=1
  else say "FAILED    $name (exit code $code): $(tail -n 1 "$logs/$name.log" | cut -c1-160)"; failed=1; fi
  return $code
}

: >"$out/summary.txt"
{
  date -u
  nvidia-smi 2>&1
  nvcc --version 2>&1 | tail -n 2
  git rev-parse HEAD 2>/dev/null
} >"$out/machine.txt"
# Where the CUDA libraries may be: the toolkit, or the packages that PyTorch brings. For Mesa's programs alone.
libraries=/usr/local/cuda/lib64$(python3 -c 'import glob, site
print("".join(":" + f for s in site.getsitepackages() for f in sorted(glob.glob(s + "/nvidia/*/lib"))))' 2>/dev/null)
mesa() { env LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$@"; }
export -f mesa
export libraries

if [[ ! -e $bundle && -f $bundle.tar.xz ]]; then tar -xJf "$bundle.tar.xz"; fi
if [[ -x $bundle/bin/mesa-train ]]; then
  bin=$(cd "$bundle/bin" && pwd)
  say "bundle    $bundle: $(mesa "$bin/mesa-train" --version 2>&1 | head -n 1)"
else
  attempt build 300 bash -c "cmake --preset release && cmake --build build -j$(nproc)" || { say "nothing to check"; exit 1; }
  bin=$PWD/build/bin
fi
mesa "$bin/mesa-train" --version >>"$out/machine.txt" 2>&1

export MESA_TEST_SOURCE_DIR=$PWD MESA_CONFIG_DIR=$PWD/configs
kernel_tests='[kernels],[codec]'
computing='[#gradient_test],[#case_codec_test],[#case_bytes_test],[#policy_test],[#decoded_attention_test],[#adamw_test],[#optimizer_test],[#vit_test],[#swin_test],[#pvt_test],[#resnet_test],[#golden_test],[#tape_test],[#device_test],[#trainer_test],[#plan_test],[#evaluate_test],[#benchmark_test]'
if wanted tests; then
  attempt tests_kernels 120 env MESA_TEST_DEVICE=cuda bash -c 'mesa "$@"' - "$bin/mesa-tests" "$kernel_tests"
  attempt tests_engine 150 env MESA_TEST_DEVICE=cuda bash -c 'mesa "$@"' - "$bin/mesa-tests" -\# "$computing"
fi
if wanted sanitizer && ! command -v compute-sanitizer >/dev/null; then
  say "LEFT OUT  sanitizer: there is no compute-sanitizer on this machine"
elif wanted sanitizer; then
  # The sweep over matrix products is cuBLASLt's code, and long.
  sanitize() {
    attempt "sanitizer_$1" 150 env MESA_TEST_DEVICE=cuda bash -c 'mesa "$@"' - compute-sanitizer --tool "$1" --error-exitcode 9 \
      --launch-timeout 60 "$bin/mesa-tests" -\# "$2"
  }
  sanitize memcheck '[kernels]~[#matmul_test]~[slow]'
  sanitize racecheck '[fused],[#norm_test],[#softmax_test],[#loss_test]'
fi
if wanted kernels; then
  attempt kernels 60 bash -c 'mesa "$@"' - "$bin/mesa-bench" --config bench/deit_small.yaml --device cuda --set train.batch_size=128 --set train.precision=bf16 --kernels \
    --json "$out/kernels.json" && cat "$logs/kernels.log"
fi
if wanted training; then
  # The same work in turns: A B A B.
  for round in 1 2; do
    for model in deit_small:128 deit_base:128 deit_tiny:256 swin_tiny:128 resnet50:128; do
      name=${model%:*} batch=${model#*:}
      attempt "mesa_${name}_$round" 60 bash -c 'mesa "$@"' - "$bin/mesa-bench" --config "bench/$name.yaml" --device cuda --storage exact,int8,int4 --steps 20 --warmup 5 \
        --set "train.batch_size=$batch" --set train.precision=bf16 --json "$logs/mesa_${name}_$round.json"
      layout=(); [[ $name != resnet* ]] || layout=(--channels-last)
      attempt "torch_${name}_$round" 60 python3 tools/peers/torch_step.py --model "$name" --batch "$batch" --steps 20 "${layout[@]}"
      attempt "torch_compile_${name}_$round" 90 python3 tools/peers/torch_step.py --model "$name" --batch "$batch" --steps 20 --compile "${layout[@]}"
    done
  done
  # The host against the GPU: passes of a small model at a small batch, handed over one by one and recorded.
  for round in 1 2; do
    for graph in false true; do
      attempt "graph_${graph}_$round" 60 bash -c 'mesa "$@"' - "$bin/mesa-train" --config bench/deit_tiny.yaml --device cuda \
        --output "$logs/graph_${graph}_$round" --set data.kind=random --set train.batch_size=16 --set train.precision=bf16 \
        --set data.train_size=3200 --set data.test_size=16 --set train.epochs=1 --set train.cuda_graph=$graph &&
        say "cuda_graph $graph: $(grep -o '"images_per_second":[^,]*' "$logs/graph_${graph}_$round/summary.json" || true)"
    done
  done
  attempt torch_largest_batch 60 python3 tools/peers/torch_step.py --model deit_base --largest-batch 24e9
  attempt mesa_largest_batch 30 bash -c 'mesa "$@"' - "$bin/mesa-train" --config bench/deit_base.yaml --dry-run --fit 24e9 --device cuda \
    --set train.precision=bf16 --set storage=int4 && tail -n 1 "$logs/mesa_largest_batch.log" | tee -a "$out/summary.txt"
  grep -h . "$logs"/torch_*.log | grep '^{' >"$out/torch.jsonl"
fi
say "$( ((failed)) && echo 'SOMETHING FAILED' || echo 'all that ran passed')"
exit $failed
