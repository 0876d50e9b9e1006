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
