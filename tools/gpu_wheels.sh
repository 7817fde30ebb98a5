#!/usr/bin/env bash
# Gathers what tools/gpu_run.sh needs on a GPU machine without a network, on x86-64 Linux, in .gpu-wheels/ (ignored by
# git; under 16 MiB): the wheels of the suite's dependencies, and of bitsandbytes its Python files and the one library
# that belongs to CUDA 13.0. Torch and NumPy are expected there.
#
#   tools/gpu_wheels.sh [3.12]     downloads what is missing, for that version of Python
set -euo pipefail
cd "$(dirname "$0")/.."
target=.gpu-wheels
python=${PYTHON:-python3}
version=${1:-3.12}
if [[ ! $version =~ ^3\.[0-9]+$ ]]; then
    echo "usage: tools/gpu_wheels.sh [3.12]" >&2
    exit 2
fi
mkdir -p "$target"

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
fetch() { # FOLDER REQUIREMENT...
    local folder=$1
    shift
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" \
        --implementation cp "${platforms[@]}" --dest "$folder" "$@"
}

# Wheels that belong to another version would keep pip from installing all that is there.
find "$target" -maxdepth 1 -name '*-cp3*-cp3*.whl' ! -name "*-cp${version//./}-*" -delete
fetch "$target" cffi pycparser click rich markdown-it-py mdurl pygments jinja2 markupsafe pytest pluggy iniconfig packaging

if [[ ! -d $target/bitsandbytes ]]; then
    whole=$(mktemp -d)
    trap 'rm -rf "$whole"' EXIT
    fetch "$whole" bitsandbytes==0.50.2
    "$python" - "$whole"/bitsandbytes-*.whl "$target" <<'PROGRAM'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    for name in wheel.namelist():
        if not name.endswith(".so") or name.endswith("libbitsandbytes_cuda130.so"):
            wheel.extract(name, sys.argv[2])
PROGRAM
fi
du -sh "$target"
