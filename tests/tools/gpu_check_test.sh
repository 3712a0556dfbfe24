#!/usr/bin/env bash
# scripts/gpu_check.sh where there is no GPU: the programs that it calls only note that they were called, and answer, sleep or fail as told.
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export STUB
STUB=$(mktemp -d)
trap 'rm -rf "$STUB"' EXIT
complain() { echo "gpu_check_test.sh: $*" >&2; for log in "$STUB"/out*/summary.txt; do sed 's/^/  /' "$log"; done >&2; exit 1; }

# STUB_SLEEP, STUB_FAIL: which calls, as a regular expression; STUB_RATE: images/s of exact storage; STUB_BUILD, STUB_CUDA: what --version says.
mkdir -p "$STUB/path" "$STUB/bundle/bin" "$STUB/bundle/tests"
printf '%s\n' kernels/matmul_test kernels/norm_test models/device_test train/plan_test >"$STUB/bundle/tests/device_tests.txt"
REAL_PYTHON=$(command -v python3 || true)
export REAL_PYTHON
cat >"$STUB/stub" <<'STUB'
#!/usr/bin/env bash
name=${0##*/} json= storage= output=
call="$name $*"
[[ $call == *--version* ]] || echo "$call" >>"$STUB/calls"
if tar -tzf "$STUB/out/all.tgz" 2>/dev/null | grep -q checkpoints; then touch "$STUB/checkpoints_kept"; fi
[[ -z ${STUB_SLEEP:-} || ! $call =~ $STUB_SLEEP ]] || exec sleep 1000
[[ -z ${STUB_FAIL:-} || ! $call =~ $STUB_FAIL ]] || { echo "no luck"; exit 1; }
arguments=("$@")
for ((i = 0; i < $#; ++i)); do
  case ${arguments[i]} in --json) json=${arguments[i + 1]} ;; --storage) storage=${arguments[i + 1]} ;; --output) output=${arguments[i + 1]} ;; esac
done
spread() { printf '{"minimum":%s,"median":%s,"maximum":%s}' "$1" "$1" "$1"; }
case $call in
  mesa-train*--version*) printf 'mesa 0.1.0 (%s)\ncuda      %s\n' "${STUB_BUILD:-stub}" "${STUB_CUDA:-stub of a GPU}" ;;
  mesa-train*--dry-run*) echo "largest batch within 24.0 GB: 1700" ;;
  mesa-train*)
    mkdir -p "$output/checkpoints/last"
    echo weights >"$output/checkpoints/last/model.safetensors"
    echo '{"steps": 3}' >"$output/summary.json"
    echo '{"step": 1, "loss": 6.9, "grad_norm": 1.5, "images_per_second": 3000, "data_wait": 0.01}' >"$output/metrics.jsonl"
    echo "GPU memory: 23900000000 bytes taken, 23000000000 in use at most" >"$output/log.txt" ;;
  mesa-bench*--kernels*)
    printf '{"copy_bytes_per_second":4e12,"kernels":[{"name":"gelu","bytes":1e6,"flops":0,"ms":%s,"of_copy":0.9}]}' "$(spread 1)" >"$json" ;;
  mesa-bench*)
    for policy in ${storage//,/ }; do
      policy=${policy##*/} kept=18e6
      case $policy in int8) kept=9e6 ;; int4) kept=5e6 ;; esac
      printf '%s{"storage":"%s","images_per_second":%s,"relative_speed":%s,"activation_bytes_per_image":%s,"profile":[{"name":"gelu","calls":12,"ms":0.25}]}' "${comma:-}" "${policy%.yaml}" \
        "$(spread "${STUB_RATE:-12000}")" "$(spread 0.95)" "$(spread $kept)"
      comma=,
    done | sed 's/^/{"policies":[/; s/$/]}/' >"$json" ;;
  mesa-tests*-s*)
    printf 'device: every gradient\n  0.00002 <= 0.0001\ndevice: in bf16 within\n  0.001 <= 0.02\n' ;;
  mesa-tests*) echo "All tests passed" ;;
  compute-sanitizer*planted*)
    [[ ${STUB_PLANTED:-found} == found ]] || { echo "========= Error: Device not supported"; exit "$STUB_PLANTED"; }
    echo "========= Invalid __global__ read of size 4 bytes"
    exit 1 ;;
  compute-sanitizer*) while [[ $1 != */mesa-tests ]]; do shift; done; exec "$@" ;;
  python3*torch_step.py*--largest-batch*) echo '{"compile": false, "largest_batch": 200}' ;;
  python3*torch_step.py*)
    for compiled in false true; do
      printf '{-# no result\n{"compile": %s, "images_per_second": %s, "unwaited_images_per_second": 7900, "saved_bytes": 3e9}\n' $compiled "$(spread 8000)"
    done ;;
  python3*) [[ -z $REAL_PYTHON ]] || exec "$REAL_PYTHON" "$@" ;;
esac
STUB
chmod +x "$STUB/stub"
for program in python3 compute-sanitizer nvidia-smi nvcc; do ln -s "$STUB/stub" "$STUB/path/$program"; done
mkdir "$STUB/lib" "$STUB/bundle/lib"
touch "$STUB/lib/libnccl.so.2" "$STUB/bundle/lib/libmesa_nccl.so"
for program in mesa-train mesa-bench mesa-tests; do ln -s "$STUB/stub" "$STUB/bundle/bin/$program"; done

# check CODE OUT [VARIABLE=VALUE...]: a call that has to end with this exit code, in time. AFTER: an all.tgz to go on after.
check() {
  local want=$1 out=$2 start=$SECONDS code=0
  shift 2
  rm -f "$STUB/calls" && touch "$STUB/calls"
  env PATH="$STUB/path:$PATH" LD_LIBRARY_PATH="$STUB/lib" "$@" "$source/scripts/gpu_check.sh" ${AFTER:+--after "$AFTER"} "$STUB/$out" "$STUB/bundle" >"$STUB/said" 2>&1 || code=$?
  ((code == want)) || { cat "$STUB/said" >&2; complain "$out ended with $code, not $want"; }
  ((SECONDS - start < 400)) || complain "$out took $((SECONDS - start)) s"
}
calls() { grep -cE "$1" "$STUB/calls" || true; }
said() { grep -qE "$1" "$STUB/said" || complain "nothing was said like: $1"; }

check 0 out
stages=$(sed -nE 's/^ *[0-9]+ s  ok +([a-z0-9_]+) .*/\1/p' "$STUB/out/summary.txt" | paste -sd' ')
pair() { echo "mesa_$1 mesa_tuned_$1 torch_$1"; }
want="smoke $(pair deit_small_1) parity kernels mesa_profile $(pair deit_base_1) $(pair deit_tiny_1) $(pair deit_small_2)"
want+=" torch_largest mesa_fit mesa_largest tests memcheck racecheck $(pair swin_tiny_1) $(pair resnet50_1)"
want+=" graph_deit_tiny_false graph_deit_tiny_true graph_resnet18_false graph_resnet18_true"
want+=" mesa_cudnn_attention mesa_codec_host rank_alone rank_connected rank_shared $(pair deit_small_3) torch_max_autotune"
[[ $stages == "$want" ]] || complain "the stages were '$stages'"
[[ $(calls 'compute-sanitizer .*racecheck.*#norm_test') == 1 && $(calls 'compute-sanitizer .*#matmul_test') == 0 ]] || complain "the sanitizer's files"
[[ ! -e $STUB/checkpoints_kept ]] || complain "checkpoints were packed among the logs"
[[ $(calls '^mesa-train .*batch_size=1700') == 1 ]] || complain "the largest batch was not run"
(($(find "$STUB/out" -type f | wc -l) <= 8)) || complain "more files came back than a person looks at"
if [[ -n $REAL_PYTHON ]]; then
  "$REAL_PYTHON" - "$STUB/out" <<'PYTHON' || complain "summary.json is not as it should be"
import json, sys
rows = {row["what"]: row for row in json.load(open(sys.argv[1] + "/summary.json"))}
missed = [row for row in rows.values() if row["must"] is not None and row["ok"] is not True]
assert not missed, missed
assert rows["DeiT-S, batch 128, bf16: exact / torch.compile"]["measured"] == 1.5
assert rows["DeiT-S, batch 128, bf16: exact / torch.compile"]["rounds"] == 3
assert rows["DeiT-S, batch 128, bf16: images/s, exact"]["lowest"] == 12000
assert rows["DeiT-S, batch 128, one rank: images/s through NCCL / alone"]["measured"] == 1
assert rows["DeiT-B, batch 128: exact, tuned / torch.compile"]["measured"] == 1.5
assert rows["DeiT-B in 24 GB: int4's / PyTorch eager's"]["measured"] == 8.5
assert abs(rows["DeiT-Ti, fp32: largest error of a gradient against the CPU"]["measured"] - 2e-5) < 1e-12
assert rows["DeiT-S, exact: ms a step, kernel 1"]["measured"] == 0.25
assert len(json.load(open(sys.argv[1] + "/mesa.json"))) == 17
PYTHON
fi

# What is done is not done again.
check 0 out
[[ $(calls '^(mesa-|compute-sanitizer|python3 tools/peers)') == 0 ]] || complain "a second call ran: $(cat "$STUB/calls")"

AFTER=$STUB/out/all.tgz check 0 out_elsewhere
[[ $(calls '^(mesa-|compute-sanitizer|python3 tools/peers)') == 0 ]] || complain "a second call in another folder ran: $(cat "$STUB/calls")"
[[ -z $REAL_PYTHON || $(diff -q "$STUB"/out{,_elsewhere}/summary.json) == "" ]] || complain "the results of the first call are gone"

# Without a GPU that can be used nothing is run, so that nothing has failed.
check 1 out_no_gpu STUB_CUDA='built for CUDA 13.0, but cuBLAS was not found'
said 'FAILED +no GPU to check: cuBLAS was not found'
[[ $(calls '^(mesa-|compute-sanitizer|python3 tools/peers)') == 0 ]] || complain "something ran: $(cat "$STUB/calls")"

# With little time what fits is run, and a second call goes on with the rest.
check 3 out_late MESA_CHECK_SECONDS=140 MESA_CHECK_ONLY="smoke numbers parity"
said 'ok +smoke' && said 'ok +parity' && said 'LEFT OUT +deit_small_1: no time left for Mesa and PyTorch together'
check 0 out_late
said 'ok +torch_deit_small_1'
[[ $(calls 'mesa-tests -s') == 0 && $(calls 'mesa-bench .*deit_small.*--storage exact,int8,int4') == 4 ]] || complain "the second call began anew"

# What is compared is measured together: where PyTorch's part has failed, Mesa's is measured again beside it.
check 1 out_apart MESA_CHECK_ONLY=numbers STUB_FAIL='torch_step'
said 'FAILED +torch_deit_small_1'
check 0 out_apart MESA_CHECK_ONLY=numbers
[[ $(calls '^mesa-bench') == 2 && $(calls 'torch_step') == 1 ]] || complain "not measured together: $(cat "$STUB/calls")"

# The same where one of Mesa's parts is run again, whose numbers would be of another minute.
check 1 out_parts MESA_CHECK_ONLY=numbers STUB_FAIL='autotune'
said 'FAILED +mesa_tuned_deit_small_1'
check 0 out_parts MESA_CHECK_ONLY=numbers
[[ $(calls '^mesa-bench') == 2 && $(calls 'torch_step') == 1 ]] || complain "not measured together: $(cat "$STUB/calls")"

# What hangs is ended: at the end of the call it is left to another one; at its own limit it gets more time next, twice as much or what the
# call has, and fails if that is too little.
check 3 out_slow MESA_CHECK_ONLY=models MESA_CHECK_SECONDS=6 STUB_SLEEP=dry-run
said 'LEFT OUT +mesa_fit: (cut short after|no time left)'
check 3 out_slow MESA_CHECK_ONLY=models MESA_CHECK_SECONDS=30 STUB_SLEEP=dry-run
said 'TIME OUT +mesa_fit after 10 s'
check 0 out_slow MESA_CHECK_ONLY=models
said 'ok +mesa_fit'
check 3 out_hung MESA_CHECK_ONLY=models MESA_CHECK_SECONDS=30 STUB_SLEEP=dry-run
check 3 out_hung MESA_CHECK_ONLY=models MESA_CHECK_SECONDS=17 STUB_SLEEP=dry-run
said 'FAILED +mesa_fit \(exit code 125\)'
# Tests that take too long have not failed, by the table neither.
if [[ -n $REAL_PYTHON ]]; then
  for code in 124 125; do
    mkdir "$STUB/logs$code"
    echo "smoke $code build" >"$STUB/logs$code/stages"
    missed=0
    (cd "$source" && "$REAL_PYTHON" tools/gpu_summary.py "$STUB/logs$code" "$STUB/logs$code") >"$STUB/said" || missed=1
    ((missed == (code == 125))) || { cat "$STUB/said" >&2; complain "tests that ended with $code are told wrongly"; }
  done
fi
# Where NCCL is missing a rank is measured alone, and nothing has failed.
rm "$STUB/bundle/lib/libmesa_nccl.so"
check 0 out_no_nccl MESA_CHECK_ONLY=more
said 'NOT HERE +ranks: ' && said 'ok +rank_alone'
[[ $(calls 'train.shard=optimizer') == 0 ]] || complain "a rank ran through an NCCL that is not there"
touch "$STUB/bundle/lib/libmesa_nccl.so"

# What failed fails again, without being run, until there is another build or its group is asked for; then only the files that failed are
# run. A failure does not hide that something was left out.
check 1 out_bad MESA_CHECK_ONLY="smoke parity" STUB_FAIL='#norm_test'
said 'FAILED +smoke .*norm_test: exit code'
check 3 out_bad MESA_CHECK_SECONDS=45
said 'FAILED +smoke \(before, by this build\)' && said 'SOMETHING FAILED; something was left out: call again, with --after'
[[ $(calls '#norm_test') == 0 ]] || complain "what failed was run again"
check 1 out_bad MESA_CHECK_ONLY=smoke STUB_FAIL='#norm_test'
[[ $(calls '#norm_test') == 1 ]] || complain "what failed was not run again where it was asked for"
check 0 out_bad MESA_CHECK_ONLY="smoke parity" STUB_BUILD=mended
[[ $(calls '#norm_test') == 1 && $(calls '#matmul_test') == 0 ]] || complain "files of tests were run anew: $(cat "$STUB/calls")"
# Numbers are of one build.
[[ $(calls 'mesa-tests -s') == 1 ]] || complain "the other build did not measure"
[[ $(tar -tzf "$STUB/out_bad/all.tgz" | grep -c 'before/mesa_0.1.0_(stub)_.*/parity.log') == 1 ]] || complain "the first build's numbers are gone"
[[ $(grep -c 'mesa 0.1.0 (' "$STUB/out_bad/machine.txt") == 4 ]] || complain "machines of earlier calls are not named"

# compute-sanitizer counts for something only where it finds what is wrong on purpose; there, no tensor shares its block.
check 0 out_refused MESA_CHECK_ONLY=sanitizer STUB_PLANTED=1
said 'NOT HERE +sanitizer: .*Device not supported' && said 'all passed that can run here'
[[ $(calls '#norm_test') == 0 ]] || complain "tests were run under a tool that was refused"
check 1 out_blind MESA_CHECK_ONLY=sanitizer STUB_PLANTED=0
said 'FAILED +sanitizer: memcheck does not find'
[[ $(calls 'memcheck') == 1 && $(calls 'racecheck') == 0 ]] || complain "tests were run under a tool that finds nothing"
check 0 out_refused MESA_CHECK_ONLY=sanitizer
said 'ok +racecheck'

if [[ -n $REAL_PYTHON ]]; then
  check 1 out_few MESA_CHECK_ONLY=numbers STUB_RATE=9000
  said 'images/s, exact +9,000 +>= 10,000 +MISSED'
fi
check 2 out_what MESA_CHECK_ONLY=all
[[ $(<"$STUB/said") == "gpu_check.sh: no group 'all'" ]] || complain "more was said than what is wrong: $(<"$STUB/said")"
[[ $("$source/scripts/gpu_check.sh" --help) == *'Exit codes'* ]] || complain "no help"
echo "gpu_check.sh keeps its time, its order, its exit codes and its memory"
