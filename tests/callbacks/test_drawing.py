"""Pictures of masks."""

import pytest
import torch

from lightning_znorm.callbacks.drawing import Case, grid


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_default_dtype_does_not_matter(default: torch.dtype, dtype: torch.dtype):
    mask = torch.eye(16, dtype=torch.bool)[None]
    case = Case(torch.arange(256).view(1, 16, 16).to(dtype), mask, mask, "a caption")
    expected = grid([case])
    torch.set_default_dtype(default)
    try:
        assert grid([case]) == expected
    finally:
        torch.set_default_dtype(torch.float32)
