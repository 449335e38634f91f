#!/bin/sh
# A reduced Table 1 for a CPU: examples/paper/cifar10-10k.yaml says what is reduced. The images are expected in ./data.
# 25 runs, each about six minutes of a core. Further options are passed on to compare.
set -eu
methods=configs/methods
python -m lightning_znorm compare --config examples/paper/cifar10-10k.yaml --methods $methods/baseline.yaml \
  $methods/gc.yaml $methods/znorm.yaml $methods/znorm-weights.yaml $methods/znorm-adaptive.yaml --seeds 0 1 2 3 4 \
  --output "${RESULTS:-examples/paper/results}/cifar10-10k" "$@"
