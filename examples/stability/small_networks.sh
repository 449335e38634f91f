#!/bin/sh
# Small networks learn a few images by heart. For a CPU: a run takes 20 seconds of one core.
# The images are expected in ./data; further options are passed on to compare.
set -u
failed=0
here=examples/stability
studies="plain-adam-constant plain-adam-cosine plain-adam99-constant residual-adam-constant residual-adam-cosine plain-sgd-cosine"
for study in ${STUDIES:-$studies}; do
  first=configs/methods/baseline.yaml
  more=
  case $study in
    plain-sgd-*) first=$here/methods/baseline-sgd.yaml ;;
    plain-adam-constant) more="$here/methods/relative-eps.yaml" ;;
    plain-adam-cosine) more="$here/methods/relative-eps.yaml $here/methods/handover.yaml" ;;
  esac
  python -m lightning_znorm compare --config "$here/$study.yaml" --methods "$first" configs/methods/znorm.yaml \
    "$here/methods/floor.yaml" "$here/methods/blend.yaml" "$here/methods/geometric.yaml" $more \
    --seeds ${SEEDS:-0 1 2} --metric test/accuracy --mode max --output "studies/stability/$study" "$@" || failed=1
done
exit $failed
