"""The kernels on a CUDA device: the same numbers, without waiting for the device."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_znorm.functional import attach, centralize_grads_, zscore_grads_
from lightning_znorm.gradients import ZScore
from tests.gradients.reference import centralized, wide, zscore

pytestmark = pytest.mark.gpu

# Stacked, flat, and more than one multiple of every block that a kernel may use.
SHAPES = [(64,), (64,), (16, 8, 3, 3), (16, 8, 3, 3), (300, 100), (3000, 2000), (7,), (1,), (0, 3), (40, 1)]


def parameters(dtype: torch.dtype = torch.float32, **layout: torch.memory_format) -> list[nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    params = []
    for index, shape in enumerate(SHAPES):
        grad = (torch.randn(shape, generator=generator, device="cuda") + 1) * 10.0 ** (index - 5)
        param = nn.Parameter(torch.zeros(shape, dtype=dtype, device="cuda"))
        param.grad = grad.to(dtype).to(**layout) if grad.ndim == 4 else grad.to(dtype)
        params.append(param)
    return params


def z(grad: Tensor) -> Tensor:
    return zscore(grad) if grad.numel() > 1 else wide(grad)


def centered(grad: Tensor) -> Tensor:
    return centralized(grad) if grad.ndim > 1 and grad.numel() > len(grad) else wide(grad)


@pytest.mark.parametrize("layout", [{}, {"memory_format": torch.channels_last}], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "atol"),
    [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 2e-2)],
    ids=str,
)
def test_zscore(dtype: torch.dtype, atol: float, layout: dict[str, torch.memory_format]) -> None:
    params = parameters(dtype, **layout)
    expected = [z(param.grad) for param in params]
    zscore_grads_(params)
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(wide(param.grad), want, rtol=1e-2 if dtype.itemsize == 2 else 0, atol=atol)


def test_centralization() -> None:
    params = parameters(torch.float64)
    expected = [centered(param.grad) for param in params]
    centralize_grads_(params)
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, want)


@pytest.fixture
def synchronizing_is_an_error() -> Iterator[None]:
    zscore_grads_(parameters())  # the sizes go to the device once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", [zscore_grads_, centralize_grads_])
def test_does_not_wait_for_the_device(method, request: pytest.FixtureRequest) -> None:
    params = parameters()
    request.getfixturevalue("synchronizing_is_an_error")
    method(params)
    torch.cuda.set_sync_debug_mode("default")
    matrix = params[4].grad
    means = matrix.mean() if method is zscore_grads_ else matrix.mean(dim=1)
    assert means.abs().max() < 1e-4


def test_in_a_cuda_graph() -> None:
    params = parameters()
    grads = [param.grad.clone() for param in params]
    zscore_grads_(params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        zscore_grads_(params)
    for param, grad in zip(params, grads, strict=True):
        param.grad.copy_(2 * grad + 1)
    graph.replay()
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(wide(param.grad), z(2 * grad + 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_attached_under_a_grad_scaler(fused: bool) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 12, device="cuda"))
    start = weight.detach().double().requires_grad_()
    start.sin().sum().backward()
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    attach(optimizer, ZScore(eps=0.3))
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(weight.sin().sum()).backward()
    scaler.step(optimizer)
    expected = start.detach() - 0.1 * zscore(start.grad, eps=0.3)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)
