#!/bin/sh
# Table 3: LGG MRI segmentation, six methods, three seeds, 50 epochs; MODELS are the files of configs/lgg, one study each.
#   sh examples/paper/table3_lgg.sh                                      a GPU of 80 GB: one run at a time fits (--jobs 1)
#   MODELS=resnet50-unet sh examples/paper/table3_lgg.sh --jobs 3        a GPU of 80 GB
#   MODELS="resnet50-unet unetpp" sh examples/paper/table3_lgg.sh --dry-run    prints commands, such as for a SLURM array
# A run takes 21 (resnet50-unet), 50 (unetpp) or 48 GiB (attention-unet) of the GPU's memory, and more while it computes:
# docs/how-to/segmentation.md, "Memory of Table 3", has other cards. With several GPUs, --jobs counts the runs of all of them.
# The images are expected in ./data; further options are passed on to compare.
set -u
failed=0
methods=configs/methods
for model in ${MODELS:-resnet50-unet unetpp attention-unet}; do
  python -m lightning_znorm compare --config "configs/lgg/$model.yaml" \
    --methods $methods/baseline.yaml $methods/gc.yaml $methods/clip.yaml $methods/wd-1e-3.yaml $methods/wd-1e-4.yaml \
    $methods/znorm.yaml --seeds 0 1 2 --output "studies/table3_lgg/$model" "$@" || failed=1
done
exit $failed
