#!/usr/bin/env bash
# Runs the GPU tests and benchmarks on a machine with a CUDA device. `bash benchmarks/gpu.sh --help` says how.
#
# Needs torch, torchvision, timm, lightning, torchmetrics, pytest and hypothesis. What needs more is left out with a
# sentence if that is not installed.
set -uo pipefail

usage() {
    cat <<'END'
usage: [OUT=FOLDER] bash benchmarks/gpu.sh [--list] [PART]

  tests       the tests marked gpu, but for those of strategies
  kernels     ZNorm beside clip_grad_norm_ and others, for five networks, in float32 and bfloat16
  step        ZNorm's share of a step of ResNet-56
  strategies  training under each strategy, on one device
  all         all of these, in this order (default)

Each part takes at most four minutes. Its output is printed, and written to PART.txt in the folder OUT (default:
benchmarks/results/gpu). A command that fails does not stop the others; the exit status is then 1. --list prints the
commands, each after its part and the most seconds that it may take, and runs nothing.
END
}

list=
if [ "${1:-}" = --list ]; then
    list=yes
    shift
fi
case $#:${1:-} in
    0: | 1:all) parts="tests kernels step strategies" ;;
    1:tests | 1:kernels | 1:step | 1:strategies) parts=$1 ;;
    1:-h | 1:--help)
        usage
        exit
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-$root/benchmarks/results/gpu}
case $OUT in /*) ;; *) OUT=$PWD/$OUT ;; esac
cd "$root" || exit 1
[ -n "$list" ] || mkdir -p "$OUT" || exit 1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
# Without the project's settings, because they name plugins of pytest that may be missing.
pytest=("$python" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -q -m gpu -rs --disable-warnings --durations=10)
grace=5
status=0

child=
interrupted() {
    trap '' INT TERM
    if [ -n "$child" ]; then
        kill -INT "$child" 2>/dev/null # timeout passes it on, and kills after the seconds of grace
        wait # for it, and until all is printed
    fi
    exit 130
}
trap interrupted INT TERM

say() {
    if [ -z "$list" ]; then echo "$*" | tee -a "$OUT/$part.txt"; fi
}

has() { # has PACKAGE...: whether they are installed
    "$python" -c "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))" "$@"
}

run() { # run SECONDS COMMAND...
    local limit=$1 code printer
    shift
    if [ -n "$list" ]; then
        echo "$part $((limit + grace))$(printf ' %q' "$@")"
        return
    fi
    say "\$ $*"
    exec 3> >(exec tee -i -a "$OUT/$part.txt")
    printer=$!
    # Interrupted, pytest says what it has run, and ends what it has started. bash hears Ctrl-C only while it waits for
    # what is in the background, and what is there hears its own SIGINT only if set -m has started it.
    set -m
    timeout --signal=INT --kill-after=$grace "$limit" "$@" >&3 2>&1 3>&- &
    child=$!
    set +m
    exec 3>&-
    wait "$child"
    code=$?
    child=
    wait "$printer"
    if [ "$code" != 0 ]; then
        status=1
        case $code in
            124 | 137) say "FAILED: stopped after $limit s" ;;
            *) say "FAILED: exit status $code" ;;
        esac
    fi
    say ""
    return "$code"
}

# The limits of a part and the seconds of grace, with those of benchmarks.machine, add up to at most 235: what
# is between them takes a few seconds.
run_tests() {
    # Apart, because an error of a kernel on the device ends all that its process does there.
    run 97 "${pytest[@]}" -k "not triton" tests/gradients/test_cuda.py tests/gradients/test_measure.py \
        tests/test_benchmarks.py
    if has triton; then
        run 63 "${pytest[@]}" -k triton tests/gradients/test_cuda.py
    else
        say "Left out: the tests of Triton's kernel, which need triton."
    fi
    if has monai scipy; then
        run 25 "${pytest[@]}" tests/metrics/test_hausdorff.py tests/metrics/test_patients.py
    else
        say "Left out: the tests of metrics, which need monai and scipy."
    fi
}

run_kernels() {
    has triton || say "Without triton, its rows are refused."
    has pytorch_optimizer || say "Left out: the rows of pytorch_optimizer, which is not installed."
    run 107 "$python" -m benchmarks.kernels --device cuda --rounds 30
    run 83 "$python" -m benchmarks.kernels --device cuda --rounds 30 --dtype bfloat16
}

run_step() {
    run 60 "$python" -m benchmarks.training_step --modes eager
    if has triton; then
        run 130 "$python" -m benchmarks.training_step --modes compiled --compile-first
    else
        say "Left out: compiled steps, for which torch.compile needs triton."
    fi
}

run_strategies() {
    local side_by_side=()
    if has xdist; then side_by_side=(-n 4); fi
    if has deepspeed; then
        run 115 "${pytest[@]}" ${side_by_side[@]+"${side_by_side[@]}"} -k "not DeepSpeed" tests/strategies/test_one_gpu.py
        run 75 "${pytest[@]}" ${side_by_side[@]+"${side_by_side[@]}"} -k DeepSpeed tests/strategies/test_one_gpu.py
    else
        say "Left out: the tests of DeepSpeed, which is not installed."
        run 195 "${pytest[@]}" ${side_by_side[@]+"${side_by_side[@]}"} -k "not DeepSpeed" tests/strategies/test_one_gpu.py
    fi
}

for part in $parts; do
    [ -n "$list" ] || : >"$OUT/$part.txt"
    say "== $part"
    run 30 "$python" -m benchmarks.machine
    case $? in
        0 | 124 | 137) "run_$part" ;; # if it has only taken too long, the others may not
        *) # no device, no torch, or not even Python
            say "Nothing of the part $part was run."
            say ""
            ;;
    esac
done
exit $status
