#!/bin/sh
# Table 1: CIFAR-10, six methods, three seeds, 100 epochs; MODELS are the files of configs/cifar10, one study each.
#   sh examples/paper/table1_cifar10.sh --jobs 6                             on a GPU that holds six runs
#   MODELS="resnet56 vgg16" sh examples/paper/table1_cifar10.sh --dry-run    prints commands, such as for a SLURM array
# The images are expected in ./data; further options are passed on to compare.
set -u
failed=0
methods=configs/methods
for model in ${MODELS:-resnet56 resnet101 resnet152 densenet121 densenet169 mobilenetv2 vgg16 xception}; do
  python -m lightning_znorm compare --config "configs/cifar10/$model.yaml" \
    --methods $methods/baseline.yaml $methods/gc.yaml $methods/clip.yaml $methods/wd-1e-3.yaml $methods/wd-1e-4.yaml \
    $methods/znorm.yaml --seeds 0 1 2 --output "studies/table1_cifar10/$model" "$@" || failed=1
done
exit $failed
