"""What is measured of gradients is what float64 says of them, and they stay as they are."""

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_znorm.functional import centralize_grads_, transform_grads_, zscore_grads_
from lightning_znorm.gradients import SING, NonFiniteGradientError, Statistics, apply
from lightning_znorm.gradients.apply import GradientSummary, check_finite, measure_slots
from lightning_znorm.gradients.kernels import measure_shards
from lightning_znorm.gradients.slots import UnnamedSlots
from tests.dtypes import default_is_never_read
from tests.gradients.reference import wide
from tests.gradients.simulated import Group, on_ranks
from tests.gradients.test_shards import box_shard, cut, flat_shard, gradients

pytestmark = pytest.mark.usefixtures("each_kernel")

# Stacked, flat, of several blocks, single, empty.
SHAPES = [(7,), (7,), (16, 8, 3, 3), (200, 150), (1100, 1000), (), (1,), (3, 1), (0, 3)]


def parameters(dtype: torch.dtype = torch.float32, shift: float = 0.3) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for shape in SHAPES:
        param = nn.Parameter(torch.zeros(shape, dtype=dtype))
        param.grad = (torch.randn(shape, generator=generator, dtype=torch.float64) + shift).to(dtype)
        made.append(param)
    made[2].grad = made[2].grad.contiguous(memory_format=torch.channels_last)
    return made


def measured(params: list[nn.Parameter], loss_scale: Tensor | None = None) -> Statistics:
    slots, stats = measure_slots(UnnamedSlots(params), loss_scale)
    assert [int(slot.names[0].removeprefix("parameter ")) for slot in slots] == [
        i for i, p in enumerate(params) if p.grad is not None and p.grad.numel() > 0
    ]
    return stats


MEAN_UNITS = 32  # of rounding: up to 26 by PyTorch's var_mean of a million elements in float64 on a CPU, and else 16


def check(stats: Statistics, grads: list[Tensor]) -> None:
    assert len(stats.count) == len(grads)
    for i, grad in enumerate(grads):
        true = wide(grad)
        unit = 2.0**-52 if grad.dtype == torch.float64 else 2.0**-23
        size = float(true.abs().square().mean().sqrt())
        assert stats.count[i] == grad.numel()
        assert abs(complex(stats.mean[i]) - complex(true.mean())) <= MEAN_UNITS * unit * size
        std = float((true - true.mean()).abs().square().mean().sqrt())
        # A dot product of complex numbers is summed with less care.
        assert abs(float(stats.std[i]) - std) <= (512 if grad.is_complex() else 64) * unit * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.cfloat], ids=str)
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_whole_gradients(dtype: torch.dtype, scale: float | None) -> None:
    params = parameters(dtype)
    before = [param.grad.clone() for param in params]
    stats = measured(params, None if scale is None else torch.tensor(scale))
    grads = [grad for grad in before if grad.numel() > 0]
    if scale is not None:
        stats = Statistics(stats.count, stats.mean * scale, stats.m2 * scale**2)
    check(stats, grads)
    for param, grad in zip(params, before, strict=True):
        assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.cfloat], ids=str)
def test_torchs_default_type_is_never_read(dtype: torch.dtype) -> None:
    params, scale = parameters(dtype), torch.tensor(8.0)
    params[1].grad = None
    with default_is_never_read():
        GradientSummary(measured(params, scale))
        assert len(measured([params[1]]).count) == 0
        check_finite(UnnamedSlots(params))
        for transform in (zscore_grads_, centralize_grads_, lambda own: transform_grads_(own, SING())):
            transform(params)
    params[2].grad[0, 0, 0, 0] = math.inf
    with default_is_never_read(), pytest.raises(NonFiniteGradientError, match="parameter 2 "):
        check_finite(UnnamedSlots(params))


def test_torchs_default_device_is_never_used() -> None:
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(7,), (19,), (210, 151), (12, 1001)]]  # of new sizes
    for param in params:
        param.grad = torch.randn(param.shape)
    grads = [param.grad.clone() for param in params]
    with torch.device("meta"):
        stats = measured(params)
        check_finite(UnnamedSlots(params))
        for transform in (zscore_grads_, centralize_grads_, lambda own: transform_grads_(own, SING())):
            transform(params)
        params[1].grad[0] = math.inf
        with pytest.raises(NonFiniteGradientError, match="parameter 1 "):
            check_finite(UnnamedSlots(params))
    check(stats, grads)


def test_large_mean_costs_no_digits() -> None:
    param = nn.Parameter(torch.zeros(4001))
    param.grad = torch.randn(4001, generator=torch.Generator().manual_seed(3)) + 1e4
    true = wide(param.grad).std(correction=0)
    assert abs(float(measured([param]).std) - float(true)) <= 1e-3 * float(true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_constant_has_no_deviation(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(999, dtype=dtype))
    param.grad = torch.full((999,), 1000.3, dtype=dtype)
    assert measured([param]).std.item() == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_its_tensor_alone(bad: float) -> None:
    params = parameters()
    for number in (2, 6):  # of many elements, and of one
        params[number].grad[(0,) * params[number].ndim] = bad
    finite = GradientSummary(measured(params)).is_finite
    assert finite.tolist() == [i not in (2, 6) for i in range(8)]


def test_deviation_that_overflows_counts_as_not_finite() -> None:
    param = nn.Parameter(torch.zeros(40))
    param.grad = torch.randn(40) * 1e30
    assert not GradientSummary(measured([param])).is_finite


def test_nothing_to_measure() -> None:
    assert len(measured([nn.Parameter(torch.zeros(3))]).count) == 0


class Waiting(TorchDispatchMode):
    """Counts what brings a number to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_one_copy_to_the_host() -> None:
    params = parameters()
    with patch.object(apply, "_to_host", wraps=apply._to_host) as copies, Waiting() as waiting:
        measured(params, torch.tensor(8.0))
    assert copies.call_count == 1
    assert waiting.count == 0


@pytest.mark.gpu
def test_one_copy_from_a_device() -> None:
    params = [nn.Parameter(torch.zeros_like(param, device="cuda")) for param in parameters()]
    for param in params:
        param.grad = torch.randn_like(param)
    scale = torch.tensor(8.0, device="cuda")
    measured(params, scale)  # the sizes go to the device once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # The one that waits is let through.
        def copied(tensor: Tensor) -> Tensor:
            torch.cuda.set_sync_debug_mode("default")
            return tensor.cpu()

        with patch.object(apply, "_to_host", copied):
            stats = measured(params, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stats = Statistics(stats.count, stats.mean * 8, stats.m2 * 64)
    check(stats, [param.grad.cpu() for param in params if param.numel() > 0])


@given(st.data(), st.lists(gradients().filter(lambda grad: grad.numel() > 0), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_shards_are_measured_as_the_whole(data: st.DataObject, grads: list[Tensor]) -> None:
    group = Group([0, 1, 2])
    cuts = [data.draw(cut(grad.numel(), 3)) for grad in grads]
    parts = [
        [grad.reshape(-1)[slice(*own[rank])].clone() for grad, own in zip(grads, cuts, strict=True)]
        for rank in range(3)
    ]

    def on_rank(rank: int) -> Statistics:
        shards = [
            flat_shard(part if len(part) else None, grad, own[rank][0], group)
            for part, grad, own in zip(parts[rank], grads, cuts, strict=True)
        ]
        order, mean, m2 = measure_shards(shards)
        assert order == shards
        return Statistics(torch.tensor([float(grad.numel()) for grad in grads]), mean, m2)

    before = [[part.clone() for part in own] for own in parts]
    for stats in on_ranks(3, [group], on_rank):
        for i, grad in enumerate(grads):
            true = wide(grad)
            std = float((true - true.mean()).abs().square().mean().sqrt())
            unit = 2.0**-52 if grad.dtype in (torch.float64, torch.complex128) else 2.0**-23
            size = float(true.abs().square().mean().sqrt())
            assert abs(complex(stats.mean[i]) - complex(true.mean())) <= MEAN_UNITS * unit * size
            assert abs(math.sqrt(float(stats.m2[i]) / grad.numel()) - std) <= 64 * unit * size
    assert group.calls == 2
    assert all(torch.equal(p, b) for own, old in zip(parts, before, strict=True) for p, b in zip(own, old, strict=True))


def test_boxes_on_two_groups_are_measured_as_the_whole() -> None:
    grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(4)).double() + 1
    rows, columns = [Group([0, 1]), Group([2, 3])], [Group([0, 2]), Group([1, 3])]

    def on_rank(rank: int) -> tuple[Tensor, Tensor]:
        second, first = divmod(rank, 2)
        box = grad.chunk(2, 0)[first].chunk(2, 1)[second].clone()
        _, mean, m2 = measure_shards([box_shard(box, box, grad, {rows[second]: 0, columns[first]: 1})])
        return mean, m2

    for mean, m2 in on_ranks(4, [*rows, *columns], on_rank):
        torch.testing.assert_close(mean, grad.mean().view(1))
        torch.testing.assert_close(m2, (grad - grad.mean()).square().sum().view(1))


@pytest.mark.parametrize("eps", [1e-10, 0.5])
def test_formulas_are_those_of_the_z_score(eps: float) -> None:
    params = parameters(torch.float64, shift=2.0)
    params[0].grad = torch.full_like(params[0].grad, 0.3)
    summary = GradientSummary(measured(params), eps)
    before = [param.grad.clone().flatten() for param in params if param.grad.numel() > 0]
    zscore_grads_(params, eps)
    after = [param.grad.flatten() for param in params if param.grad.numel() > 0]
    for i, (g, z) in enumerate(zip(before, after, strict=True)):
        assert float(summary.norm[i]) == pytest.approx(float(g.norm()))
        assert float(summary.znorm_norm[i]) == pytest.approx(float(z.norm()))
        if float(z.norm()) > 0:
            assert float(summary.cosine[i]) == pytest.approx(float(g @ z / g.norm() / z.norm()))
        else:
            assert summary.cosine[i] == 0


@pytest.mark.parametrize("scale", [1e-18, 1e-25, 1e-39])
def test_share_of_the_mean_is_right_or_unknown(scale: float) -> None:
    """Squares of single precision underflow below 1e-22, where a gradient would look constant."""
    generator = torch.Generator().manual_seed(0)
    grads = [(torch.randn(600, generator=generator) + mean) * scale for mean in (0.0, 1.0)]
    grads += [torch.full((600,), scale), torch.tensor([scale])]
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    shares = GradientSummary(measured(params)).mean_share
    if scale < 1e-20:
        assert shares.isnan().all()
    else:
        expected = [float(wide(grad).mean().square() / wide(grad).square().mean()) for grad in grads[:3]]
        assert shares[:3].tolist() == pytest.approx(expected, rel=1e-4)
    assert shares[3].isnan()  # a single element stays as it is
