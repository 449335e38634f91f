"""Kernels that rewrite gradients in place, each for every affine method, and measure them."""

from lightning_znorm.gradients.kernels.dispatch import affine_, affine_wholes_
from lightning_znorm.gradients.kernels.sharded import affine_shards_, measure_shards

__all__ = ["affine_", "affine_shards_", "affine_wholes_", "measure_shards"]
