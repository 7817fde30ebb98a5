#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command, under nine minutes and without a network: builds the CUDA library
# for this machine's GPU, runs the conformance suite on it, compute-sanitizer on small calls, and the benchmarks. Also
# the host side of the HIP backend, compiled for this GPU through a shim (backends/hip/shim).
#
#   tools/gpu_run.sh OUT_DIR
#   tools/gpu_run.sh --rehearse LIBRARY OUT_DIR    the same parts, as far as they go without a GPU, on LIBRARY
#
# Needs nvcc, CMake, ninja, and a Python with torch (set PYTHON; default python3); the rest comes from .gpu-wheels, which
# tools/gpu_wheels.sh fills on a machine with a network. A part that fails or runs out of its time is a line of the
# summary, and the next one begins.
#
# What tells most comes first: every op once, the suite, the benchmarks; then the sanitizer, the stress cases and the HIP
# host side. Each part leaves its files when it ends and the summary is written again after it, so a machine that is
# taken away early leaves all that was done.
#
# OUT_DIR gets: summary.json (parts, states, seconds, machine), build.log, conformance.json and .md, bench.json,
# model.json (measured beside predicted), sanitizer.log, stress.json, build-hip.log, hip.json and .md, run.log. Exit
# status: 0 all parts went well, 1 some did not, 2 wrong use, 3 no GPU here.
set -uo pipefail

usage() {
    sed -n '5,6s/^#   //p' "$0" >&2
    exit 2
}
rehearsal=""
if [[ ${1:-} == --rehearse ]]; then
    [[ $# -eq 3 && -f $2 ]] || usage
    rehearsal=$(realpath "$2")
    shift 2
fi
[[ $# -eq 1 && -n $1 && ${1:0:1} != - ]] || usage
mkdir -p "$1" || exit 2
out=$(realpath "$1")
root=$(realpath "$(dirname "$0")/..")
cd "$root" || exit 2
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
start=$SECONDS
budget=525 # of the nine minutes; the rest is for the summary and what outlives its signal
: >"$work/parts" && : >"$out/run.log"

# part NAME LIMIT COMMAND...: runs COMMAND for at most LIMIT seconds, or what is left; notes how it went.
part() {
    local name=$1 limit=$2 began=$SECONDS left=$((budget - (SECONDS - start))) state status
    shift 2
    ((limit > left)) && limit=$left
    if ((limit < 5)); then
        state="no time left" status=-1
    else
        echo "== $name ($limit s at most): $*" | tee -a "$out/run.log"
        timeout --kill-after=5 "$limit" "$@" >>"$out/run.log" 2>&1
        status=$?
        case $status in
            0) state=passed ;;
            124 | 137) state="out of time" ;;
            *) state=failed ;;
        esac
    fi
    echo "   $name: $state ($((SECONDS - began)) s)" | tee -a "$out/run.log"
    printf '%s\t%s\t%s\t%s\n' "$name" "$state" "$status" "$((SECONDS - began))" >>"$work/parts"
    summary 1 "cut off after $name" # what stands there if this was the last part
    [[ $state == passed ]]
}
skip() { # NAME WHY
    echo "   $1: skipped: $2" | tee -a "$out/run.log"
    printf '%s\tskipped: %s\t0\t0\n' "$1" "$2" >>"$work/parts"
}
summary() { # STATUS REASON
    "$python" tools/gpu_summary.py "$work/parts" "$out/summary.json" --status "$1" --reason "$2" --seconds $((SECONDS - start))
}
# finish STATUS REASON: writes the summary and exits.
finish() {
    summary "$@" || { echo "the summary could not be written" >&2 && exit 1; }
    echo "$2; everything is in $out"
    exit "$1"
}

capability=""
if [[ -z $rehearsal ]]; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d ' .')
    [[ -n $capability ]] || finish 3 "no GPU: nvidia-smi is missing or lists none; run this on a machine with an NVIDIA GPU and its driver"
fi

"$python" -c 'import torch, numpy' || finish 2 "$python lacks torch or numpy; name one that has them in PYTHON"

export PYTHONUNBUFFERED=1 PYTHONPATH="$root:$root/backends/cpu_reference:$root/conformance"
if ! compgen -G ".gpu-wheels/*.whl" >/dev/null; then
    skip wheels "no .gpu-wheels; what is installed has to do"
elif ! compgen -G ".gpu-wheels/cffi-*-$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl" >/dev/null; then
    skip wheels "they are for another Python (tools/gpu_wheels.sh takes its version); what is installed has to do"
else
    part wheels 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" .gpu-wheels/*.whl
    PYTHONPATH="$PYTHONPATH:$work/site:$root/.gpu-wheels"
fi

if [[ -n $rehearsal ]]; then
    library=$rehearsal
    device=cpu
    skip build "rehearsal on $rehearsal"
else
    device=cuda
    case $capability in
        90 | 100 | 103 | 120 | 121) architecture=${capability}a-real ;;
        *) architecture=$capability-real ;;
    esac
    library=$work/build/libqcore_cuda.so
    build() {
        cmake -S backends/cuda -B "$work/build" -G Ninja -DCMAKE_CUDA_ARCHITECTURES="$architecture" -DCMAKE_CUDA_FLAGS=-Xptxas=-v &&
            cmake --build "$work/build"
    }
    export -f build
    export work architecture
    part build 180 bash -c "build >'$out/build.log' 2>&1"
    [[ -f $library ]] || finish 1 "the library was not built; build.log says why"
fi

part "small calls" 60 "$python" tools/gpu_small_calls.py "$library"
paged=(tools/gpu_paged.py "$library" --device "$device")
[[ -z $rehearsal ]] || paged+=(--elements 30000)
part paged 25 "$python" "${paged[@]}"

conformance() { # NAME LIMIT RESULT ARGUMENT...: the suite; its JSON and page go to OUT_DIR even if cases failed
    local name=$1 limit=$2 result=$3 left=$((budget - (SECONDS - start)))
    shift 3
    ((limit > left)) && limit=$left
    # It begins no case in the last seconds, so that its report is there.
    part "$name" "$limit" "$python" -m qcore_conformance run --backend "$library" --report "$work/$name" \
        --budget "$((limit > 40 ? limit - 25 : limit / 2))" "$@"
    cp "$work/$name/report.json" "$out/$result.json" 2>/dev/null
    [[ $result == stress ]] || cp "$work/$name/report.md" "$out/$result.md" 2>/dev/null
}
if [[ -n $rehearsal ]]; then
    conformance conformance 100 conformance --level L0 --op dequantize_absmax
else
    conformance conformance 170 conformance --jobs 8
fi

size=4096
left=$((budget - (SECONDS - start)))
bench=(--library "$library" --json "$out/bench.json" --device "$device" --budget "$((left < 110 ? left - 10 : 100))")
if [[ -n $rehearsal ]]; then
    size=64
    bench+=(--rounds 2 --seconds 0.0001)
fi
part bench 120 "$python" benchmarks/gpu.py "${bench[@]}" --size "$size"
model=(bench gpu --shape 4096x4096 --json "$out/model.json")
part model 60 env QCORE_BACKEND="$device=$library" "$python" -c \
    'import sys; from qcore.cli.main import run; sys.exit(run(sys.argv[1:]))' "${model[@]}"

# Not before: the benchmarks want the processors for themselves. The HIP backend's host side with the same kernels.
if [[ -z $rehearsal ]]; then
    nice -n 10 bash -c "cmake -S backends/hip/shim -B '$work/hip' -G Ninja -DCMAKE_CUDA_ARCHITECTURES='$architecture' \
        -DQCORE_HIP_ARCH=sm_$capability && cmake --build '$work/hip' --parallel 12" >"$out/build-hip.log" 2>&1 &
    hip_build=$!
fi

sanitize() { # TOOL LIMIT
    part "$1" "$2" bash -c "compute-sanitizer --tool $1 --error-exitcode 9 '$python' tools/gpu_small_calls.py '$library' >>'$out/sanitizer.log' 2>&1"
}
if [[ -n $rehearsal ]]; then
    skip memcheck "rehearsal on $rehearsal"
    conformance stress 100 stress --level L3 --op int8_dequantize_rows
    skip hip "rehearsal on $rehearsal"
else
    if command -v compute-sanitizer >/dev/null; then
        sanitize memcheck 60
    else
        skip memcheck "compute-sanitizer was not found"
    fi
    conformance stress 70 stress --level L3 --jobs 2
    part "hip build" 60 tail --pid="$hip_build" -f /dev/null
    if [[ -f $work/hip/libqcore_hip_on_cuda.so ]]; then
        library="$work/hip/libqcore_hip_on_cuda.so" conformance hip 60 hip --jobs 8 --level L0 --level L1
    else
        skip hip "the library was not built; build-hip.log says why"
    fi
    command -v compute-sanitizer >/dev/null && sanitize racecheck 60
fi

if grep -qvP '^[^\t]+\t(passed|skipped)' "$work/parts"; then
    finish 1 "some parts did not go well"
fi
finish 0 "all parts went well"
