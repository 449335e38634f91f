"""centralize_grads_: its numbers, against the definition and the authors' formula."""

import math

import pytest
import torch
from torch import nn

from lightning_znorm.functional import centralize_grads_
from tests.gradients.reference import centralized, wide

pytestmark = pytest.mark.usefixtures("each_kernel")


def centralize(grad: torch.Tensor) -> torch.Tensor:
    param = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    param.grad = grad
    centralize_grads_(param)
    assert param.grad is not None
    return param.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (16, 8, 3, 3), (1, 50), (700, 1000), (5, 2, 2, 2, 2)], ids=str)
def test_matches_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 1
    expected = centralized(grad)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(wide(centralize(grad)), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1), (5, 1, 1, 1), (1, 1), (0, 4), (4, 0)], ids=str)
def test_rows_of_one_element_stay(shape: tuple[int, ...]) -> None:
    grad = torch.randn(shape)
    before = grad.clone()
    assert torch.equal(centralize(grad), before)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_channels_last_in_place(memory_format: torch.memory_format) -> None:
    grad = torch.randn(6, 5, 4, 3).to(memory_format=memory_format)
    expected, pointer = centralized(grad), grad.data_ptr()
    result = centralize(grad)
    assert result.data_ptr() == pointer
    assert result.stride() == grad.stride()
    torch.testing.assert_close(wide(result), expected, rtol=0, atol=1e-6)


def test_transposed() -> None:
    grad = torch.randn(30, 20).t()
    expected = centralized(grad)
    torch.testing.assert_close(wide(centralize(grad)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_inf_and_nan_stay_visible_in_their_row(bad: float) -> None:
    grad = torch.randn(3, 4)
    grad[1, 2] = bad
    result = centralize(grad)
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("after_momentum", [False, True])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_authors_sgd(penalty: float, momentum: float, nesterov: bool, after_momentum: bool) -> None:
    """They centre the gradient with its L2 penalty: before momentum, or in one version after it, in place.

    github.com/Yonghongwei/Gradient-Centralization, SGD_GC in GC_code/CIFAR100/algorithm/SGD.py, and SGD in
    algorithm-GC/algorithm/SGD.py. Without the penalty it is ours.
    """
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    param, authors, buffer = nn.Parameter(start.clone()), start.clone(), torch.zeros_like(start)
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=penalty)
    for _ in range(3):
        grad = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        param.grad = grad.clone()
        centralize_grads_(param)
        optimizer.step()
        update = grad + penalty * authors
        if not after_momentum:
            update = centralized(update)
        buffer = momentum * buffer + update
        update = update + momentum * buffer if nesterov else buffer
        if after_momentum:
            update = centralized(update)
            buffer = buffer if nesterov else update
        authors -= 0.1 * update
    # They never move the mean of a row, and we do so by the penalty.
    torch.testing.assert_close(authors.mean(1), start.mean(1))
    assert torch.allclose(param.data, authors) == (penalty == 0)
    torch.testing.assert_close(centralized(param.data), centralized(authors))
