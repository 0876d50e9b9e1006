#!/usr/bin/env bash
# Make a virtual environment, or say what the given Python lacks.
set -euo pipefail

python=${1:?usage: tools/create_venv.sh PYTHON FOLDER}
folder=${2:?usage: tools/create_venv.sh PYTHON FOLDER}

fail() {
    echo "error: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "'$python' was not found." \
    "Install Python 3.11 or 3.12, or name one: make PYTHON=/path/to/python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail \
    "gcahng needs Python 3.11 or newer, '$python' is $("$python" -c \
    'import platform; print(platform.python_version())')." \
    "Name another one: make PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail \
    "'$python' cannot make virtual environments (module venv or ensurepip is missing)." \
    "Install it (Debian, Ubuntu: apt install python3-venv) or name another one:" \
    "make PYTHON=python3.12"

# A half-made environment must not look like a whole one to the next run.
trap 'rm -rf "$folder"' ERR INT TERM
"$python" -m venv "$folder"
