#!/usr/bin/env bash
# Train on a cluster:    sbatch [options] slurm/train.sh CONFIG [section.key=value ...]
#
#   one node, 8 GPUs     sbatch --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh configs/sop_resnet50.yaml
#   4 nodes of 8 GPUs    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh configs/sop_resnet50.yaml
#   DeepSpeed ZeRO-1     GCAHNG_DEEPSPEED=launch/deepspeed/zero1.json sbatch ... slurm/train.sh CONFIG
#   five seeds           sbatch --array=0-4 ... slurm/train.sh CONFIG      (runs in RUN_DIR/seed-0 ... seed-4)
#
# A node runs one task, which starts the processes: --cpus-per-task is the CPUs of all of them with their loader workers.
# Five minutes before its time limit, and where SLURM wants the nodes back, a job saves and is requeued.
# Logs: RUN_DIR/slurm/JOB-NODE.log. Other variables: slurm/common.sh. docs/clusters.md says more.
#SBATCH --job-name=gcahng
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

if [[ $# -lt 1 ]]; then
    echo "error: no configuration. Use: sbatch slurm/train.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi
run_dir="$(setting_of "$1" run.dir "${@:2}")"
arguments=(--config "$1" --quiet "${@:2}")

if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    run_dir="$run_dir/seed-$SLURM_ARRAY_TASK_ID"
    arguments+=("seed=$SLURM_ARRAY_TASK_ID" "run.dir=$run_dir")
fi
# A job that was requeued goes on from its newest checkpoint; before its first one it starts as it did.
if [[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]] && compgen -G "$run_dir/step-*/manifest.json" >/dev/null; then
    arguments+=("train.resume=auto")
fi

plan_ranks
mkdir -p "$run_dir/slurm"
echo "job $SLURM_JOB_ID: $nodes nodes x $per_node processes, rank 0 at $MASTER_ADDR:$MASTER_PORT, logs in $run_dir/slurm"
srun_options=(--output="$run_dir/slurm/%j-%n.log" --open-mode=append)
status=0
start_ranks launch/train.py "${arguments[@]}" || status=$?
end_job "$run_dir" "$status"
