#!/usr/bin/env bash
#SBATCH --job-name=mesa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A training run under Slurm that goes on after its time limit: docs/distributed.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: sbatch [options of sbatch] scripts/slurm.sh [arguments of mesa-train]
For example:  sbatch --nodes=4 scripts/slurm.sh --config deit_s.yaml --set data.path=/imagenet
Each task is a rank; srun starts them. 300 seconds before the time limit (--signal=B:USR1@300) the run saves and exits with 75, and the
job is put into the queue again, where it resumes. After the loss of a rank it is, too, three times at most.
Environment:
  MESA_TRAIN      the program (default: build/bin/mesa-train of the folder where sbatch was called; without one, the installed mesa-train)
  MESA_OUTPUT     folder of the run, seen by all nodes (default: runs/<job name>-<job id>, which stay the same in the queue)
  MESA_MPI        srun's plugin (default: pmix; srun --mpi=list tells)
  MESA_RESTARTS   how often a lost rank may restart the job (default: 3)
Exit codes: those of mesa-train; 2 where there is no job.
TEXT
}
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage; exit 0; fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "slurm.sh: this is no Slurm job; start it with sbatch" >&2
  usage >&2
  exit 2
fi

output=${MESA_OUTPUT:-runs/${SLURM_JOB_NAME:-mesa}-$SLURM_JOB_ID}
program=build/bin/mesa-train
[[ -x $program ]] || program=mesa-train
limit=0 step=""
trap 'limit=1; [[ -z $step ]] || kill -USR1 "$step"' USR1  # srun passes it on to the ranks
srun --mpi="${MESA_MPI:-pmix}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${MESA_TRAIN:-$program}" --output "$output" --resume auto "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do  # the signal ended the wait, not the run
  code=0
  wait "$step" || code=$?
done

again() {
  echo "slurm.sh: $1; the job goes into the queue again and resumes $output"
  scontrol requeue "$SLURM_JOB_ID"
}
# 75 without the signal was somebody's wish (scancel), and stays.
if ((code == 75 && limit)); then
  again "the time is up"
elif ((code == 69 || code == 137)) && ((${SLURM_RESTART_COUNT:-0} < ${MESA_RESTARTS:-3})); then
  again "a rank was lost (exit code $code)"
fi
exit "$code"
