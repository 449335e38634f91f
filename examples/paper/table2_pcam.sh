#!/bin/sh
# Table 2: PatchCamelyon, six methods, three seeds, 50 epochs; MODELS are the files of configs/pcam, one study each.
#   sh examples/paper/table2_pcam.sh --jobs 6                             on a GPU that holds six runs
#   MODELS="resnet56 resnet101" sh examples/paper/table2_pcam.sh --dry-run    prints commands, such as for a SLURM array
# The images are expected in ./data; further options are passed on to compare.
set -u
failed=0
methods=configs/methods
for model in ${MODELS:-resnet56 resnet101 resnet152}; do
  python -m lightning_znorm compare --config "configs/pcam/$model.yaml" \
    --methods $methods/baseline.yaml $methods/gc.yaml $methods/clip.yaml $methods/wd-1e-3.yaml $methods/wd-1e-4.yaml \
    $methods/znorm.yaml --seeds 0 1 2 --output "studies/table2_pcam/$model" "$@" || failed=1
done
exit $failed
