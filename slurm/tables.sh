#!/usr/bin/env bash
# One run of a table per task of an array:    python launch/tables.py submit TABLE [...] --sbatch "options"
#
# That command writes a list of runs (a JSON list [run folder, arguments of launch/train.py ...] per line) and calls
#   sbatch --array=0-(lines - 1) [options] slurm/tables.sh LIST
# A run that was interrupted goes on from its newest checkpoint; one that another job or process holds is left to it.
# Logs: RUN_DIR.log (the job's words) and RUN_DIR/slurm/JOB-NODE.log. Other variables: slurm/common.sh.
#SBATCH --job-name=gcahng-tables
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300

# SLURM runs a copy of this script, from a folder of its own.
cd "${GCAHNG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" || exit 2
if [[ ! -f slurm/common.sh ]]; then
    echo "error: $PWD is not the project's folder (no slurm/common.sh). Submit from there, or set GCAHNG_HOME." >&2
    exit 2
fi
source slurm/common.sh

if [[ $# -ne 1 || ! -f "$1" || -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    echo "error: expected a list of runs and a task of an array. Use: python launch/tables.py submit TABLE" >&2
    exit 2
fi
# NUL ends each word, whatever letters it has.
mapfile -d '' -t words < <("$GCAHNG_PYTHON" -c '
import json, sys
lines = open(sys.argv[1], encoding="utf-8").read().splitlines()
number = int(sys.argv[2])
if number < len(lines):
    sys.stdout.write("".join(f"{word}\0" for word in json.loads(lines[number])))
' "$1" "$SLURM_ARRAY_TASK_ID")
if [[ ${#words[@]} -lt 2 ]]; then
    echo "error: $1 has no run number $SLURM_ARRAY_TASK_ID." >&2
    exit 2
fi
run_dir="${words[0]}"

mkdir -p "$run_dir/slurm"
# Held until this script ends; `launch/tables.py run` takes the same lock.
exec 9>>"$run_dir.log"
if ! flock --nonblock 9; then
    echo "$run_dir is being trained by another process; nothing to do"
    exit 0
fi

plan_ranks
echo "job $SLURM_JOB_ID: $nodes nodes x $per_node processes, run $run_dir, logs in $run_dir/slurm" | tee -a "$run_dir.log"
srun_options=(--output="$run_dir/slurm/%j-%n.log" --open-mode=append)
status=0
start_ranks launch/train.py "${words[@]:1}" || status=$?
end_job "$run_dir" "$status" > >(tee -a "$run_dir.log")
