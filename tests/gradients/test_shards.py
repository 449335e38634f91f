"""Gradients cut into shards: what each process contributes, and that all together get the result of one process."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_znorm.gradients import SING, AffineMethod, Centralization, UnsupportedGradientError, ZScore
from lightning_znorm.gradients.kernels import transform_segments_, transform_shards_
from lightning_znorm.gradients.methods import Over, rows_share_std
from lightning_znorm.gradients.shards import BoxShard, FlatShard, Shard, as_shard, unsharded_segments
from tests.gradients.reference import centralized, rms_normalized, sing, wide, zscore
from tests.gradients.simulated import Group, on_ranks
from tests.gradients.test_methods import Counted, HalfCentered, RMSNorm, RowZScore
from tests.gradients.test_zscore import TOLERANCE

pytestmark = pytest.mark.usefixtures("each_kernel")

METHODS = [
    ZScore(),
    ZScore(eps=0.1),
    ZScore(centering="adaptive"),
    ZScore(0.1, "adaptive"),
    Centralization(),
    RowZScore(),
    RMSNorm(),
    HalfCentered(),
    SING(),
    SING(eps=0.1),
]

shapes = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(torch.Size)


@st.composite
def cut(draw: st.DrawFn, length: int, parts: int) -> list[tuple[int, int]]:
    """Intervals, possibly empty, that make up a whole."""
    points = sorted(draw(st.lists(st.integers(0, length), min_size=parts - 1, max_size=parts - 1)))
    return list(pairwise([0, *points, length]))


def flat_shard(
    local: Tensor | None, whole: Tensor, offset: int, group: object = None, in_rows: bool = True
) -> FlatShard:
    return FlatShard(
        local=local,
        shape=whole.shape,
        device=whole.device,
        is_complex=whole.is_complex(),
        offset=offset,
        group=group,  # type: ignore[arg-type]
        in_rows=in_rows,
    )


def box_shard(local: Tensor | None, box: Tensor, whole: Tensor, cuts: dict[Group, int]) -> BoxShard:
    return BoxShard(
        local=local,
        shape=whole.shape,
        device=whole.device,
        is_complex=whole.is_complex(),
        rows=len(box),
        cuts=cuts,  # type: ignore[arg-type]
    )


def contributions(shard: Shard, over: Over, start: int) -> list[tuple[int, int]]:
    """Return each element's value, and the index of the statistics that it contributes to, in order."""
    pairs = []
    for segment in shard.segments(over, start):
        assert segment.tensor.numel() > 0
        assert shard.local is not None
        assert segment.tensor.untyped_storage().data_ptr() == shard.local.untyped_storage().data_ptr()
        for row, values in enumerate(segment.tensor if segment.by_row else [segment.tensor]):
            pairs += [(int(value), segment.start + row) for value in values.reshape(-1)]
        assert segment.num_stats == (len(segment.tensor) if segment.by_row else 1)
    return pairs


# What is in one process: the segments.


@given(st.data(), shapes, st.integers(0, 9))
@settings(deadline=None)
def test_flat_segments_cover_their_interval_and_name_its_statistics(
    data: st.DataObject, shape: torch.Size, start: int
) -> None:
    whole = torch.arange(shape.numel()).view(shape)
    length = shape[1:].numel() if shape else 1
    for begin, end in data.draw(cut(shape.numel(), data.draw(st.integers(1, 5)))):
        shard = flat_shard(whole.reshape(-1)[begin:end].clone(), whole, begin)
        one_element = shape.numel() == 1
        assert contributions(shard, "tensor", start) == ([] if one_element else [(i, start) for i in range(begin, end)])
        expected = [] if length == 1 else [(i, start + i // length) for i in range(begin, end)]
        assert contributions(shard, "row", start) == expected


@given(st.data(), shapes.filter(lambda shape: len(shape) > 0), st.integers(0, 9))
@settings(deadline=None)
def test_box_segments_cover_their_box_and_name_its_statistics(
    data: st.DataObject, shape: torch.Size, start: int
) -> None:
    whole = torch.arange(shape.numel()).view(shape)
    box = whole[tuple(slice(*data.draw(st.sampled_from(data.draw(cut(size, 3))))) for size in shape)]
    shard = box_shard(box, box, whole, {})
    values = box.reshape(-1).tolist()
    assert contributions(shard, "tensor", start) == ([] if shape.numel() == 1 else [(i, start) for i in values])
    length = shape[1:].numel()
    first = values[0] // length if values else 0
    # A rank numbers the rows that it has: all ranks that share them number them alike.
    expected = [] if length == 1 else [(i, start + i // length - first) for i in values]
    assert contributions(shard, "row", start) == expected


def test_nothing_local_is_no_segment() -> None:
    whole = torch.zeros(3, 4)
    for over in ("tensor", "row"):
        assert flat_shard(None, whole, 5).segments(over) == []
        assert flat_shard(torch.zeros(0), whole, 5).segments(over) == []
        assert box_shard(None, whole, whole, {}).segments(over) == []
        assert box_shard(whole[:0], whole[:0], whole, {}).segments(over) == []


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_single_elements_are_no_reason_to_communicate(shape: tuple[int, ...]) -> None:
    assert flat_shard(torch.zeros(1), torch.zeros(shape), 0, Group([0, 1])).reduce_groups("tensor") == ()
    for rows in (1, 5):
        assert flat_shard(None, torch.zeros(rows, *shape), 0, Group([0, 1])).reduce_groups("row") == ()


def test_rows_that_are_whole_are_no_reason_to_communicate() -> None:
    first, second = Group([0, 1]), Group([0, 2])
    shard = box_shard(None, torch.zeros(2, 6), torch.zeros(4, 6), {first: 0, second: 1})
    assert shard.reduce_groups("tensor") == (first, second)
    assert shard.reduce_groups("row") == (second,)


def test_rows_that_are_mixed_are_refused() -> None:
    whole = torch.zeros(3, 4)
    shard = flat_shard(torch.zeros(12), whole, 0, Group([0]), in_rows=False)
    assert shard.reduce_groups("tensor") != ()
    with pytest.raises(UnsupportedGradientError, match=r"shape \(3, 4\) .*make it contiguous"):
        shard.reduce_groups("row")


# What several processes compute together.


def one_process(grads: Sequence[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> list[Tensor]:
    copies = [grad.clone() for grad in grads]
    present = [grad for grad in copies if grad.numel() > 0]
    if rows_share_std(method):
        transform_shards_(map(as_shard, present), method, loss_scale)
    else:
        transform_segments_(unsharded_segments(present, method), method, loss_scale)
    return copies


def reference(grad: Tensor, method: AffineMethod) -> Tensor:
    """The result in float64, by definition where a method has one: one process rounds too."""
    if isinstance(method, SING):
        return wide(grad) if grad.numel() == 1 else sing(grad, method.eps)
    if isinstance(method, ZScore):
        return wide(grad) if grad.numel() == 1 else zscore(grad, method.eps, method.centering)
    if isinstance(method, Centralization):
        return wide(grad) if grad.ndim < 2 or grad[0].numel() < 2 else centralized(grad)
    if isinstance(method, RMSNorm):
        return wide(grad) if grad.numel() == 1 else rms_normalized(grad)
    return one_process([wide(grad)], method)[0]


class Flat:
    """Gradients that are cut into intervals, one for each rank."""

    def __init__(self, grads: Sequence[Tensor], cuts: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.size = len(cuts[0])
        self.group = Group(range(self.size))
        self.grads, self.cuts = grads, cuts

    def transformed(
        self, method: AffineMethod, loss_scale: Tensor | None = None, empty_as_none: bool = True
    ) -> list[Tensor]:
        """Return the gradients, put together from what all ranks make of their parts."""

        def on_rank(rank: int) -> list[Tensor]:
            parts = [
                grad.reshape(-1)[slice(*intervals[rank])].clone()
                for grad, intervals in zip(self.grads, self.cuts, strict=True)
            ]
            shards = [
                flat_shard(None if empty_as_none and len(part) == 0 else part, grad, intervals[rank][0], self.group)
                for part, grad, intervals in zip(parts, self.grads, self.cuts, strict=True)
            ]
            transform_shards_(shards, method, loss_scale)
            return parts

        ranks = on_ranks(self.size, [self.group], on_rank)
        return [
            torch.cat(parts).view(grad.shape) for parts, grad in zip(zip(*ranks, strict=True), self.grads, strict=True)
        ]


def evenly(grads: Sequence[Tensor], ranks: int) -> Flat:
    """Cut into equal intervals, which begin and end in mid-row."""
    lengths = [math.ceil(grad.numel() / ranks) for grad in grads]
    return Flat(
        grads,
        [
            [(min(rank * length, grad.numel()), min((rank + 1) * length, grad.numel())) for rank in range(ranks)]
            for grad, length in zip(grads, lengths, strict=True)
        ],
    )


DTYPES = list(TOLERANCE)


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grad = torch.randn(draw(shapes), generator=generator, dtype=torch.complex128) * draw(st.sampled_from([1e-3, 1, 30]))
    grad += draw(st.sampled_from([0, 0.5, -3])) * grad.abs().mean()
    dtype = draw(st.sampled_from(DTYPES))
    return (grad if dtype.is_complex else grad.real).to(dtype)


def check(got: Tensor, grad: Tensor, method: AffineMethod) -> None:
    """Compares with the definition, in units of rounding of the largest number there is."""
    expected = reference(grad, method)
    of = expected if isinstance(method, (ZScore, RowZScore, RMSNorm, SING)) else grad
    size = of.abs().max().item()
    tolerance = 4 * TOLERANCE[grad.dtype] * max(size, 1e-3)
    torch.testing.assert_close(wide(got), expected, rtol=0, atol=tolerance)


@given(st.data(), st.lists(gradients(), min_size=1, max_size=5), st.sampled_from(METHODS), st.integers(1, 4))
@settings(deadline=None, max_examples=300)
def test_intervals_become_what_the_whole_becomes(
    data: st.DataObject, grads: list[Tensor], method: AffineMethod, ranks: int
) -> None:
    shards = Flat(grads, [data.draw(cut(grad.numel(), ranks)) for grad in grads])
    for got, grad in zip(shards.transformed(method, empty_as_none=data.draw(st.booleans())), grads, strict=True):
        assert got.dtype == grad.dtype
        # Deviations of single precision that differ by less than its rounding may count as none, or as some.
        if grad.numel() > 0 and _deviates(grad, method):
            check(got, grad, method)


def _deviates(grad: Tensor, method: AffineMethod) -> bool:
    """Whether rows and tensor vary by more than rounding, so that a quotient of deviations has a meaning."""
    if not isinstance(method, (RowZScore, SING)) or grad.numel() == 1:
        return True
    rows = wide(grad).reshape(len(grad), -1) if method.over == "row" and grad.ndim > 1 else wide(grad).reshape(1, -1)
    if rows.shape[1] == 1:
        return True
    deviation = (rows - rows.mean(1, keepdim=True)).abs().square().mean(1).sqrt()
    return bool((deviation > 0.05 * rows.abs().amax(1)).all())


@given(st.data(), gradients().filter(lambda grad: grad.ndim > 0), st.sampled_from(METHODS))
@settings(deadline=None, max_examples=200)
def test_boxes_become_what_the_whole_becomes(data: st.DataObject, grad: Tensor, method: AffineMethod) -> None:
    # On a mesh of 2 x 2: each dimension of the mesh cuts one of the tensor, both may cut the same, or none.
    dims = [data.draw(st.sampled_from([None, *range(grad.ndim)])) for _ in range(2)]
    lines = [[Group([0, 1]), Group([2, 3])], [Group([0, 2]), Group([1, 3])]]
    intervals = {dim: data.draw(cut(grad.shape[dim], 2)) for dim in set(dims) - {None}}
    halves = {}
    if dims[0] == dims[1] and dims[0] is not None:  # the second cut is within the first
        for part, (begin, end) in enumerate(intervals[dims[0]]):
            middle = data.draw(st.integers(begin, end))
            halves[part] = [(begin, middle), (middle, end)]

    def box(tensor: Tensor, rank: int) -> Tensor:
        second, first = divmod(rank, 2)  # coordinates on the mesh
        if halves:
            return tensor.narrow(dims[0], halves[first][second][0], -int.__sub__(*halves[first][second]))
        for dim, coordinate in zip(dims, (first, second), strict=True):
            if dim is not None:
                begin, end = intervals[dim][coordinate]
                tensor = tensor.narrow(dim, begin, end - begin)
        return tensor

    def on_rank(rank: int) -> Tensor:
        local = box(grad, rank).clone()
        second, first = divmod(rank, 2)
        groups = [lines[0][second], lines[1][first]]
        cuts = {group: dim for group, dim in zip(groups, dims, strict=True) if dim is not None}
        transform_shards_([box_shard(local, local, grad, cuts)], method)
        return local

    result = torch.full_like(grad, torch.nan)
    for rank, local in enumerate(on_ranks(4, [*lines[0], *lines[1]], on_rank)):
        box(result, rank).copy_(local)
    if grad.numel() > 0 and _deviates(grad, method):
        check(result, grad, method)


GRADS = [
    torch.randn(shape, generator=torch.Generator().manual_seed(6)) + 0.3
    for shape in [(40, 30), (40, 30), (7,), (1,), (3, 1), (200, 150), (1100, 1000), (2, 3, 5, 7)]
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_no_less_exact_than_one_process(method: AffineMethod, dtype: torch.dtype) -> None:
    grads = [grad.to(dtype) for grad in GRADS]
    for got, alone, grad in zip(evenly(grads, 3).transformed(method), one_process(grads, method), grads, strict=True):
        expected = reference(grad, method)
        ours, theirs = ((wide(result) - expected).abs().max().item() for result in (got, alone))
        units = 5 if dtype == torch.float64 else 1  # the reference rounds too, and a device's kernel once more
        if getattr(method, "centering", "full") == "adaptive":
            units *= 2  # its scale takes more roundings, and one process may be lucky
        assert ours <= 2 * theirs + units * torch.finfo(dtype).eps * expected.abs().max().item()


def test_counts_are_those_of_the_whole() -> None:
    for got, grad in zip(evenly(GRADS, 3).transformed(Counted()), GRADS, strict=True):
        torch.testing.assert_close(wide(got), wide(grad) * grad.numel(), rtol=2e-5, atol=0.5)


@pytest.mark.parametrize("method", [ZScore(), Centralization(), RowZScore(), SING()], ids=repr)
def test_large_mean(method: AffineMethod, each_kernel: str) -> None:
    grad = torch.randn(30, 4001, generator=torch.Generator().manual_seed(7)) + 1e6
    (got,), (alone,) = evenly([grad], 4).transformed(method), one_process([grad], method)
    expected = reference(grad, method)
    ours, theirs = ((wide(result) - expected).abs().max().item() for result in (got, alone))
    # The mean is rounded to 1/16, and float32 has no better. On a device, the mean of each part is rounded too.
    assert ours <= max(theirs, 1 / 16 if each_kernel == "cpu" else 1 / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_outlier_costs_its_neighbours_nothing(dtype: torch.dtype) -> None:
    # The mean of the two elements of the first rank is far from that of all: to subtract it would cost digits.
    grad = torch.randn(100_000, generator=torch.Generator().manual_seed(8)) * 0.1
    grad[0] = 3000.0
    grad = grad.to(dtype)
    (got,) = Flat([grad], [[(0, 2), (2, len(grad))]]).transformed(ZScore())
    expected, eps = zscore(grad), torch.finfo(dtype).eps
    # float32 statistics are exact to a few units; what is stored is rounded once.
    torch.testing.assert_close(wide(got), expected, rtol=eps + 1e-6, atol=2e-7)


def test_half_precision_may_use_all_its_range() -> None:
    # The difference of two such numbers is infinite in float16.
    grad = torch.tensor([6e4, 5e4, 6e4, -6e4, 5e4, -5e4, 6e4, 6e4], dtype=torch.float16)
    (got,) = evenly([grad], 2).transformed(ZScore())
    torch.testing.assert_close(wide(got), zscore(grad), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [1000.3, -0.1, 1e-7, 3.14e4, 0.0])
@pytest.mark.parametrize("shape", [(10,), (3, 333), (1000, 1001)], ids=str)
def test_constant_becomes_zero(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> None:
    grad = torch.full(shape, value, dtype=dtype)
    points = [0, 1, grad.numel() // 3 + 1, grad.numel()]
    (got,) = Flat([grad], [list(pairwise(points))]).transformed(ZScore())
    assert torch.equal(got, torch.zeros_like(grad))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("method", [ZScore(), RMSNorm(), SING()], ids=repr)
def test_inf_or_nan_in_one_shard_is_one_in_all(bad: float, method: AffineMethod) -> None:
    grads = [torch.randn(shape) for shape in [(9, 5), (300, 100), (9, 5)]]
    grads[0][1, 1] = grads[1][250, 3] = bad
    first, second, third = evenly(grads, 3).transformed(method)
    assert first.isnan().all()
    assert second.isnan().all()
    check(third, grads[2], method)  # another gradient is none of its business


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("method", [Centralization(), HalfCentered(), RowZScore()], ids=repr)
def test_inf_or_nan_spreads_as_in_one_process(bad: float, method: AffineMethod) -> None:
    grads = [torch.randn(9, 5, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    grads[0][3, 1] = bad
    for got, alone in zip(evenly(grads, 4).transformed(method), one_process(grads, method), strict=True):
        assert torch.equal(got.isfinite(), alone.isfinite())
        finite = alone.isfinite()
        torch.testing.assert_close(got[finite], alone[finite])


def test_squares_that_overflow_are_no_zero() -> None:
    (got,) = evenly([torch.randn(40) * 1e30], 2).transformed(ZScore())
    assert got.isnan().all()


@pytest.mark.parametrize(
    "method", [ZScore(), ZScore(eps=0.5), RowZScore(), RMSNorm(), HalfCentered(), SING(0.5)], ids=repr
)
@pytest.mark.parametrize("scale", [4096.0, 2.0**66])
def test_loss_scale_passes_through(method: AffineMethod, scale: float) -> None:
    grads = [grad * (1e-9 if scale > 2.0**60 else 1.0) for grad in GRADS]
    plain = evenly(grads, 3).transformed(method)
    scaled = evenly([grad * scale for grad in grads], 3).transformed(method, torch.tensor(scale))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other / scale, one, rtol=0, atol=1e-6)


def test_kinds_together_with_what_is_whole_here() -> None:
    # Shards that need no other rank, of the same call, go their own way.
    grads = [
        torch.randn(6, 4),
        torch.randn(6, 4).double(),
        torch.randn(6, 4).bfloat16(),
        torch.randn(5, 2).to(torch.cfloat),
    ]
    group = Group([0, 1])

    def on_rank(rank: int) -> list[Tensor]:
        own = [grad.chunk(2)[rank].clone() if len(grad.chunk(2)) > rank else grad[:0] for grad in grads]
        alone = torch.randn(3, 3, generator=torch.Generator().manual_seed(rank))
        shards: list[Shard] = [box_shard(part, part, grad, {group: 0}) for part, grad in zip(own, grads, strict=True)]
        shards.insert(1, flat_shard(alone.view(-1), alone, 0))
        before = alone.clone()
        transform_shards_(shards, ZScore())
        check(alone, before, ZScore())
        return own

    for parts, grad in zip(zip(*on_ranks(2, [group], on_rank), strict=True), grads, strict=True):
        check(torch.cat(parts), grad, ZScore())


@pytest.mark.parametrize("count", [1, 44, 440])
@pytest.mark.parametrize(
    ("method", "collectives"), [(ZScore(), 2), (Centralization(), 1), (RowZScore(), 2), (SING(), 2)], ids=repr
)
def test_collectives_do_not_grow_with_the_number_of_gradients(
    method: AffineMethod, collectives: int, count: int
) -> None:
    shards = evenly([torch.randn(5, 3 + index % 4) for index in range(count)], 2)
    shards.transformed(method)
    assert shards.group.calls == collectives


def test_method_that_reads_a_deviation_that_it_does_not_need() -> None:
    class Greedy(HalfCentered):
        def affine(self, stats):  # type: ignore[no-untyped-def]
            return stats.mean, stats.std

    with pytest.raises(RuntimeError, match="needs_std = True"):
        evenly([torch.randn(5)], 2).transformed(Greedy())


def test_deviations_that_rows_share_take_two_collectives_of_a_group_that_cuts_rows_and_columns() -> None:
    # As tensor parallelism does, and FSDP around it.
    first, second = ([Group([0, 1]), Group([2, 3])], [Group([0, 2]), Group([1, 3])])
    grads = [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).double() for seed in range(4)]
    cuts = [(0, 1), (1, 0), (0, 0), (1, 1)]  # the dimensions that the first and the second group of a rank cut

    def on_rank(rank: int) -> list[Tensor]:
        two, one = divmod(rank, 2)
        parts = [
            grad.chunk(2, dim)[one].chunk(2, other)[two].clone() for grad, (dim, other) in zip(grads, cuts, strict=True)
        ]
        groups = (first[two], second[one])
        transform_shards_(
            [
                box_shard(part, part, grad, dict(zip(groups, own, strict=True)))
                for part, grad, own in zip(parts, grads, cuts, strict=True)
            ],
            SING(),
        )
        return parts

    ranks = on_ranks(4, [*first, *second], on_rank)
    for number, (grad, (dim, other)) in enumerate(zip(grads, cuts, strict=True)):
        halves = [torch.cat([ranks[one][number], ranks[2 + one][number]], other) for one in range(2)]
        torch.testing.assert_close(torch.cat(halves, dim), sing(grad))
    assert [group.calls for group in [*first, *second]] == [2] * 4
