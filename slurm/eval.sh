#!/usr/bin/env bash
# Evaluate on a cluster:    sbatch [options] slurm/eval.sh --run RUN_DIR [what launch/evaluate.py takes ...]
#
#   one node, 8 GPUs     sbatch --gpus-per-node=8 --cpus-per-task=64 slurm/eval.sh --run RUN_DIR
#   2 nodes of 8 GPUs    sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 slurm/eval.sh --run RUN_DIR
#
# A node runs one task, which starts the processes: --cpus-per-task is the CPUs of all of them with their loader workers.
# Other variables: slurm/common.sh.
#SBATCH --job-name=gcahng-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append

# SLURM runs a copy of this script, from a folder of its own.
cd "${GCAHNG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" || exit 2
if [[ ! -f slurm/common.sh ]]; then
    echo "error: $PWD is not the project's folder (no slurm/common.sh). Submit from there, or set GCAHNG_HOME." >&2
    exit 2
fi
source slurm/common.sh

unset GCAHNG_DEEPSPEED # nothing is trained
plan_ranks
start_ranks launch/evaluate.py --quiet "$@"
