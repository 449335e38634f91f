"""The kernel for devices, on tensors of a CPU: how gradients share its copies, and what one must not do to another."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_znorm.errors import ZNormRuntimeError
from lightning_znorm.gradients import SING, AffineMethod, Centralization, Statistics, ZScore
from lightning_znorm.gradients.kernels import caches, device, dispatch, transform_segments_
from lightning_znorm.gradients.methods import rows_share_std
from lightning_znorm.gradients.shards import Segment, unsharded_segments
from tests.gradients.reference import wide
from tests.gradients.test_methods import Counted, HalfCentered, RMSNorm, RowZScore
from tests.gradients.test_shards import check

METHODS = [ZScore(), ZScore(centering="adaptive"), Centralization(), SING(), RMSNorm(), RowZScore(), HalfCentered()]


@pytest.fixture(autouse=True, scope="module")
def on_a_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "is_on_cpu", lambda tensor: False)
        yield


def segments_of(grads: Sequence[Tensor], method: AffineMethod) -> list[Segment]:
    return unsharded_segments(grads, method)


def transformed(method: AffineMethod, *grads: Tensor, loss_scale: Tensor | None = None) -> list[Tensor]:
    copies = [torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype).copy_(grad) for grad in grads]
    transform_segments_(segments_of(copies, method), method, loss_scale)
    return copies


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


# Around the length of a part and the largest small gradient, and of any number of parts.
NUMELS = [2, 63, 64, 65, 127, 128, 129, 1000, device.SMALL_NUMEL - 1, device.SMALL_NUMEL, device.SMALL_NUMEL + 1]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_sizes_together(method: AffineMethod, dtype: torch.dtype) -> None:
    grads = [randn(numel, seed=numel).to(dtype) for numel in NUMELS]
    grads += [randn(4, numel // 4, seed=numel).to(dtype) for numel in NUMELS if numel >= 8]
    if dtype.is_complex:
        grads = [grad * 1j**index for index, grad in enumerate(grads)]
    for got, grad in zip(transformed(method, *grads), grads, strict=True):
        if rows_share_std(method) or method.over == "tensor" or grad.ndim > 1:
            check(got, grad, method)
        else:
            assert torch.equal(got, grad)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 90)), min_size=1, max_size=40),
    st.sampled_from(METHODS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.complex64]),
    st.integers(100, 2000),
)
@settings(deadline=None, max_examples=150)
def test_any_shapes_in_any_copies(
    shapes: list[tuple[int, int]], method: AffineMethod, dtype: torch.dtype, limit: int
) -> None:
    grads = [randn(*shape, seed=index).to(dtype) for index, shape in enumerate(shapes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "COPIED_NUMEL", limit)
        patch.setattr(device, "SMALL_NUMEL", 300)  # so that some are large
        for got, grad in zip(transformed(method, *grads), grads, strict=True):
            if segments_of([grad], method):
                check(got, grad, method)
            else:
                assert torch.equal(got, grad)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("method", [ZScore(), SING(), RowZScore(), Centralization()], ids=repr)
@pytest.mark.parametrize("place", range(4))
def test_inf_and_nan_stay_in_their_gradient(place: int, method: AffineMethod, bad: float) -> None:
    grads = [randn(5, 20, seed=seed) for seed in range(4)]
    grads[place][1, 3] = bad
    for index, got in enumerate(transformed(method, *grads)):
        if index == place:
            assert not got[1].isfinite().any()
        else:
            check(got, grads[index], method)


def test_small_gradients_are_in_one_table_with_the_large_ones_of_their_type() -> None:
    grads = [randn(numel) for numel in NUMELS]
    tables = device.tables_of(segments_of([*grads, *(grad.double() for grad in grads)], ZScore()))
    assert [len(table.segments) for table in tables] == [len(grads)] * 2


def test_copies_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "COPIED_NUMEL", 10_000)
    grads = [randn(numel, seed=numel) for numel in range(2, 300)]
    tables = device.tables_of(segments_of(grads, ZScore()))
    assert len(tables) > 5
    assert max(sum(segment.tensor.numel() for segment in table.segments) for table in tables) <= 10_000
    assert sum(len(table.segments) for table in tables) == len(grads)


def test_a_table_makes_its_copies_again() -> None:
    grads = [randn(10), randn(300), randn(20_000)]
    (table,) = device.tables_of([Segment(grad) for grad in grads])
    before = {id(grad): grad.clone() for grad in grads}
    stats = table.measure()
    table.forget_copies()
    table.rewrite_(stats.mean, None)
    for grad in grads:
        torch.testing.assert_close(grad, before[id(grad)] - before[id(grad)].mean())


def test_statistics_come_in_the_order_of_the_segments() -> None:
    grads = [randn(3, 4), randn(20_000), randn(7), randn(5, 4), randn(9), randn(3, 6000)]
    segments = [Segment(grad, by_row=grad.ndim > 1) for grad in grads]
    (table,) = device.tables_of(segments)
    stats = table.measure()
    means = [segment.tensor.mean(1) if segment.by_row else segment.tensor.mean().view(1) for segment in table.segments]
    m2 = [
        (segment.tensor - segment.tensor.mean(1, keepdim=True)).square().sum(1)
        if segment.by_row
        else (segment.tensor - segment.tensor.mean()).square().sum().view(1)
        for segment in table.segments
    ]
    counts = [[segment.tensor.numel() // segment.num_stats] * segment.num_stats for segment in table.segments]
    torch.testing.assert_close(stats.mean, torch.cat(means))
    torch.testing.assert_close(stats.m2, torch.cat(m2))
    assert stats.count.tolist() == [count for of_segment in counts for count in of_segment]


def test_lazily_conjugated_and_negated_gradients_in_place() -> None:
    base = torch.complex(randn(300, 100), randn(300, 100, seed=1))
    conjugated, negated = base.clone().conj(), base.clone().conj().imag
    assert conjugated.is_conj()
    assert negated.is_neg()
    for grad in (conjugated, negated, conjugated[:5], negated[:5]):
        grad = grad.resolve_conj().clone().conj() if grad.is_conj() else grad
        before = wide(grad.resolve_conj().resolve_neg())
        transform_segments_([Segment(grad)], ZScore())
        check(grad.resolve_conj().resolve_neg(), before.to(grad.dtype), ZScore())


class Turned(AffineMethod):
    """A complex scale, and a real shift."""

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        return stats.count, torch.full_like(stats.mean, 2j)


def test_complex_scale_and_real_shift() -> None:
    for numel in (5, 20_000):
        grad = torch.complex(randn(numel), randn(numel, seed=1))
        (got,) = transformed(Turned(), grad)
        torch.testing.assert_close(got, (grad - numel) * 2j)


class ByWholeNumbers(AffineMethod):
    """A shift of a type that has no negative numbers, and no scale."""

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        return torch.full_like(stats.mean, 3, dtype=torch.uint8), None


def test_shift_without_a_sign() -> None:
    for numel in (5, 20_000):
        (got,) = transformed(ByWholeNumbers(), randn(numel))
        assert torch.equal(got, randn(numel) - 3)


@pytest.mark.parametrize("over", ["tensor", "row"])
def test_copies_hold_what_they_may(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long ones are in other copies than the many short ones, whose table of parts would be as wide as they are."""
    monkeypatch.setattr(device, "COPIED_NUMEL", 200_000)
    grads = [randn(2, 8192, seed=seed) for seed in range(9)] + [
        torch.tensor([[0.0, 1.0]]) + seed / 3000 for seed in range(3000)
    ]
    method = ZScore() if over == "tensor" else RowZScore()
    tables = device.tables_of(segments_of(grads, method))
    assert sum(len(table.segments) for table in tables) == len(grads)
    for table in tables:
        numels = [segment.tensor.numel() for segment in table.segments]
        parts = [-(-numel // 64) for numel in numels]
        copies = 128 * sum(parts) + max(parts) * len(parts) if over == "tensor" else 1.5 * sum(numels)
        assert copies <= 200_000
    for got, grad in zip(transformed(method, *grads), grads, strict=True):
        check(got, grad, method)


def test_counts() -> None:
    grads = [randn(numel) for numel in NUMELS]
    for got, grad in zip(transformed(Counted(), *grads), grads, strict=True):
        torch.testing.assert_close(got, grad * grad.numel())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_loss_scale(method: AffineMethod) -> None:
    grads = [randn(numel // 2, 2, seed=numel).double() for numel in (10, 600, 40_000)]
    scale = torch.tensor(2.0**10)
    scaled = transformed(method, *(grad * scale for grad in grads), loss_scale=scale)
    for got, grad in zip(scaled, grads, strict=True):
        check(got / scale, grad, method)


def test_what_a_captured_graph_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_captured", kept := {})
    made: list[object] = []

    @caches.kept_on_device(maxsize=1)
    def table(number: int, device: torch.device) -> Tensor:
        made.append(number)
        return torch.tensor(number, device=device)

    device = torch.device("meta")
    first = table(1, device)
    assert table(1, device) is first
    assert not kept
    with monkeypatch.context() as capturing:
        capturing.setattr(caches, "is_capturing", lambda of: of == device)
        assert table(1, device) is first
        with pytest.raises(ZNormRuntimeError, match="take a step with them before"):
            table(3, device)
        assert table(2, torch.device("cpu")) == 2  # which the cache has room for, and nothing else
    assert list(kept.values()) == [first]
    assert made == [1, 2]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_all_tables_of_a_step_are_kept(method: AffineMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [randn(8, 30), randn(30), randn(300, 100)]
    transformed(method, *grads)
    monkeypatch.setattr(caches, "_captured", kept := {})
    monkeypatch.setattr(caches, "is_capturing", lambda device: True)
    monkeypatch.setattr(torch, "tensor", None)  # nothing may come from the host
    transformed(method, *grads)
    assert kept
