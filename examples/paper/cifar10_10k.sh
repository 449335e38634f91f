#!/bin/sh
# A reduced Table 1 for a CPU: examples/paper/cifar10-10k.yaml says what is reduced. The images are expected in ./data.
set -eu
methods=configs/methods
python -m lightning_znorm compare --config examples/paper/cifar10-10k.yaml \
  --methods $methods/baseline.yaml $methods/gc.yaml $methods/znorm.yaml --seeds 0 1 2 \
  --output studies/cifar10-10k "$@"
