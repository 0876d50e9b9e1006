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

# SLURM runs a copy of this script, from a folder of its own.
cd "${GCAHNG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}" || exit 2
if [[ ! -f slurm/common.sh ]]; then
    echo "error: $PWD is not the project's folder (no slurm/common.sh). Submit from there, or set GCAHNG_HOME." >&2
    exit 2
fi
source slurm/common.sh

exec srun --ntasks=1 "$GCAHNG_PYTHON" -m shards.convert "$@"
