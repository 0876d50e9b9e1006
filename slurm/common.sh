# shellcheck shell=bash
# What the job scripts share; sourced, not run, in the project's folder.
#
#   GCAHNG_HOME            the project's folder; default: where sbatch was called
#   GCAHNG_PYTHON          the Python of the environment that has gcahng; default: .venv/bin/python, else python3
#   GCAHNG_PROCESSES       processes per node; default: the node's GPUs, else 1
#   GCAHNG_DEEPSPEED       a DeepSpeed file, launch/deepspeed/zero1.json say; default: none, so DDP
#   MASTER_ADDR            where rank 0 listens; default: the job's first node
#   MASTER_PORT            its port; default: one that depends on the job's number
#   OMP_NUM_THREADS        threads of each process; default: its share of the node's CPUs in this job

set -euo pipefail

if [[ -z "${GCAHNG_PYTHON:-}" ]]; then
    GCAHNG_PYTHON="python3"
    [[ -x .venv/bin/python ]] && GCAHNG_PYTHON="$PWD/.venv/bin/python"
fi

# srun does not take --cpus-per-task over from sbatch by itself (since SLURM 22.05).
[[ -n "${SLURM_CPUS_PER_TASK:-}" ]] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# A configuration's value as training would read it: setting_of CONFIG KEY [section.key=value ...]
setting_of() {
    "$GCAHNG_PYTHON" -c '
import functools, sys
from gcahng.errors import InputError
from gcahng.training.config import load_config
try:
    print(functools.reduce(getattr, sys.argv[2].split("."), load_config(sys.argv[1], sys.argv[3:])))
except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
' "$@"
}

# The processes of this job, and the launcher that each node starts its own with: sets nodes, per_node and launcher.
plan_ranks() {
    nodes="${SLURM_JOB_NUM_NODES:-1}"
    per_node="${GCAHNG_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}"
    if [[ -z "${MASTER_ADDR:-}" ]]; then
        local hosts
        hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
        MASTER_ADDR="${hosts%%$'\n'*}"
    fi
    # Below 30000: the ports above are given to connections that go out.
    MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
    local threads="$((${SLURM_CPUS_ON_NODE:-1} / per_node))"
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
}

# Become srun, which starts one launcher per node:  start_ranks SCRIPT [arguments ...]; its options in srun_options.
srun_options=()
start_ranks() {
    # Each node puts its own number between the launcher's options and the command: SLURM_NODEID is known there alone.
    # shellcheck disable=SC2016
    exec srun --kill-on-bad-exit=1 --ntasks="$nodes" --ntasks-per-node=1 "${srun_options[@]}" \
        bash -c 'exec "${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:$1 + 2}"' node "${#launcher[@]}" "${launcher[@]}" "$@"
}
