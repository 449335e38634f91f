#!/bin/sh
# The other half: adaptive centring beside ZNorm and the baseline, on both networks of small_networks.sh. For a CPU.
# The images are expected in ./data; further options are passed on to compare.
set -u
failed=0
here=examples/stability
studies="plain-adam-cosine residual-adam-cosine plain-adam-constant residual-adam-constant"
for study in ${STUDIES:-$studies}; do
  python -m lightning_znorm compare --config "$here/$study.yaml" --methods configs/methods/baseline.yaml \
    configs/methods/znorm.yaml configs/methods/znorm-adaptive.yaml --seeds ${SEEDS:-0 1 2} --metric test/accuracy --mode max \
    --output "studies/adaptive/$study" "$@" || failed=1
done
exit $failed
