# What the job scripts share; sourced, not run.
#
#   GCAHNG_PYTHON          the Python of the environment that has gcahng; default: .venv/bin/python, else python3
#   GCAHNG_PROCESSES       processes per node; default: the node's GPUs, else 1
#   GCAHNG_DEEPSPEED       a DeepSpeed file, launch/deepspeed/zero1.json say; default: none, so DDP
#   MASTER_ADDR            where rank 0 listens; default: the job's first node
#   MASTER_PORT            its port; default: one that depends on the job's number

set -euo pipefail

# SLURM runs a copy of the script: the project is where the job was submitted, unless GCAHNG_HOME says otherwise.
cd "${GCAHNG_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
if [[ ! -f launch/train.py ]]; then
    echo "error: $PWD is not the project's folder (no launch/train.py). Submit from there, or set GCAHNG_HOME." >&2
    exit 2
fi

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
    sys.exit(f"error: {error}")
' "$@"
}
