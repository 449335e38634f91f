#!/usr/bin/env bash
# Runs the GPU tests and benchmarks on a machine with a CUDA device, and writes their output to the folder $OUT:
#     OUT=benchmarks/results/<device> bash benchmarks/gpu.sh
# Needs torch, torchvision, timm, lightning, pytest and hypothesis, and at most ten minutes. If a part fails, the
# others still run. With the argument `strategies`, it trains under each strategy instead (under DeepSpeed if that is
# installed), in at most ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?the folder to write to}"
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
status=0

run() {
    local name=$1
    shift
    {
        echo "\$ $*"
        timeout "$limit" "$@" 2>&1
    } | tee "$OUT/$name.txt" || {
        status=1
        echo "FAILED: $name"
    }
}

limit=20 run device nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
limit=30 run versions "$python" -c "import platform, torch, triton; print(platform.python_version(), torch.__version__, triton.__version__, torch.cuda.get_device_properties(0))"
# Without the project's settings, because they name plugins of pytest that may be missing.
pytest=("$python" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -q -m gpu --durations=10)
if [ "${1:-}" = strategies ]; then
    limit=570 run strategies "${pytest[@]}" tests/strategies/test_one_gpu.py
    exit $status
fi
limit=150 run tests "${pytest[@]}" tests/gradients/test_cuda.py
limit=100 run kernels "$python" -m benchmarks.kernels --device cuda --rounds 30
limit=50 run kernels-bf16 "$python" -m benchmarks.kernels --device cuda --dtype bfloat16 --rounds 30 --models ViT-B/16 "transformer, 1 G"
limit=240 run training_step "$python" -m benchmarks.training_step
exit $status
