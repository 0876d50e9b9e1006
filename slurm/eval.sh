#!/usr/bin/env bash
# Evaluate on a cluster:    sbatch [options] slurm/eval.sh --run RUN_DIR [what launch/evaluate.py takes ...]
#
# One process: sbatch --gpus-per-node=1 ... on GPUs. Other variables: slurm/common.sh.
#SBATCH --job-name=gcahng-eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append

# SLURM runs a copy of this script, from a folder of its own.
cd "${GCAHNG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" || exit 2
if [[ ! -f slurm/common.sh ]]; then
    echo "error: $PWD is not the project's folder (no slurm/common.sh). Submit from there, or set GCAHNG_HOME." >&2
    exit 2
fi
source slurm/common.sh

exec srun --ntasks=1 "$GCAHNG_PYTHON" -m launch.evaluate --quiet "$@"
