#!/usr/bin/env bash
# Train on a cluster:    sbatch [options] slurm/train.sh CONFIG [section.key=value ...]
#
#   one node, 8 GPUs     sbatch --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh configs/sop_resnet50.yaml
#   4 nodes of 8 GPUs    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 slurm/train.sh configs/sop_resnet50.yaml
#   DeepSpeed ZeRO-1     GCAHNG_DEEPSPEED=launch/deepspeed/zero1.json sbatch ... slurm/train.sh CONFIG
#   five seeds           sbatch --array=0-4 ... slurm/train.sh CONFIG      (runs in RUN_DIR/seed-0 ... seed-4)
#
# A node runs one task, which starts the processes: --cpus-per-task is the CPUs of all of them with their loader workers.
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

nodes="${SLURM_JOB_NUM_NODES:-1}"
per_node="${GCAHNG_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}"
if [[ -z "${MASTER_ADDR:-}" ]]; then
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    MASTER_ADDR="${hosts%%$'\n'*}"
fi
# Below 30000: the ports above are given to connections that go out.
MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
threads="$((${SLURM_CPUS_ON_NODE:-1} / per_node))"
# Without it the launcher gives each process one.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}"
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS

launcher=(
    "$GCAHNG_PYTHON" -m accelerate.commands.launch
    --num_machines "$nodes" --num_processes "$((nodes * per_node))"
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
    --rdzv_backend static --mixed_precision no --dynamo_backend no
)
if [[ -n "${GCAHNG_DEEPSPEED:-}" ]]; then
    # Not pdsh, DeepSpeed's own way to other nodes: SLURM has started a launcher on each already.
    launcher+=(
        --use_deepspeed --deepspeed_config_file "$GCAHNG_DEEPSPEED" --deepspeed_multinode_launcher standard
        --zero3_init_flag false
    )
elif [[ "$((nodes * per_node))" -gt 1 ]]; then
    launcher+=(--multi_gpu) # on CPUs too, with ACCELERATE_USE_CPU=true
fi

mkdir -p "$run_dir/slurm"
echo "job $SLURM_JOB_ID: $nodes nodes x $per_node processes, rank 0 at $MASTER_ADDR:$MASTER_PORT, logs in $run_dir/slurm"

# Each node puts its own number between the launcher's options and the command: SLURM_NODEID is known there alone.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 --ntasks="$nodes" --ntasks-per-node=1 \
    --output="$run_dir/slurm/%j-%n.log" --open-mode=append \
    bash -c 'exec "${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:$1 + 2}"' node "${#launcher[@]}" "${launcher[@]}" \
    launch/train.py "${arguments[@]}"
