#!/usr/bin/env bash
# Everything that only a GPU can tell, what is wanted most first: kernel tests, training beside PyTorch in turns, the same gradients as the
# CPU, the speed of each kernel, larger and smaller models, all tests on the device, compute-sanitizer, other models, and more as time allows.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'TEXT'
Usage: scripts/gpu_check.sh [--after ALL.tgz] OUT [BUNDLE]
  OUT      folder for summary.txt (what happened, and a table of what was measured beside what must be), summary.json (that table),
           machine.txt, mesa.json, kernels.json, torch.jsonl, and all.tgz with every log and result
  BUNDLE   what scripts/bundle.sh made, its folder or archive without .tar.gz (default: bundle; without one build/ is built first)
  --after  goes on after the call that left this all.tgz (default: OUT/all.tgz, if it is there). What passed is not run again, but numbers
           are those of one build: another one measures all anew. What failed is run again by another build, or where MESA_CHECK_ONLY
           names its group; what was left out, or took too long (now with twice the time), is.
Environment:
  MESA_CHECK_SECONDS   time for this call (default 560); another call with --after runs what is left. Less where the machine goes earlier:
                       what is being measured when it goes is lost
  MESA_CHECK_ONLY      groups to run, of: smoke numbers parity kernels models tests sanitizer further more (default: all, in this order)
Exit codes: 0 all passed and every number that was measured is reached; 1 something failed or misses its number and nothing is left to
            run, or nothing could be run (no GPU, a broken bundle); 2 wrong usage; 3 something was left out or took too long: call again
            with --after, whether or not something failed.
TEXT
}
after=
[[ ${1:-} == -h || ${1:-} == --help ]] && { usage; exit 0; }
[[ ${1:-} != --after ]] || { after=${2:-}; [[ -f $after ]] || { echo "gpu_check.sh: --after: no file '$after'" >&2; exit 2; }; shift 2; }
(($# == 1 || $# == 2)) || { usage >&2; exit 2; }
[[ $1 != -* ]] || { echo "gpu_check.sh: unknown option '$1'" >&2; usage >&2; exit 2; }
out=$1 bundle=${2:-bundle}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
[[ -n $after || ! -f $out/all.tgz ]] || after=$out/all.tgz
PATH=$PATH:/usr/local/cuda/bin
logs=$(mktemp -d)  # what comes back is few files: the logs go into one archive, which also tells a later call what is done
table() { python3 tools/gpu_summary.py "$logs" "$out" >"$logs/table.txt" 2>&1; }
keep() {
  ! command -v python3 >/dev/null || table
  cp "$logs/machine.txt" "$out" 2>/dev/null  # not yet there where the call is refused
  tar -czf "$out/all.tgz.new" --exclude=./runs/*/checkpoints -C "$logs" . && mv "$out/all.tgz.new" "$out/all.tgz"
}
[[ -z $after ]] || tar -xzf "$after" -C "$logs" || { echo "gpu_check.sh: $after cannot be read" >&2; exit 2; }
cp "$logs/summary.txt" "$out/summary.txt" 2>/dev/null || : >"$out/summary.txt"
trap 'keep; rm -rf "$logs"' EXIT
budget=${MESA_CHECK_SECONDS:-560}
groups="smoke numbers parity kernels models tests sanitizer further more"
only=${MESA_CHECK_ONLY:-$groups}
for group in $only; do
  [[ " $groups " == *" $group "* ]] || { echo "gpu_check.sh: no group '$group'" >&2; exit 2; }
done
left_out=0 failed=0 not_here=0
left() { echo $((budget - SECONDS)); }
say() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$out/summary.txt" "$logs/summary.txt"; }
leave_out() { say "LEFT OUT  $*"; left_out=1; }
cannot_run() { say "NOT HERE  $*"; not_here=1; }

# The last word on a stage, "CODE BUILD", by lines "STAGE CODE BUILD" of all calls.
known() { awk -v stage="$1" '$1 == stage {code = $2; by = $3} END {print code, by}' "$logs/stages" 2>/dev/null; }
# True of a stage that is not run again: it has passed, or failed by this build and nobody asks for it.
settled() {
  local code by
  read -r code by <<<"$(known "$1")"
  [[ $code == 0 || (-n $code && $code != 124 && $by == "$build" && -z ${MESA_CHECK_ONLY:-}) ]]
}
# What went wrong, in a line: the files of tests that failed, or the last line.
complaint() { { grep -E '^==== .*: exit code [1-9]' "$1" || tail -n 1 "$1"; } | cut -c1-160 | head -n 8 | paste -sd' '; }

# attempt STAGE SECONDS command...: runs it within the time that is left, output to STAGE.log. Limits are about twice what is expected, so
# what has less than half of its limit is left to another call. What took too long before gets twice the time, or as much of that as a call
# has: it needs three quarters of what it had, and fails if it takes too long again.
attempt() {
  local stage=$1 limit=$2 enough=$((3 * $2 / 4)) code before start=$SECONDS
  shift 2
  before=$(known "$stage") code=${before% *}
  if settled "$stage"; then
    ((code == 0)) || { say "FAILED    $stage (before, by this build)"; failed=1; }
    return "$code"
  fi
  [[ $code != 124 ]] || limit=$((2 * limit))
  local given=$(($(left) < limit ? $(left) : limit))
  if ((given < (code == 124 ? enough : limit / 2))); then leave_out "$stage: no time left"; return 1; fi
  timeout -k 5 "$given" "$@" >"$logs/$stage.log" 2>&1 </dev/null
  code=$?
  ((code != 137 || SECONDS - start < given)) || code=124  # else it was killed for another reason, such as memory
  if ((code == 0)) && grep -qE 'No test cases matched|No tests ran' "$logs/$stage.log"; then code=99; fi
  if ((code == 124 && given < enough)); then leave_out "$stage: cut short after $given s"; return 1; fi
  ((code != 124)) || [[ $before != "124 $build" ]] || code=125  # a second time: another call would not end it
  echo "$stage $code $build" >>"$logs/stages"
  if ((code == 0)); then say "ok        $stage ($((SECONDS - start)) s)"
  elif ((code == 124)); then say "TIME OUT  $stage after $given s"; left_out=1
  else say "FAILED    $stage (exit code $code): $(complaint "$logs/$stage.log")"; failed=1; fi
  keep
  return $code
}

{
  date -u
  timeout 30 nvidia-smi 2>&1
  nvcc --version 2>&1 | tail -n 2
  git rev-parse HEAD 2>/dev/null
} >>"$logs/machine.txt"
# Where the CUDA libraries may be: the packages that PyTorch brings, so that both take the same, or the toolkit. For Mesa's programs alone.
libraries=$(python3 -c 'import glob, site
print("".join(f + ":" for s in site.getsitepackages() for f in sorted(glob.glob(s + "/nvidia/*/lib"))))' 2>/dev/null)/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
mesa=(env "LD_LIBRARY_PATH=$libraries")

# Of an archive and its folder, which an earlier call may have left, the archive counts.
unpack() {
  local archive=$bundle.tar.gz sum
  [[ -f $archive ]] || return 0
  sum=$(sha256sum <"$archive")
  [[ ! -d $bundle || $(cat "$bundle/.archive" 2>/dev/null) != "$sum" ]] || return 0
  rm -rf "$bundle"
  mkdir -p "$bundle" && tar -xzf "$archive" -C "$bundle" --strip-components 1 && echo "$sum" >"$bundle/.archive"
}
unpack || { rm -rf "$bundle"; say "FAILED    $bundle.tar.gz cannot be unpacked"; exit 1; }
if [[ -x $bundle/bin/mesa-train ]]; then
  bin=$(cd "$bundle/bin" && pwd) device_tests=$bundle/tests/device_tests.txt
else
  timeout -k 5 300 bash -c "cmake --preset release && cmake --build build -j$(nproc)" >"$logs/build.log" 2>&1 </dev/null ||
    { say "FAILED    build (exit code $?): $(complaint "$logs/build.log")"; exit 1; }
  bin=$PWD/build/bin device_tests=build/device_tests.txt
fi
version=$(timeout 60 "${mesa[@]}" "$bin/mesa-train" --version 2>&1) || { say "FAILED    $bin/mesa-train does not start: $(tail -n 1 <<<"$version")"; exit 1; }
unusable=$(sed -nE 's/^cuda .*, but //p' <<<"$version")
[[ -z $unusable ]] || { say "FAILED    no GPU to check: $unusable"; exit 1; }
# A build is told from others by its commit and by what is in it; what is measured, and the scripts that measure PyTorch, belong to it.
build=$(head -n 1 <<<"$version" | tr ' ' '_')_$(cat "$bin/mesa-tests" "$bin"/../*/libmesa.so "$bin"/../libmesa.so bench/*.yaml tools/peers/*.py \
  2>/dev/null | sha256sum | cut -c1-8)
printf '%s\n' "$version" >>"$logs/machine.txt"

# Numbers of another build leave the table; tests that it passed have passed.
measured_by=$(cat "$logs/build" 2>/dev/null)
if [[ -n $measured_by && $measured_by != "$build" ]]; then
  mkdir -p "$logs/before/$measured_by"
  cp "$logs/stages" "$logs/before/$measured_by" 2>/dev/null
  mv "$logs"/*.json "$logs"/{mesa,torch,graph,rank,kernels,parity}*.log "$logs/runs" "$logs/before/$measured_by" 2>/dev/null
  sed -i -E '/^(smoke|tests|memcheck|racecheck) /!d' "$logs/stages" 2>/dev/null
fi
echo "$build" >"$logs/build"
say "build     $build${after:+, after what stands above}"
[[ -s $device_tests ]] || { say "FAILED    there is no $device_tests, which lists the tests"; exit 1; }

export MESA_TEST_SOURCE_DIR=$PWD MESA_CONFIG_DIR=$PWD/configs
# A file's tests in a process of its own, perhaps under a TOOL; those that passed in an earlier attempt at the stage are not run again.
test_file() {  # STAGE SPEC FILE TOOL...
  local stage=$1 name=$3 spec="[#$3]~[data]$2" log=$logs/$1.$3 code
  shift 3
  grep -qx "$name" "$logs/$stage.passed" 2>/dev/null && return 0
  env LD_LIBRARY_PATH="$libraries" MESA_TEST_DEVICE=cuda OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive "$@" "$bin/mesa-tests" -\# "$spec" >"$log" 2>&1
  code=$?
  if ((code == 0)) && grep -qE 'No test cases matched|No tests ran' "$log"; then code=99; fi
  ((code != 0)) || echo "$name" >>"$logs/$stage.passed"
  { printf '==== %s: exit code %d\n' "$name" "$code" | cat - "$log"; rm "$log"; }
  return $((code != 0))
}
export -f test_file
export libraries bin logs
test_files() {  # STAGE SECONDS PATTERN SPEC TOOL...: several side by side
  local stage=$1 limit=$2 pattern=$3 spec=$4
  shift 4
  grep -P "$pattern" "$device_tests" | sed 's|.*/||' | sort -u >"$logs/$stage.files"
  attempt "$stage" "$limit" xargs -a "$logs/$stage.files" -P 8 -I{} bash -c 'test_file "$@"' - "$stage" "$spec" {} "$@"
}

compare() {  # MODEL BATCH ROUND [torch_step.py's options]: Mesa, also with tuned products, then PyTorch eager and compiled, on the same work
  local model=$1 batch=$2 round=$3 part need=225
  shift 3
  local parts=("mesa_${model}_$round" "mesa_tuned_${model}_$round" "torch_${model}_$round")
  if ! settled "${parts[0]}" || ! settled "${parts[1]}" || ! settled "${parts[2]}"; then  # all are of the same minutes on the same machine
    [[ $(known "${parts[2]}") != 124\ * ]] || need=375
    if (($(left) < need)); then leave_out "${model}_$round: no time left for Mesa and PyTorch together"; return; fi
    for part in "${parts[@]}"; do
      sed -i -E "/^$part 0 /d" "$logs/stages" 2>/dev/null
      rm -f "$logs/$part.json" "$logs/$part.log"
    done
  fi
  local bench=("${mesa[@]}" "$bin/mesa-bench" --config "bench/$model.yaml" --device cuda --steps 20 --warmup 5 --set "train.batch_size=$batch"
    --set train.precision=bf16)
  attempt "mesa_${model}_$round" 90 "${bench[@]}" --storage exact,int8,int4 --json "$logs/mesa_${model}_$round.json"
  attempt "mesa_tuned_${model}_$round" 60 "${bench[@]}" --storage exact --set train.autotune=true --json "$logs/mesa_tuned_${model}_$round.json"
  attempt "torch_${model}_$round" 300 python3 tools/peers/torch_step.py --model "$model" --batch "$batch" --steps 20 --compile both "$@"
}

short_run() {  # STAGE SECONDS CONFIG SETTING...: a run of mesa-train on random pictures
  local stage=$1 limit=$2 config=$3 settings=() setting
  shift 3
  [[ $(known "$stage") != 0\ * ]] || return 0
  for setting in data.kind=random train.epochs=1 data.test_size=8 train.eval_batch_size=8 data.workers=12 "$@"; do settings+=(--set "$setting"); done
  rm -rf "$logs/runs/$stage"
  attempt "$stage" "$limit" "${mesa[@]}" "$bin/mesa-train" --config "$config" --device cuda --output "$logs/runs/$stage" "${settings[@]}"
  local code=$?
  rm -rf "$logs/runs/$stage/checkpoints"
  return $code
}

run_smoke() { test_files smoke 80 '^kernels/' '~[slow]'; }

run_numbers() { compare deit_small 128 1; }

run_models() {
  compare deit_base 128 1
  compare deit_tiny 256 1
  compare deit_small 128 2
  # The largest batch: PyTorch's by trying, Mesa's by its plan, which a run of it then has to keep.
  attempt torch_largest 120 python3 tools/peers/torch_step.py --model deit_base --largest-batch "$memory"
  local int4=(train.precision=bf16 storage=int4) fit=$logs/mesa_fit.log
  attempt mesa_fit 10 "${mesa[@]}" "$bin/mesa-train" --config bench/deit_base.yaml --dry-run --fit "$memory" --device cuda "${int4[@]/#/--set=}" || return
  local batch
  batch=$(sed -n 's/^largest batch within .*: //p' "$fit")
  short_run mesa_largest 40 bench/deit_base.yaml "${int4[@]}" "train.batch_size=$batch" "data.train_size=$((3 * batch))"
}

run_parity() { attempt parity 40 env MESA_TEST_DEVICE=cuda "${mesa[@]}" "$bin/mesa-tests" -s "device: every gradient*,device: in bf16*"; }

run_kernels() {
  attempt kernels 60 "${mesa[@]}" "$bin/mesa-bench" --config bench/deit_small.yaml --device cuda --set train.batch_size=128 \
    --set train.precision=bf16 --kernels --json "$logs/kernels.json"
  attempt mesa_profile 60 "${mesa[@]}" "$bin/mesa-bench" --config bench/deit_small.yaml --device cuda --set train.batch_size=128 \
    --set train.precision=bf16 --storage exact,int8,int4 --steps 3 --warmup 3 --profile --json "$logs/mesa_profile.json"
}

# Of the kernels' tests all but the sweeps over matrix products and convolutions, which are cuBLASLt's and cuDNN's code, and long. A tensor
# has a block for itself, since memcheck sees no access from one into another within a block. What passes counts for something only if a
# fault made on purpose is found; on virtual machines the tool may refuse the GPU.
run_sanitizer() {
  local code check=(compute-sanitizer --error-exitcode 9 --launch-timeout 60 --report-api-errors no --destroy-on-device-error kernel)
  [[ $(known memcheck) != 0\ * || $(known racecheck) != 0\ * ]] || return 0
  if ! command -v compute-sanitizer >/dev/null; then cannot_run "sanitizer: there is no compute-sanitizer on this machine"; return; fi
  if (($(left) < 90)); then leave_out "sanitizer: no time left"; return; fi
  timeout -k 5 60 env MESA_TEST_DEVICE=cuda MESA_OWN_BLOCKS=1 "${mesa[@]}" "${check[@]}" --tool memcheck "$bin/mesa-tests" "[planted]" \
    >"$logs/planted.log" 2>&1 </dev/null
  code=$?
  if ! grep -q 'Invalid __global__ read' "$logs/planted.log"; then
    if ((code == 0)); then say "FAILED    sanitizer: memcheck does not find a fault made on purpose (planted.log)"; failed=1
    else cannot_run "sanitizer: compute-sanitizer does not run ($(grep -m 1 '=== Error' "$logs/planted.log" || echo "exit code $code"))"; fi
    return
  fi
  test_files memcheck 150 '^kernels/(?!matmul_|conv_)' '~[slow]' env MESA_OWN_BLOCKS=1 "${check[@]}" --tool memcheck
  test_files racecheck 150 '^kernels/(?!matmul_|conv_)' '~[slow]' "${check[@]}" --tool racecheck
}

run_tests() { test_files tests 150 . '~[disk]~[planted]'; }

run_further() {
  compare swin_tiny 128 1
  compare resnet50 128 1 --channels-last
  # The host against the GPU: passes of small batches, handed over one by one and recorded.
  local graph model
  for model in deit_tiny resnet18; do
    for graph in false true; do
      short_run "graph_${model}_$graph" 40 "bench/$model.yaml" train.precision=bf16 train.batch_size=16 data.train_size=6400 \
        train.log_interval=40 "train.cuda_graph=$graph"
    done
  done
}

run_more() {
  # Attention by cuDNN, and copies to the host's memory and back beside the work, each beside our own kernels and memory.
  printf 'storage:\n  - {match: "*", codec: host}\n' >"$logs/host.yaml"
  local small=("${mesa[@]}" "$bin/mesa-bench" --config bench/deit_small.yaml --device cuda --steps 20 --warmup 5 --set train.batch_size=128
    --set train.precision=bf16)
  attempt mesa_cudnn_attention 50 "${small[@]}" --storage exact,int8 --set model.attention=cudnn --json "$logs/mesa_cudnn_attention.json"
  attempt mesa_codec_host 50 "${small[@]}" --storage "exact,$logs/host.yaml" --json "$logs/mesa_codec_host.json"
  # One rank alone, and with all that several have: NCCL, buckets, the wire; and with its part, here all, of a shared optimizer.
  local setup port folder here= setups=(alone connected shared)
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])' 2>/dev/null) || port=29500
  local alone=("${mesa[@]}") connected=(RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 "MASTER_PORT=$port")
  for folder in ${libraries//:/ } $(ldconfig -p 2>/dev/null | sed -n 's|.*libnccl.so.2 .* => \(.*\)/[^/]*|\1|p'); do
    [[ ! -e $folder/libnccl.so.2 ]] || here=1
  done
  compgen -G "$bin/../libmesa_nccl.so" >/dev/null || compgen -G "$bin/../*/libmesa_nccl.so" >/dev/null || here=
  [[ -n $here ]] || { cannot_run "ranks: there is no libnccl.so.2, or the build has no libmesa_nccl.so"; setups=(alone); }
  for setup in "${setups[@]}"; do
    local mesa=("${alone[@]}")
    [[ $setup == alone ]] || mesa+=("${connected[@]}")
    short_run "rank_$setup" 60 bench/deit_small.yaml train.precision=bf16 train.batch_size=128 data.train_size=7680 train.log_interval=10 \
      "train.shard=$([[ $setup == shared ]] && echo optimizer || echo none)"
  done
  compare deit_small 128 3
  attempt torch_max_autotune 300 python3 tools/peers/torch_step.py --model deit_small --batch 128 --steps 20 --compile --mode max-autotune-no-cudagraphs
}

memory=24e9
for group in $groups; do
  [[ " $only " != *" $group "* ]] || "run_$group"
done

# The table; a number that is missed is a failure as well.
if ! command -v python3 >/dev/null; then cannot_run "the table: there is no python3 on this machine"
else
  table || failed=1
  tee -a "$out/summary.txt" <"$logs/table.txt"
fi
outcome="all passed"
((!not_here)) || outcome="all passed that can run here"
((!failed)) || outcome="SOMETHING FAILED"
if ((left_out)); then say "$outcome; something was left out: call again, with --after $out/all.tgz"; exit 3; fi
say "$outcome"
exit "$failed"
