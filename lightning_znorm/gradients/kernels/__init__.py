"""Kernels that rewrite gradients in place, each for every affine method."""

from lightning_znorm.gradients.kernels.blockwise import affine_

__all__ = ["affine_"]
