#!/bin/sh
# Who wins once each method is tuned? The digits under Adam (five learning rates) and under SGD (six), three seeds.
# For a CPU: 165 runs, each about 15 seconds of a core. Further options are passed on to compare.
set -u
failed=0
methods=configs/methods
lr=model.init_args.optimizer.init_args.lr
sweep() {
  name=$1 optimizer=$2 rates=$3
  shift 3
  python -m lightning_znorm compare --config examples/paper/digits.yaml --methods $methods/baseline.yaml \
    $methods/gc.yaml $methods/znorm.yaml $methods/znorm-weights.yaml $methods/znorm-adaptive.yaml --seeds 0 1 2 \
    --output "${RESULTS:-examples/paper/results}/$name" --sweep $lr $rates --model.init_args.optimizer "$optimizer" "$@"
}
sweep digits-adam torch.optim.Adam "0.0003 0.001 0.003 0.01 0.03" "$@" || failed=1
sweep digits-sgd torch.optim.SGD "0.00001 0.0001 0.001 0.01 0.1 1" --model.init_args.optimizer.init_args.momentum 0.9 "$@" || failed=1
exit $failed
