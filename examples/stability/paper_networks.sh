#!/bin/sh
# The networks on which the paper's ZNorm loses to the baseline (VGG-16, Xception), and one on which it wins (ResNet-56):
# CIFAR-10, 100 epochs, with the paper's constant learning rate and with one that goes down to zero. For a GPU.
#   sh examples/stability/paper_networks.sh --jobs 6                    on a GPU that holds six runs
#   MODELS=vgg16 sh examples/stability/paper_networks.sh --dry-run      prints commands, such as for a SLURM array
# The images are expected in ./data; further options are passed on to compare.
set -u
failed=0
here=examples/stability
methods="configs/methods/baseline.yaml configs/methods/znorm.yaml"
methods="$methods $here/methods/floor.yaml $here/methods/relative-eps.yaml $here/methods/blend.yaml $here/methods/geometric.yaml"
for model in ${MODELS:-vgg16 xception resnet56}; do
  python -m lightning_znorm compare --config "configs/cifar10/$model.yaml" \
    --methods $methods --seeds ${SEEDS:-0 1 2} --output "studies/stability/$model-constant" "$@" || failed=1
  python -m lightning_znorm compare --config "configs/cifar10/$model.yaml" --config "$here/cosine.yaml" \
    --methods $methods $here/methods/handover.yaml --seeds ${SEEDS:-0 1 2} \
    --output "studies/stability/$model-cosine" "$@" || failed=1
done
exit $failed
