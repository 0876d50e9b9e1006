#!/usr/bin/env bash
# Evaluate on a cluster:    sbatch [options] slurm/eval.sh --run RUN_DIR [what launch/evaluate.py takes ...]
#
# One process: sbatch --gpus-per-node=1 ... on GPUs. Other variables: slurm/common.sh.
#SBATCH --job-name=gcahng-eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append

source "${GCAHNG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh"

exec srun --ntasks=1 "$GCAHNG_PYTHON" -m launch.evaluate --quiet "$@"
