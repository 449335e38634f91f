#!/bin/sh
# A rare class and one sigmoid output, each network with and without a prior. For a CPU: a run takes a minute of a core.
# The slices are expected in ./data/lgg-mri-segmentation; further options are passed on to compare.
set -u
failed=0
here=examples/imbalance
methods=configs/methods
for study in ${STUDIES:-digits unet batchnorm-unet}; do
  for prior in ${PRIORS:-null auto}; do
    name=$study
    [ "$prior" = auto ] && name=$study-prior
    metric="test/dice_per_patient --mode max"
    [ "$study" = digits ] && metric="test/loss --mode min"
    python -m lightning_znorm compare --config "$here/$study.yaml" --methods $methods/baseline.yaml $methods/gc.yaml \
      $methods/znorm.yaml $methods/znorm-weights.yaml $here/methods/$study/znorm-but-output.yaml \
      $methods/znorm-adaptive.yaml $here/methods/adaptive-rows.yaml --seeds ${SEEDS:-0 1 2 3 4} \
      --metric $metric --output "studies/imbalance/$name" --model.init_args.prior "$prior" "$@" || failed=1
  done
done
exit $failed
