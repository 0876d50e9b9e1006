#!/usr/bin/env bash
# Convert images to shards on a cluster:    sbatch [options] slurm/convert.sh SOURCE --out DIR [what shards.convert takes ...]
#
# One process with as many workers as --cpus-per-task gives it; a job that was stopped or requeued continues.
# Other variables: slurm/common.sh.
#SBATCH --job-name=gcahng-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --requeue

source "${GCAHNG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/common.sh"

exec srun --ntasks=1 "$GCAHNG_PYTHON" -m shards.convert "$@"
