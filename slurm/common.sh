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
#   PET_SIGNALS_TO_HANDLE, PET_SHUTDOWN_TIMEOUT    see launch/signals.sh

set -euo pipefail

source launch/signals.sh

# A task of an array by this name: the number of the first task of an array stands for all of them.
job="${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"

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
# One process without DeepSpeed needs none: that of accelerate would die of a signal and take the process along.
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

    launcher=("$GCAHNG_PYTHON")
    [[ "$((nodes * per_node))" -eq 1 && -z "${GCAHNG_DEEPSPEED:-}" ]] && return
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
    else
        launcher+=(--multi_gpu) # on CPUs too, with ACCELERATE_USE_CPU=true
    fi
}

# Run srun, which starts one launcher per node, and return its status:  start_ranks SCRIPT [arguments ...]
# Its options are in srun_options.
srun_options=()
start_ranks() {
    local command=("${launcher[@]}" "$@")
    if [[ ${#launcher[@]} -gt 1 ]]; then
        # Each node puts its own number between the launcher's options and the command: SLURM_NODEID is known there alone.
        # shellcheck disable=SC2016
        command=(
            bash -c 'exec "${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:$1 + 2}"' node
            "${#launcher[@]}" "${launcher[@]}" "$@"
        )
    fi
    trap 'pass_on TERM' TERM
    trap 'pass_on USR1' USR1
    # Behind the script, which then hears of signals while it waits.
    srun --kill-on-bad-exit=1 --ntasks="$nodes" --ntasks-per-node=1 "${srun_options[@]}" "${command[@]}" &
    # A signal ends a wait, and may end the next one too.
    while kill -0 $! 2>/dev/null; do
        wait $! || true
    done
    wait $!
}

# SLURM signals the processes (--signal=TERM@300). A signal for this script (--signal=B:TERM@300, scancel --batch) goes
# on to them, once: they count how often their launcher was told. srun would not pass it on, but kill them.
pass_on() {
    if [[ -z "${passed_on:-}" ]]; then
        passed_on="$1"
        echo "job $job: SIG$1, passed on to the processes"
        scancel --signal="$1" "$job" || true
    fi
}

# The step in the marker that this start of the job has left in a run folder; nothing where there is none.
interrupted_at() {
    "$GCAHNG_PYTHON" -c '
import json, os, sys
try:
    with open(os.path.join(sys.argv[1], "PREEMPTED"), encoding="utf-8") as file:
        marker = json.load(file)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if (marker["slurm_job"], marker["slurm_restarts"]) == (os.environ["SLURM_JOB_ID"], restarts):
        print(marker["step"])
except (OSError, ValueError, KeyError, TypeError):
    pass
' "$1"
}

# Whether SLURM would let this job go on, or ended it for its time limit alone: not if somebody has cancelled it, which
# signals the processes as well, or has requeued it already.
is_wanted() {
    local facts
    facts="$(scontrol show job "$job")" || return 0
    [[ "$facts" == *JobState=RUNNING* || "$facts" == *Reason=TimeLimit* ]]
}

# End a job that has trained: back into the queue if it was interrupted, else with srun's status.  end_job RUN_DIR STATUS
end_job() {
    local run_dir="$1" status="$2" step earlier times=1
    step="$(interrupted_at "$run_dir")"
    # 128 + SIGUSR1 or SIGTERM: the launcher was ended before it could start anything.
    [[ -z "$step" && ("$status" -eq 138 || "$status" -eq 143) ]] && step="nothing"
    [[ -z "$step" ]] && exit "$status"
    if ! is_wanted; then
        echo "job $job: interrupted at step $step; it was cancelled or requeued by somebody else, and is left to that"
        exit "$((status > 0 ? status : 75))"
    fi
    # A job that gets no further would come back for ever.
    local history="$run_dir/slurm/$SLURM_JOB_ID.requeued"
    touch "$history"
    while read -r earlier; do
        [[ "$earlier" == "$step" ]] && times="$((times + 1))" || times=1
    done <"$history"
    if [[ "$times" -ge 3 ]]; then
        echo "error: job $job was interrupted at step $step for the third time in a row and is not requeued: between two" \
            "interruptions there is too little time for one step or evaluation. Give it more (--time, --signal)." >&2
        exit "$((status > 0 ? status : 75))"
    fi
    echo "$step" >>"$history"
    echo "job $job: interrupted at step $step, requeued"
    if ! scontrol requeue "$job"; then
        echo "error: job $job could not be requeued. It is saved: submit it again with train.resume=auto." >&2
        exit "$((status > 0 ? status : 75))"
    fi
    exit 0
}
