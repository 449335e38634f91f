"""The Triton kernel on a CPU, by Triton's interpreter: run by pytest with ``TRITON_INTERPRET=1`` (test_triton.py)."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_znorm import ZNormCallback
from lightning_znorm.errors import ZNormRuntimeError
from lightning_znorm.gradients import SING, AffineMethod, Centralization, Statistics, ZScore
from lightning_znorm.gradients.kernels import (
    caches,
    device,
    dispatch,
    transform_segments_,
    transform_unsharded_,
    triton,
    triton_check,
    triton_programs,
)
from lightning_znorm.gradients.shards import Segment, unsharded_segments
from tests.gradients import broken_triton
from tests.gradients.reference import centralized, sing, wide, zscore
from tests.gradients.test_methods import Counted, HalfCentered, RMSNorm, RowZScore
from tests.gradients.test_shards import check as check_of_shards
from tests.gradients.test_shards import evenly
from tests.gradients.test_zscore import TOLERANCE
from tests.trainers import trainer

# NumPy, which the interpreter computes with, warns of what the tests of inf, NaN and overflow are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")
check_kind = triton_check.check_kind


@pytest.fixture(autouse=True)
def left(monkeypatch: pytest.MonkeyPatch) -> list[Segment]:
    """Takes the CPU for a device whose user has chosen Triton, and lists the segments that go to PyTorch's kernel.

    The kernel is not compared with PyTorch's, which takes seconds, but in tests of that.
    """
    segments: list[Segment] = []

    def recorded(unsupported: list[Segment]) -> list[device.DeviceTable]:
        segments.extend(unsupported)
        return device.tables_of(unsupported)

    monkeypatch.setenv("LIGHTNING_ZNORM_KERNEL", "triton")
    monkeypatch.setattr(dispatch, "is_on_cpu", lambda tensor: False)
    monkeypatch.setattr(dispatch, "device", SimpleNamespace(tables_of=recorded))
    monkeypatch.setattr(triton_check, "check_kind", lambda *_: None)
    return segments


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 32 elements, at most four chunks: a few hundred elements have all that large tensors have."""
    monkeypatch.setattr(triton, "_TILE", {torch.float32: 32, torch.float64: 32})
    monkeypatch.setattr(triton, "_MAX_CHUNKS", 4)
    triton._launch_plan.cache_clear()
    yield
    triton._launch_plan.cache_clear()


def transformed(method: AffineMethod, *grads: Tensor, loss_scale: Tensor | None = None) -> list[Tensor]:
    copies = [torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype).copy_(grad) for grad in grads]
    transform_segments_(unsharded_segments(copies, method), method, loss_scale)
    return copies


def expected(method: AffineMethod, grad: Tensor) -> Tensor:
    """By definition, in float64."""
    if isinstance(method, Centralization):
        return centralized(grad) if grad.ndim > 1 and grad[0].numel() > 1 else wide(grad)
    if isinstance(method, RowZScore):
        if grad.ndim < 2 or grad[0].numel() < 2:
            return wide(grad)
        return torch.stack([zscore(row, eps=0.0) for row in grad])
    if grad.numel() < 2:
        return wide(grad)
    if isinstance(method, SING):
        return sing(grad, method.eps)
    if isinstance(method, RMSNorm):
        return wide(grad) / wide(grad).square().mean().sqrt()
    if isinstance(method, HalfCentered):
        return wide(grad) - wide(grad).mean() / 2
    assert isinstance(method, ZScore)
    return zscore(grad, method.eps, method.centering)


def check(method: AffineMethod, *grads: Tensor) -> None:
    for got, grad in zip(transformed(method, *grads), grads, strict=True):
        want = expected(method, grad)
        # Of the size of what is written, and of the mean, which is known to some units of rounding.
        unit = max(1.0, wide(grad).abs().max().item() if not isinstance(method, ZScore | RowZScore) else 1.0)
        torch.testing.assert_close(wide(got), want, rtol=TOLERANCE[grad.dtype], atol=TOLERANCE[grad.dtype] * unit)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Around a part, a tile, several tiles, and the longest row that is one program's.
LENGTHS = [2, 7, 1023, 1025, 4095, 4096, 4097, 8191, 2 * 4096 + 1025]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_around_the_boundaries(dtype: torch.dtype, left: list[Segment]) -> None:
    check(ZScore(), *((3 * randn(length) + 1).to(dtype) for length in LENGTHS))
    assert not left


@pytest.mark.parametrize("method", [Centralization(), RowZScore()], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_around_the_boundaries(dtype: torch.dtype, method: AffineMethod, left: list[Segment]) -> None:
    shapes = [(130, 2), (129, 16), (33, 17), (5, 9, 3, 3), (9, 257), (3, 1024), (2, 1025), (3, 4097), (1, 40)]
    check(method, *((randn(*shape) + 0.5).to(dtype) for shape in shapes))
    assert not left


@pytest.mark.parametrize("method", [Centralization(), RowZScore(), ZScore()], ids=repr)
def test_rows_longer_than_one_program_takes(method: AffineMethod) -> None:
    check(method, (randn(2, 8 * 4096 + 17) + 0.5).float(), (randn(3, 8 * 4096) + 0.5).float())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_of_several_tiles(dtype: torch.dtype) -> None:
    check(ZScore(), *((randn(length) + 0.5).to(dtype) for length in (32, 33, 127, 128, 129, 500, 1024)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("method", [ZScore(eps=0.1), Centralization(), RMSNorm(), HalfCentered(), SING()], ids=repr)
def test_methods_with_chunks(method: AffineMethod) -> None:
    check(method, *((randn(*shape) + 0.5).float() for shape in [(33,), (500,), (3, 1100), (2, 256)]))


def layouts(shape: tuple[int, ...], grad: Tensor) -> Iterator[tuple[Tensor, bool, bool]]:
    """The same values in other memory, whether it is dense, and whether rows are."""
    yield grad, True, True
    yield torch.stack([grad, grad], dim=-1)[..., 0], grad.numel() == 1, grad.numel() == 1
    if grad.ndim == 4:
        yield grad.to(memory_format=torch.channels_last), True, True
    if grad.ndim > 1:
        yield grad.transpose(0, -1).contiguous().transpose(0, -1), True, min(shape[0], grad[0].numel()) == 1


shapes = st.one_of(
    st.lists(st.integers(1, 12), min_size=0, max_size=4).map(tuple),
    st.tuples(st.integers(1, 400)),
    st.tuples(st.integers(1, 5), st.integers(1, 300)),
)


@st.composite
def grads_in_a_bucket(draw: st.DrawFn) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """A buffer, and where in it there are gradients; nothing else in it may change."""
    dtype = draw(st.sampled_from(DTYPES))
    segments, offset = [], draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for shape in draw(st.lists(shapes, min_size=1, max_size=6)):
        deviation = draw(st.sampled_from([1.0, 1e-3, 0.0]))
        mean = draw(st.sampled_from([0.0, 0.25, -3.0]))
        grad = torch.randn(shape, generator=generator, dtype=torch.float64) * deviation + mean
        segments.append((offset, grad.to(dtype)))
        offset += grad.numel() + draw(st.integers(0, 9))
    return torch.full((offset + 8,), 7.0, dtype=dtype), segments


METHODS = [ZScore(), ZScore(eps=0.5), ZScore(centering="adaptive"), Centralization(), RMSNorm(), HalfCentered()]


@pytest.mark.usefixtures("small_tiles")
@given(grads_in_a_bucket(), st.sampled_from(METHODS), st.sampled_from([None, 1024.0]))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_gradients_anywhere_in_memory(
    bucket: tuple[Tensor, list[tuple[int, Tensor]]], method: AffineMethod, loss_scale: float | None
) -> None:
    memory, grads = bucket
    factor = 1.0 if loss_scale is None or memory.dtype == torch.float16 else loss_scale
    views = []
    for offset, grad in grads:
        views.append(memory[offset : offset + grad.numel()].view(grad.shape).copy_(grad * factor))
    scale = None if loss_scale is None else torch.tensor(factor)
    transform_segments_(unsharded_segments(views, method), method, scale)
    for view, (_, grad) in zip(views, grads, strict=True):
        if isinstance(method, RMSNorm) and not grad.any():
            assert view.numel() < 2 or view.isnan().all()  # 0 / 0
        else:
            unit = 3 * max(1.0, wide(grad).abs().max().item()) * TOLERANCE[grad.dtype]
            if isinstance(method, ZScore) and wide(grad).std(correction=0) > 0:
                # What a mean that is rounded in float32 can do in units of the deviation.
                precision = torch.finfo(torch.float64 if grad.dtype == torch.float64 else torch.float32).eps
                unit += 8 * precision * (wide(grad).mean().abs() / wide(grad).std(correction=0)).item()
            torch.testing.assert_close(wide(view) / factor, expected(method, grad), rtol=0, atol=unit)
            view.fill_(7.0)
    for view in views:
        view.fill_(7.0)
    assert torch.equal(memory, torch.full_like(memory, 7.0))


@given(shapes.filter(lambda shape: math.prod(shape) > 1), st.sampled_from([ZScore(), Centralization(), RowZScore()]))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_layouts_and_what_is_left(left: list[Segment], shape: tuple[int, ...], method: AffineMethod) -> None:
    for grad, is_dense, has_dense_rows in layouts(shape, randn(*shape)):
        left.clear()
        check(method, grad)
        takes = has_dense_rows if method.over == "row" else is_dense
        if takes:
            assert not left
        elif unsharded_segments([grad], method):
            assert len(left) <= 1


def test_what_is_strided_or_complex_is_left(left: list[Segment]) -> None:
    strided, complexes, dense = randn(40, 6)[:, ::2], torch.complex(randn(40), randn(40, seed=1)), randn(4, 60)
    check(ZScore(), strided, complexes, dense)
    assert [segment.tensor.shape for segment in left] == [(40, 3), (40,)]
    left.clear()
    check(Centralization(), randn(30, 20).t(), dense)
    assert [segment.tensor.shape for segment in left] == [(20, 30)]


def test_lazily_negated_is_left(left: list[Segment]) -> None:
    grad = torch._neg_view(randn(9))  # as the imaginary part of a conjugate
    assert grad.is_neg()
    assert grad.is_contiguous()
    want = zscore(grad.resolve_neg())
    transform_segments_([Segment(grad)], ZScore())
    torch.testing.assert_close(grad.resolve_neg(), want)
    assert len(left) == 1


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1000.3, -0.1, 1e-7, 3.14e4, 0.0])
def test_constant_becomes_zero(value: float, dtype: torch.dtype) -> None:
    for grad in transformed(ZScore(), *(torch.full((numel,), value, dtype=dtype) for numel in (2, 3, 999))):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mean", [1.0, -1e3, 1e5])
def test_huge_mean(mean: float) -> None:
    grads = [(randn(numel) + mean).float() for numel in (30, 3000)]
    for got, grad in zip(transformed(ZScore(), *grads), grads, strict=True):
        # What a rounded mean can do, in units of the deviation, which is 1; E[x^2] - E[x]^2 would be off by mean^2 eps.
        atol = 2e-5 + 8 * torch.finfo(torch.float32).eps * abs(mean)
        torch.testing.assert_close(wide(got), zscore(grad), rtol=0, atol=atol)


@pytest.mark.usefixtures("small_tiles")
def test_an_outlier_costs_its_neighbours_in_other_chunks_nothing_of_the_deviation() -> None:
    grad = randn(4000).float()
    grad[0] = 1e6
    check(ZScore(), grad)


@pytest.mark.parametrize("numel", [30, 5000])
def test_denormal(numel: int) -> None:
    half, tiny = (randn(numel) * 2e-7).half(), (randn(numel) * 1e-40).float()
    assert 0 < half.abs().min() < 6e-8 or half.eq(0).any()
    check(ZScore(eps=0.0), half)
    # Squares of these are zero in float32, as they are for the other kernel.
    (got,) = transformed(ZScore(eps=0.0), tiny)
    assert torch.equal(got, torch.zeros(numel))
    # Their variance is denormal itself.
    grad = (randn(numel) * 1e-20).float()
    (got,) = transformed(ZScore(eps=0.0), grad)
    torch.testing.assert_close(wide(got), zscore(grad, eps=0.0), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("numel", [8, 300])
def test_inf_and_nan_stay_visible(numel: int, bad: float) -> None:
    for where in (0, numel - 1):
        grad = randn(numel).float()
        grad[where] = bad
        for method in (ZScore(), RMSNorm()):
            got, other = transformed(method, grad, randn(numel).float())
            assert got.isnan().all()
            assert other.isfinite().all()
    rows = randn(3, numel).float()
    rows[1, 2] = bad
    (got,) = transformed(Centralization(), rows)
    assert not got[1].isfinite().any()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("numel", [3, 300])
def test_overflow_of_the_deviation_stays_visible(numel: int) -> None:
    # The squares are inf in float32; a scale of 1 / inf would silently zero the gradient.
    (got,) = transformed(ZScore(), (randn(numel) * 1e30).float())
    assert got.isnan().all()
    # No deviation overflows here, though the mean's square does.
    (got,) = transformed(ZScore(), torch.full((numel,), 1e20))
    assert torch.equal(got, torch.zeros(numel))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "method",
    [ZScore(eps=0.5), ZScore(0.5, "adaptive"), Centralization(), RMSNorm(), RowZScore(), HalfCentered()],
    ids=repr,
)
def test_loss_scale_passes_through(method: AffineMethod) -> None:
    grads = [(randn(*shape) + 0.3).float() for shape in [(7,), (40, 30), (9,), (3, 600)]]
    plain = transformed(method, *grads)
    scaled = transformed(method, *(grad * 65536 for grad in grads), loss_scale=torch.tensor(65536.0))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other / 65536, one, rtol=0, atol=1e-6)


def test_huge_loss_scale() -> None:
    # Its square overflows, and the z-scores would be zero.
    grad = (randn(50) * 1e-9).float()
    (got,) = transformed(ZScore(), grad * 2.0**66, loss_scale=torch.tensor(2.0**66))
    torch.testing.assert_close(wide(got) / 2.0**66, zscore(grad), rtol=0, atol=1e-5)


def test_eps_in_double_precision() -> None:
    grad = randn(50) * 1e-10
    (got,) = transformed(ZScore(), grad)
    torch.testing.assert_close(got, zscore(grad), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_counts() -> None:
    grads = [(randn(numel) + 0.3).float() for numel in (2, 32, 33, 600)]
    for got, grad in zip(transformed(Counted(), *grads), grads, strict=True):
        torch.testing.assert_close(wide(got), wide(grad) * grad.numel(), rtol=2e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_statistics_of_rows_and_tensors() -> None:
    tensors = [randn(3, 5) + 1, randn(2, 700) - 2, randn(1, 1100)]
    stats = triton.PointerTable([Segment(tensor, by_row=True) for tensor in tensors]).measure()
    rows = [row for tensor in tensors for row in tensor]
    assert stats.count.tolist() == [len(row) for row in rows]
    torch.testing.assert_close(stats.mean, torch.stack([row.mean() for row in rows]))
    assert stats.m2 is not None
    torch.testing.assert_close(stats.m2, torch.stack([row.var(correction=0) * len(row) for row in rows]))


def test_shift_or_scale_of_another_type_and_layout() -> None:
    class Odd(AffineMethod):
        def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
            return stats.mean.double(), torch.full((1,), 2.0).expand(len(stats.mean))

    grads = [randn(5).float(), randn(6).float()]
    for got, grad in zip(transformed(Odd(), *grads), grads, strict=True):
        torch.testing.assert_close(wide(got), 2 * (wide(grad) - wide(grad).mean()), rtol=0, atol=1e-5)


def test_scale_of_another_shape_is_refused_before_anything_is_written() -> None:
    class Doubled(AffineMethod):
        def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
            return None, torch.tensor(2.0)

    grad = randn(5)
    with pytest.raises(TypeError, match=r"Doubled\.affine must return .* of shape \(1,\)"):
        transform_segments_([Segment(grad)], Doubled())
    assert torch.equal(grad, randn(5))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("method", [ZScore(), Centralization(), RMSNorm(), RowZScore()], ids=repr)
def test_the_same_bits_always(method: AffineMethod) -> None:
    grads = [(randn(*shape) + 0.3).float() for shape in [(2,), (5, 7), (900,), (2, 300), (33,)]]
    once = transformed(method, *grads)
    again = transformed(method, *grads)
    reverse = transformed(method, *reversed(grads))[::-1]
    alone = [transformed(method, grad)[0] for grad in grads]
    for results in zip(once, again, reverse, alone, strict=True):
        assert all(torch.equal(result, results[0]) for result in results)


def test_addresses_go_to_the_device_once() -> None:
    grads = [randn(5), randn(6)]
    segments = unsharded_segments(grads, ZScore())
    transform_segments_(segments, ZScore())
    before = triton._uploaded.cache_info()
    transform_segments_(segments, ZScore())
    after = triton._uploaded.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that a CUDA graph is being captured."""
    for module in (caches, triton, triton_check):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    monkeypatch.setattr(caches, "_captured", {})


def test_no_copy_from_the_host_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [randn(5).float(), randn(40, 30).float()]
    want = [zscore(grad) for grad in grads]
    transformed(ZScore(), *grads)  # sizes are known from a step before
    capture(monkeypatch)
    monkeypatch.setattr(torch, "tensor", None)  # as all that makes a tensor of Python's numbers in host memory
    transform_segments_(unsharded_segments(grads, ZScore()), ZScore())
    for got, expectation in zip(grads, want, strict=True):
        torch.testing.assert_close(wide(got), expectation, rtol=0, atol=2e-5)
    # The graph reads the tables whenever it is replayed.
    (plan,) = caches._captured.values()
    assert plan.num_stats == 2


def test_chunks_are_few_and_cover_their_run() -> None:
    for length in [*range(4097, 10**6, 9973), 10**7, 2**31 + 1, 2**40 + 3]:
        tiles, chunks = triton._cut(length, 4096)
        assert 0 < chunks <= 512
        assert (chunks - 1) * tiles * 4096 < length <= chunks * tiles * 4096


def test_beyond_32_bits() -> None:
    # The memory is reserved, and touched only where the last program reads and writes.
    numel = 2**31 + 4096 + 5
    grad = torch.empty(numel, dtype=torch.bfloat16)
    table = triton.PointerTable([Segment(grad)])
    plan, addresses = table._plan, table._addresses
    last = numel - (numel - 1) % (triton._cut(numel, 4096)[0] * 4096) - 1
    grad[last:] = randn(numel - last).bfloat16()
    want = wide(grad[last:])
    partials = torch.full((2 * plan.chunks,), math.nan)
    tables = (addresses, plan.segments, plan.items[-1:])
    constants = {"FINISH": False, "NEEDS_STD": True, **plan.constants}
    triton_programs.first_pass[(1,)](*tables, partials, partials, partials, None, 0.0, LONG=plan.long, **constants)
    mean, m2 = partials[-2:].tolist()
    assert partials[:-2].isnan().all()
    assert mean == pytest.approx(want.mean().item(), abs=1e-6)
    assert m2 == pytest.approx(want.var(correction=0).item() * len(want), rel=1e-4)
    scale = torch.full((1,), 2.0)
    triton_programs.second_pass[(1,)](*tables, None, None, scale, None, 0.0, MAX_CHUNKS=triton._MAX_CHUNKS, **constants)
    torch.testing.assert_close(wide(grad[last:]), 2 * want)


# Gradients that are spread over processes: measured, and rewritten when the statistics of all are known.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Processes are simulated by threads, and the interpreter knows one program at a time. Counts the passes."""
    lock, counter = threading.Lock(), Counter[str]()

    def locked(name: str) -> Callable[..., Any]:
        function = getattr(triton.PointerTable, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with lock:
                counter[name] += 1
                return function(*args, **kwargs)

        return wrapper

    for name in ("measure", "rewrite_"):
        monkeypatch.setattr(triton.PointerTable, name, locked(name))
    return counter


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("method", [ZScore(), Centralization(), RowZScore(), RMSNorm(), HalfCentered()], ids=repr)
@pytest.mark.parametrize("loss_scale", [None, 4096.0])
def test_shards(method: AffineMethod, loss_scale: float | None, calls: Counter[str]) -> None:
    grads = [(randn(*shape) + 0.3).float() for shape in [(300,), (3, 5), (5, 90), (2,)]] + [randn(7, 9)]
    factor = loss_scale or 1.0
    shards = evenly([grad * factor for grad in grads], 2)
    results = shards.transformed(method, loss_scale and torch.tensor(loss_scale))
    # On each of two ranks, of each of two types; rows in a table apart from those that begin or end elsewhere.
    assert calls["measure"] == calls["rewrite_"] == (8 if method.over == "row" else 4)
    for got, grad in zip(results, grads, strict=True):
        check_of_shards(got / factor, grad, method)


@pytest.mark.usefixtures("small_tiles", "calls")
def test_what_shards_hold_of_large_means_constants_overflow_and_outliers() -> None:
    large = (randn(300) + 1e4).float()
    constant, overflow, outlier = torch.full((333,), 1000.3), (randn(40) * 1e30).float(), randn(300).float()
    outlier[3] = 1e6
    got = evenly([large, constant, overflow, outlier], 3).transformed(ZScore())
    torch.testing.assert_close(wide(got[0]), zscore(large), rtol=0, atol=8 * torch.finfo(torch.float32).eps * 1e4)
    assert torch.equal(got[1], torch.zeros(333))
    assert got[2].isnan().all()
    check_of_shards(got[3], outlier, ZScore())


# The comparison with PyTorch's kernel, before a gradient of a kind is changed for the first time.


@pytest.fixture
def compares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compares the kernel with PyTorch's, as of a new process."""
    monkeypatch.setattr(triton_check, "check_kind", check_kind)
    check_kind.cache_clear()
    yield
    check_kind.cache_clear()


FLOAT32 = (torch.float32, False)
ROWS = (torch.float32, True)
BFLOAT16 = (torch.bfloat16, False)
# A program, a wrong one in its place, a kind of gradients that shows it, and one that does not.
BROKEN = [
    ("_measure_part", broken_triton.part_without_its_last_element, FLOAT32, None),
    ("_merge_chunks", broken_triton.mean_of_the_first_chunk, FLOAT32, None),
    ("_rewrite_rows", broken_triton.wide_rows_without_a_shift, ROWS, FLOAT32),
    ("_rewrite_rows", broken_triton.rows_and_what_is_before_them, ROWS, None),
    ("_rewrite_part", broken_triton.bfloat16_without_a_shift, BFLOAT16, FLOAT32),
    ("_zscore_scale", broken_triton.scale_of_a_constant, FLOAT32, None),
    ("_zscore_scale", broken_triton.scale_without_the_loss_scale, FLOAT32, ROWS),
]


@pytest.mark.usefixtures("compares")
class TestComparison:
    @pytest.mark.parametrize("by_row", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_passes(self, dtype: torch.dtype, by_row: bool) -> None:
        grad = (randn(30, 20) + 0.3).to(dtype)
        method = Centralization() if by_row else ZScore()
        random_state = torch.get_rng_state()
        want = expected(method, grad)
        transform_segments_([Segment(grad, by_row)], method)
        torch.testing.assert_close(wide(grad), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(torch.get_rng_state(), random_state)
        assert torch.is_grad_enabled()
        transform_segments_([Segment(grad, by_row)], method)
        assert (check_kind.cache_info().misses, check_kind.cache_info().hits) == (1, 1)

    def test_takes_all_routes(self) -> None:
        """What the lengths of runs are chosen for."""
        plans = {
            (dtype, by_row): triton._LaunchPlan(
                [torch.Size(shape) if by_row else shape[0] for shape in triton.shapes_of_all_routes(dtype, by_row)],
                dtype,
                CPU,
            )
            for dtype in DTYPES
            for by_row in (False, True)
        }
        part, narrow = triton_programs.PART.value, triton_programs.NARROW.value
        for (_, by_row), plan in plans.items():
            lengths, _, tiles_of_chunk, chunks, *_ = plan.segments.unbind(1)
            is_long = lengths > plan.long
            assert is_long.any()
            assert (~is_long).any()
            assert chunks.max() > 1
            assert (tiles_of_chunk > 1).any()
            assert (lengths < part).any()
            assert (lengths[is_long] % plan.constants["TILE"] != 0).any()
            if by_row:
                rows = {triton._rows_of_program(length): runs for length, runs, *_ in plan.segments.tolist()}
                assert rows.keys() == {1, 2, 8, 32, 128}
                assert all(runs % height for height, runs in rows.items() if height > 1)
                assert {narrow, narrow + 1} <= set(lengths.tolist())

    @pytest.mark.parametrize(
        ("program", "wrong", "kind", "right"), BROKEN, ids=[wrong.fn.__name__ for _, wrong, *_ in BROKEN]
    )
    def test_refuses_wrong_results(
        self,
        program: str,
        wrong: Any,
        kind: tuple[torch.dtype, bool],
        right: tuple[torch.dtype, bool] | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(triton_programs, program, wrong)
        dtype, by_row = kind
        of_kind = f"of {dtype} gradients on cpu{' by row' if by_row else ''}"
        what = (
            r" writes outside the gr" if "before" in wrong.fn.__name__ else r", of shape \(.* differ by .* explains .*"
        )
        grad = torch.full((3, 4), 2.0, dtype=dtype)  # of which none of the wrong programs makes anything wrong
        for _ in range(2):
            with pytest.raises(
                ZNormRuntimeError, match=f"KERNEL is 'triton'.*{of_kind}{what}.* Unset LIGHTNING_ZNORM_K"
            ):
                transform_segments_([Segment(grad, by_row)], ZScore())
        assert torch.equal(grad, torch.full((3, 4), 2.0, dtype=dtype))
        if right is not None:
            grad = grad.to(right[0])
            transform_segments_([Segment(grad, right[1])], ZScore())
            assert not grad.any()

    def test_refuses_before_gradients_of_another_device_are_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_programs, "_rewrite_part", broken_triton.bfloat16_without_a_shift)
        on_cpu, elsewhere = randn(50), randn(60).bfloat16()
        monkeypatch.setattr(dispatch, "is_on_cpu", lambda tensor: tensor.dtype == torch.float64)
        with pytest.raises(ZNormRuntimeError, match="its results are not PyTorch's"):
            transform_unsharded_([on_cpu, elsewhere], ZScore())
        assert torch.equal(on_cpu, randn(50))
        assert torch.equal(elsewhere, randn(60).bfloat16())

    def test_refuses_programs_that_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_programs, "_whole_tiles", None)
        grad = randn(50)
        with pytest.raises(
            ZNormRuntimeError, match=r"its kernel cannot run ZScore.* of torch.float64 gradients on cpu \("
        ):
            transform_segments_([Segment(grad)], ZScore())
        assert torch.equal(grad, randn(50))

    @pytest.mark.usefixtures("small_tiles")
    def test_compares_nothing_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grad = randn(50)
        with monkeypatch.context() as capturing:
            capture(capturing)
            with pytest.raises(ZNormRuntimeError, match="while a CUDA graph is captured: take a step before"):
                transform_segments_([Segment(grad)], ZScore())
        assert torch.equal(grad, randn(50))
        transformed(ZScore(), grad)
        capture(monkeypatch)
        transform_segments_([Segment(grad)], ZScore())
        torch.testing.assert_close(grad, zscore(randn(50)))

    def test_steps_of_a_trainer(self, left: list[Segment]) -> None:
        class Small(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))

            def training_step(self, batch: list[Tensor]) -> Tensor:
                return self.network(batch[0]).square().sum()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        torch.manual_seed(0)
        module, batch = Small(), randn(8, 5).float()
        double = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)).double()
        double.load_state_dict(module.network.state_dict())
        double(batch.double()).square().sum().backward()
        want = [parameter.detach() - 0.1 * zscore(parameter.grad) for parameter in double.parameters()]
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batch), batch_size=8)
        trainer(max_steps=1, callbacks=[ZNormCallback()]).fit(module, data)
        for got, parameter in zip(module.network.parameters(), want, strict=True):
            torch.testing.assert_close(got.detach().double(), parameter, rtol=0, atol=2e-6)
        assert not left
        assert check_kind.cache_info().currsize == 1
