"""The kernels on a CUDA device: the same numbers, without waiting for the device."""

import importlib.util
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.launches import counted, pretended_device, shapes_of, slots_of, with_gradients
from lightning_znorm.errors import ZNormRuntimeError
from lightning_znorm.functional import attach, centralize_grads_, transform_grads_, zscore_grads_
from lightning_znorm.gradients import SING, AffineMethod, Centralization, ZScore, transform_slots_
from lightning_znorm.gradients.kernels import dispatch, transform_segments_, triton_check
from lightning_znorm.gradients.shards import unsharded_segments
from tests.gradients.reference import centralized, wide, zscore
from tests.gradients.test_methods import RMSNorm, RowZScore

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton: pip install triton")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=[pytest.param("triton", marks=needs_triton), "pytorch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with either kernel; with Triton's, nothing is left to the other."""

    def refuse(segments: list[object]) -> list[object]:
        assert not segments
        return []

    monkeypatch.delenv("LIGHTNING_ZNORM_KERNEL", raising=False)
    if request.param == "triton":
        monkeypatch.setenv("LIGHTNING_ZNORM_KERNEL", "triton")
        monkeypatch.setattr(dispatch, "device", SimpleNamespace(tables_of=refuse))
    return request.param


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


@contextmanager
def synchronizing_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("factor", [None, 4096.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [ZScore(), ZScore(centering="adaptive"), Centralization(), SING()], ids=repr)
def test_does_not_wait_for_the_device(method: AffineMethod, dtype: torch.dtype, factor: float | None) -> None:
    params = parameters(dtype)
    loss_scale = factor and torch.tensor(factor, device="cuda")
    slots = slots_of(params)
    transform_slots_(slots, method, loss_scale)  # the sizes go to the device once
    with synchronizing_is_an_error():
        transform_slots_(slots, method, loss_scale)
    assert all(param.grad.isfinite().all() for param in params)


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


@needs_triton
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_comparison_passes(kernel: str, dtype: torch.dtype, by_row: bool) -> None:
    if kernel != "triton":
        pytest.skip("of the Triton kernel alone")
    random_state = torch.cuda.get_rng_state()
    triton_check.check_kind.__wrapped__(torch.device("cuda", 0), dtype, by_row)  # whatever has been compared before
    assert torch.equal(torch.cuda.get_rng_state(), random_state)


@needs_triton
def test_no_comparison_while_a_graph_is_captured(kernel: str) -> None:
    if kernel != "triton":
        pytest.skip("of the Triton kernel alone")
    params = parameters()
    grads = [param.grad.clone() for param in params]
    zscore_grads_(params)
    triton_check.check_kind.cache_clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # torch warns of a graph without anything
        with pytest.raises(ZNormRuntimeError, match="take a step before"):
            zscore_grads_(params)
    for param, grad in zip(params, grads, strict=True):
        param.grad.copy_(grad)
    zscore_grads_(params)
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(wide(param.grad), z(grad), rtol=0, atol=1e-4)


def transformed(method: AffineMethod, *grads: Tensor, loss_scale: Tensor | None = None) -> list[Tensor]:
    copies = [grad.clone() for grad in grads]
    transform_segments_(unsharded_segments(copies, method), method, loss_scale)
    return copies


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("method", [RMSNorm(), RowZScore(), Centralization(), ZScore(eps=0.5)], ids=repr)
@pytest.mark.parametrize("loss_scale", [None, 4096.0])
def test_methods(method: AffineMethod, loss_scale: float | None) -> None:
    shapes = [(300, 5), (64, 16), (200, 27), (64, 64, 3, 3), (256, 1024), (30, 4608), (3, 100_000), (1, 50)]
    grads = [randn(*shape) + 0.3 for shape in shapes]
    factor = loss_scale or 1.0
    scaled = [grad * factor for grad in grads]
    for got, grad in zip(
        transformed(method, *scaled, loss_scale=loss_scale and torch.tensor(factor, device="cuda")), grads, strict=True
    ):
        rows = wide(grad).flatten(1)
        want = {
            "RMSNorm": lambda rows=rows: rows / rows.square().mean().sqrt(),
            "RowZScore": lambda rows=rows: (rows - rows.mean(1, keepdim=True)) / rows.std(1, False, keepdim=True),
            "Centralization": lambda rows=rows: rows - rows.mean(1, keepdim=True),
            "ZScore": lambda rows=rows: zscore(rows, eps=0.5),
        }[type(method).__name__]()
        torch.testing.assert_close(wide(got).flatten(1) / factor, want, rtol=0, atol=2e-5)


def test_anywhere_in_memory_and_nowhere_else() -> None:
    rng = random.Random(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lengths = [rng.choice([2, 9, 100, 1023, 4096, 5000, 70_000]) + rng.randrange(20) for _ in range(40)]
        gaps = [rng.randrange(9) for _ in lengths]
        bucket = torch.full((sum(lengths) + sum(gaps) + 64,), 7.0, dtype=dtype, device="cuda")
        start, views = 0, []
        for length, gap in zip(lengths, gaps, strict=True):
            views.append(bucket[start + gap : start + gap + length])
            start += gap + length
        for seed, view in enumerate(views):
            view.copy_(randn(len(view), dtype=dtype, seed=seed) + 0.5)
        want = [zscore(view) for view in views]
        transform_segments_(unsharded_segments(views, ZScore()), ZScore())
        rtol, atol = {2: (1e-2, 2e-2), 4: (0, 2e-5), 8: (0, 1e-12)}[dtype.itemsize]
        for view, expected in zip(views, want, strict=True):
            torch.testing.assert_close(wide(view), expected, rtol=rtol, atol=atol)
            view.fill_(7.0)
        assert torch.equal(bucket, torch.full_like(bucket, 7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_constant_becomes_zero(dtype: torch.dtype) -> None:
    for value in (1000.3, -0.1, 1e-7, 3.14e4, 0.0):
        grads = [torch.full((length,), value, dtype=dtype, device="cuda") for length in (2, 3, 999, 20_001, 3_000_001)]
        for grad in transformed(ZScore(), *grads):
            assert not grad.any(), (value, len(grad))


def test_large_mean() -> None:
    for mean in (1.0, -1e3, 1e5):
        for length in (1_000, 100_001, 3_000_000):
            grad = randn(length) + mean
            (got,) = transformed(ZScore(), grad)
            atol = 2e-5 + 8 * torch.finfo(torch.float32).eps * abs(mean)
            torch.testing.assert_close(wide(got), zscore(grad), rtol=0, atol=atol)


@pytest.mark.parametrize("length", [30, 5000, 300_000])
def test_inf_nan_overflow_and_denormals(length: int, kernel: str) -> None:
    for bad in (math.inf, -math.inf, math.nan):
        grad = randn(length)
        grad[length // 2] = bad
        got, other = transformed(ZScore(), grad, randn(length))
        assert got.isnan().all()
        assert other.isfinite().all()
    (got,) = transformed(ZScore(), randn(length) * 1e30)
    assert got.isnan().all()
    if kernel == "pytorch":  # which promises nothing about denormal variances
        return
    grad = randn(length) * 1e-20  # the variance is denormal, and no zero
    (got,) = transformed(ZScore(eps=0.0), grad)
    torch.testing.assert_close(wide(got), zscore(grad, eps=0.0), rtol=1e-2, atol=1e-2)


def test_the_same_bits_always() -> None:
    for method in (ZScore(), Centralization(), RMSNorm(), RowZScore()):
        grads = [
            randn(*shape) for shape in [(2,), (5, 7), (64, 64, 3, 3), (300, 40), (70_000,), (3, 100_000), (2000, 3000)]
        ]
        once = transformed(method, *grads)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            again = transformed(method, *grads)
        torch.cuda.synchronize()
        for first, second in zip(once, again, strict=True):
            assert torch.equal(first, second)


@needs_triton
def test_the_same_bits_whatever_else_there_is(kernel: str) -> None:
    if kernel != "triton":
        pytest.skip("of the Triton kernel alone: the other takes small gradients together")
    for method in (ZScore(), Centralization(), RowZScore()):
        grads = [randn(*shape) for shape in [(2,), (5, 7), (64, 64, 3, 3), (300, 40), (70_000,), (3, 100_000)]]
        together, reverse = transformed(method, *grads), transformed(method, *grads[::-1])[::-1]
        alone = [transformed(method, grad)[0] for grad in grads]
        for first, second, third in zip(together, reverse, alone, strict=True):
            assert torch.equal(first, second)
            assert torch.equal(first, third)


@pytest.mark.parametrize("method", [ZScore(), Centralization(), RMSNorm(), RowZScore()], ids=repr)
def test_graphs_outlive_what_is_cached(method: AffineMethod, kernel: str) -> None:
    params = [param for param in parameters() if param.numel() > 1]
    grads = [param.grad.clone() for param in params]
    transform_grads_(params, method)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        transform_grads_(params, method)
    if kernel == "triton":
        from lightning_znorm.gradients.kernels import triton

        triton._launch_plan.cache_clear()
        triton._uploaded.cache_clear()
    torch.cuda.empty_cache()
    garbage = [torch.full((2**16,), 3, device="cuda") for _ in range(64)]
    for param, grad in zip(params, grads, strict=True):
        param.grad.copy_(2 * grad + 1)
    graph.replay()
    for param, want in zip(params, transformed(method, *(2 * grad + 1 for grad in grads)), strict=True):
        torch.testing.assert_close(param.grad, want, rtol=1e-5, atol=1e-5)
    del garbage


def test_whole_steps_in_a_cuda_graph() -> None:
    # The gradients are allocated while the graph is captured, at addresses that no step before has seen.
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(8, 70), nn.ReLU(), nn.Linear(70, 3)).cuda() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]
    batch = torch.zeros(16, 8, device="cuda")

    def step(which: int) -> None:
        optimizers[which].zero_grad(set_to_none=True)
        networks[which](batch).square().mean().backward()
        zscore_grads_(networks[which].parameters())
        optimizers[which].step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[1].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step(1)
    networks[1].load_state_dict(networks[0].state_dict())
    for seed in range(5):
        batch.copy_(randn(16, 8, seed=seed))
        step(0)
        graph.replay()
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_extra_memory(kernel: str) -> None:
    params = [nn.Parameter(torch.empty(2000, 4000, device="cuda")) for _ in range(10)]
    for param in params:
        param.grad = torch.randn_like(param)
    for method in (zscore_grads_, centralize_grads_):
        method(params)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method(params)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_elements_than_32_bits_count(dtype: torch.dtype, kernel: str) -> None:
    numel = 2**31 + 12_345
    if (
        torch.cuda.mem_get_info()[0]
        < (3 if kernel == "triton" or dtype == torch.float32 else 9) * numel * dtype.itemsize
    ):
        pytest.skip("needs a GPU with more free memory")
    grad = torch.empty(numel, dtype=dtype, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    parts = torch.split(grad, 2**28)
    sums = torch.zeros(2, dtype=torch.float64, device="cuda")
    for index, part in enumerate(parts):
        part.normal_(0.5 + index, generator=generator)
        sums += torch.stack([part.double().sum(), part.double().square().sum()])
    mean, square = (sums / numel).unbind()
    std = (square - mean.square()).sqrt()
    samples = [slice(0, 1000), slice(2**31 - 500, 2**31 + 500), slice(numel - 1000, numel)]
    want = [(wide(grad[sample]) - mean) / std for sample in samples]
    transform_segments_(unsharded_segments([grad], ZScore()), ZScore())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for sample, expected in zip(samples, want, strict=True):
        torch.testing.assert_close(wide(grad[sample]), expected, rtol=tolerance / 2, atol=tolerance)
    total = sum(part.double().sum() for part in parts) / numel
    assert abs(float(total)) < tolerance / 10


def test_launches_are_as_counted_without_a_device(kernel: str) -> None:
    if kernel == "triton":
        pytest.skip("launches of its own programs are not counted")
    shapes = shapes_of("ResNet-56")
    with pretended_device():
        pretended = with_gradients(shapes, torch.float32)
        expected = counted(lambda: zscore_grads_(pretended), pretended).total
    params = with_gradients(shapes, torch.float32)
    for param in params:
        param.grad.normal_()
    zscore_grads_(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        zscore_grads_(params)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # A reduction of a large tensor to one number also clears a buffer, which is not counted.
    launched = [name for name in names if not name.startswith("Memset")]
    assert 0.5 * expected <= len(launched) <= expected, sorted(launched)


def test_sing_gives_the_same_bits_each_time() -> None:
    grads = [randn(512, 300), randn(64, 3, 3, 3), randn(512), randn(2000, 100)]
    results = []
    for _ in range(20):
        params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        transform_grads_(params, SING())
        results.append([param.grad for param in params])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_optimizers(make: Callable[..., torch.optim.Optimizer]) -> None:
    weights = [nn.Parameter(torch.linspace(-1, 1, 5000, device="cuda")) for _ in range(2)]
    optimizers = [make([weight], lr=0.1, fused=fused) for weight, fused in zip(weights, (False, True), strict=True)]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        attach(optimizer, ZScore(eps=0.3))
        scaler = torch.amp.GradScaler("cuda")
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(weight.sin().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)
