#!/usr/bin/env bash
# Install torch_scatter into one Python environment. It is published as source only and compiles
# against the installed torch for minutes, so the wheel is kept by torch and Python version.
set -euo pipefail

python=${1:?usage: tools/build_scatter.sh PYTHON}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pip=("$python" -m pip --disable-pip-version-check)

# An import alone would accept a wheel whose kernels were linked against another torch.
works() {
    "$python" -c '
import torch, torch_scatter
total = torch_scatter.scatter(torch.ones(3), torch.tensor([0, 0, 1]), reduce="sum")
assert total.tolist() == [2.0, 1.0], total
' >/dev/null 2>&1
}

give_up() {
    echo "error: $*" >&2
    echo "       'make test SCATTER=0' runs the tests without torch_scatter." >&2
    exit 1
}

if works; then
    exit 0
fi

# CUDA kernels need both a compiler and a device to be of use; without them build for the CPU.
device=cpu
if command -v nvcc >/dev/null &&
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda
fi
export FORCE_CUDA=0
if [ "$device" = cuda ]; then
    FORCE_CUDA=1
fi

tag=$("$python" -c '
import sys, torch
print(f"torch-{torch.__version__}-cp{sys.version_info.major}{sys.version_info.minor}")')
kept=${GCAHNG_WHEELS:-$HOME/.cache/gcahng/wheels}/$tag-$device

install_kept() {
    "${pip[@]}" install --quiet --no-deps --no-index --force-reinstall "$kept"/torch_scatter-*.whl
}

if compgen -G "$kept/torch_scatter-*.whl" >/dev/null; then
    echo "installing the kept torch_scatter wheel of $kept"
    if install_kept && works; then
        exit 0
    fi
    echo "the kept wheel does not work with this environment: building it again"
    rm -f "$kept"/torch_scatter-*.whl
fi

command -v "${CXX:-c++}" >/dev/null || give_up "torch_scatter needs a C++ compiler" \
    "(Debian, Ubuntu: apt install g++)."
echo "building torch_scatter for $tag on $device; this takes minutes, once"
mkdir -p "$kept"
fresh=$(mktemp -d "$kept/building.XXXXXX")
trap 'rm -rf "$fresh"' EXIT
# No build isolation: it must compile against this torch. No pip cache: pip would hand out a wheel
# that was compiled against another one.
"${pip[@]}" wheel torch_scatter --constraint "$root/constraints.txt" --wheel-dir "$fresh" \
    --no-build-isolation --no-deps --no-cache-dir || give_up "building torch_scatter failed."
mv "$fresh"/torch_scatter-*.whl "$kept"/
install_kept || give_up "the new wheel in $kept does not install."
works || give_up "torch_scatter was built, but does not run:" \
    "try $python -c 'import torch_scatter'."
