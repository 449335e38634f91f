"""Gradients that share memory: each is normalized once, or refused by name before any is changed."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lightning_znorm.functional import attach, transform_grads_, zscore_grads_
from lightning_znorm.gradients import (
    SING,
    AffineMethod,
    Centralization,
    UnsupportedGradientError,
    ZScore,
    transform_slots_,
)
from lightning_znorm.gradients.apply import measure_slots
from lightning_znorm.gradients.kernels import dispatch
from lightning_znorm.gradients.shards import BoxShard, FlatShard, Shard
from lightning_znorm.gradients.shared_memory import has_internal_overlap, may_share_memory
from lightning_znorm.gradients.slots import GradientSlot, ParameterSlot, UnnamedSlots
from tests.gradients.reference import centralized, sing, wide, zscore
from tests.gradients.simulated import Group, on_ranks

EPS = 0.3  # with which a second normalization changes the result of the first

BUFFER = torch.tensor([1.0, 2, 3, 10, -4, 0.5, 7, 8, -9, 11, 0, 2.5])

METHODS = {
    "zscore": (ZScore(EPS), lambda grad: zscore(grad, EPS)),
    "centralization": (Centralization(), centralized),
    "sing": (SING(EPS), lambda grad: sing(grad, EPS)),
    "function": (torch.square, lambda grad: wide(grad).square()),
}


def params_of(*grads: Tensor) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


# Pairs of views of one buffer that have elements in common, and are not the same.
OVERLAPPING: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "partly": lambda flat: (flat[:7], flat[6:]),
    "another shape": lambda flat: (flat, flat.view(3, 4)),
    "transposed": lambda flat: (flat[:9].view(3, 3), flat[:9].view(3, 3).t()),
    "within": lambda flat: (flat.view(3, 4)[:, 1], flat.view(3, 4)[:2]),
    "detached": lambda flat: (flat[2:8].detach(), flat.data[:3]),
    "interleaved": lambda flat: (flat[::3], flat[1::2]),
    "another type": lambda flat: (flat[:4], flat.view(torch.float64)[1:3]),
    "apart in the list": lambda flat: (flat.view(3, 4)[0], flat.view(3, 4)[0, 3:].view(1)),
}

# Views of one buffer that have no element in common.
DISJOINT: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "bucket": lambda flat: [flat[:5], flat[5:9].view(2, 2), flat[9:]],
    "columns": lambda flat: list(flat.view(3, 4).unbind(1)),
    "blocks of columns": lambda flat: [flat.view(3, 4)[:, :2], flat.view(3, 4)[:, 2:]],
    "interleaved": lambda flat: [flat[::2], flat[1::2]],
    "interleaved in rows": lambda flat: [flat.view(2, 2, 3)[:, 0], flat.view(2, 2, 3)[:, 1]],
    "channels last": lambda flat: [flat[:8].as_strided((2, 2, 1, 2), (4, 1, 4, 2)), flat[8:]],
    "empty": lambda flat: [flat[3:3], flat[:6], flat[6:], flat[12:]],
    "dtypes": lambda flat: [flat[:4], flat.view(torch.float64)[2:]],
}


@pytest.mark.parametrize("case", OVERLAPPING)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("swapped", [False, True])
def test_overlapping_gradients_are_refused_by_name(case: str, method: str, swapped: bool) -> None:
    flat = BUFFER.clone()
    first, second = OVERLAPPING[case](flat)
    if swapped:
        first, second = second, first
    params = params_of(first, torch.ones(2), second)
    with pytest.raises(UnsupportedGradientError, match=r"gradients of parameter 0 and parameter 2 overlap in memory"):
        transform_grads_(params, METHODS[method][0])
    assert torch.equal(flat, BUFFER)


@pytest.mark.parametrize("case", DISJOINT)
@pytest.mark.parametrize("method", METHODS)
def test_views_of_one_buffer_without_common_elements(case: str, method: str) -> None:
    flat = BUFFER.clone()
    grads = DISJOINT[case](flat)
    before = [wide(grad) for grad in grads]
    given, reference = METHODS[method]
    transform_grads_(params_of(*grads), given)
    for grad, old in zip(grads, before, strict=True):
        if grad.numel():
            # Vectors have no rows to centralize.
            expected = old if method == "centralization" and old.ndim == 1 else reference(old)
            torch.testing.assert_close(wide(grad), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "again",
    [lambda grad: grad, lambda grad: grad.view(3, 4), lambda grad: grad.data, lambda grad: grad.t().t()],
    ids=["itself", "view", "data", "transposed twice"],
)
@pytest.mark.parametrize("loss_scale", [None, 4.0])
def test_the_same_memory_is_transformed_once(
    method: str, again: Callable[[Tensor], Tensor], loss_scale: float | None
) -> None:
    grad = BUFFER.clone().view(3, 4)
    params = params_of(grad, again(grad), again(grad))
    given, reference = METHODS[method]
    expected = reference(grad)
    scale = None
    if loss_scale is not None:
        scale = torch.tensor(loss_scale)
        grad *= scale
        expected = expected * loss_scale
    transform_slots_(UnnamedSlots(params), given, scale)
    for param in params:
        assert param.grad is not None
        assert param.grad.data_ptr() == grad.data_ptr()
        torch.testing.assert_close(wide(param.grad), expected, rtol=1e-6, atol=1e-6)


def test_large_memory_is_transformed_once() -> None:
    grad = BUFFER.repeat(5000)  # small ones are copied before they are rewritten
    expected = zscore(grad, EPS)
    zscore_grads_(params_of(grad, grad), EPS)
    torch.testing.assert_close(wide(grad), expected, rtol=1e-5, atol=1e-5)


def test_lazily_conjugated_gradient_is_not_the_same() -> None:
    grad = torch.view_as_complex(BUFFER.clone().view(6, 2))
    with pytest.raises(UnsupportedGradientError, match="overlap in memory"):
        zscore_grads_(params_of(grad, grad.conj()))


def test_an_attached_method_sees_it_too() -> None:
    flat = BUFFER.clone()
    optimizer = torch.optim.SGD(
        [{"params": params_of(flat[:7])}, {"params": params_of(flat[6:])}],
        lr=1.0,
    )
    attach(optimizer)
    with pytest.raises(UnsupportedGradientError, match=r"parameter 0 of group 0 and parameter 0 of group 1 overlap"):
        optimizer.step()


# One tensor whose elements share memory with each other, other than by an expansion.
SELF_OVERLAPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "as_strided": lambda flat: flat.as_strided((3, 3), (1, 1)),
    "unfold": lambda flat: flat.unfold(0, 4, 2),
    "expanded": lambda flat: flat[:4].expand(3, 4),
    "three dimensions": lambda flat: flat.as_strided((2, 3, 2), (5, 2, 1)),
    "interleaved": lambda flat: flat.as_strided((3, 2), (2, 4)),
}


@pytest.mark.parametrize("case", SELF_OVERLAPPING)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_that_overlaps_with_itself_is_copied(case: str, method: str) -> None:
    flat = BUFFER.clone()
    (param,) = params_of(SELF_OVERLAPPING[case](flat))
    assert param.grad is not None
    given, reference = METHODS[method]
    expected = reference(param.grad)
    transform_grads_(param, given)
    torch.testing.assert_close(wide(param.grad), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(flat, BUFFER)


def test_internal_overlap_is_that_of_the_addresses() -> None:
    """All small layouts are compared with their addresses: where strides cannot tell, the answer may only be yes."""
    flat = torch.arange(100)
    for shape in product((1, 2, 3), repeat=3):
        for stride in product(range(6), repeat=3):
            tensor = flat.as_strided(shape, stride)
            overlaps = tensor.unique().numel() < tensor.numel()
            assert has_internal_overlap(tensor) or not overlaps


def test_tensors_without_storage_share_nothing() -> None:
    """Such as the tensors of functions under vmap, and XLA's."""

    def function(tensor: Tensor) -> Tensor:
        assert not may_share_memory([tensor, tensor], [])
        return tensor

    torch.func.vmap(function)(torch.zeros(2, 3))


def test_measuring_leaves_overlapping_gradients_as_they_are() -> None:
    flat = BUFFER.clone()
    params = params_of(flat[:7], flat[6:])
    _, stats = measure_slots(UnnamedSlots(params))
    assert torch.equal(flat, BUFFER)
    torch.testing.assert_close(stats.mean, torch.stack([flat[:7].double().mean(), flat[6:].double().mean()]))


class ShardSlot(GradientSlot):
    shape = torch.Size([6])

    def __init__(self, name: str, shard: Shard) -> None:
        super().__init__((name,))
        self._shard = shard

    def read(self) -> Shard:
        return self._shard

    def clear(self) -> None:
        raise AssertionError


def test_shards_of_the_same_memory() -> None:
    """Twice the same gradient, of which the third rank holds nothing: ranks agree on what they exchange."""
    group = Group(range(3))
    whole = BUFFER.repeat(5000)  # small ones are copied before they are rewritten
    parts = [whole[:32_000].clone(), whole[32_000:].clone(), whole[:0].clone()]

    def run(rank: int) -> None:
        shards = [
            BoxShard(
                local=parts[rank],
                shape=whole.shape,
                device=whole.device,
                rows=len(parts[rank]),
                cuts={group: 0},
            )
            for _ in range(2)
        ]
        transform_slots_([ShardSlot(f"layer{number}", shard) for number, shard in enumerate(shards)], ZScore(EPS))

    on_ranks(3, [group], run)
    # In float32, sums over so many elements are off by more the fewer threads share them.
    torch.testing.assert_close(torch.cat(parts).double(), zscore(whole, EPS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", ["shard", "whole"])
def test_shard_that_overlaps_is_refused(other: str) -> None:
    flat = BUFFER.clone()
    shard = FlatShard(local=flat[:7], shape=torch.Size([20]), device=flat.device, offset=3, group=None)
    second: GradientSlot = ShardSlot(
        "layer1", FlatShard(local=flat[:7], shape=torch.Size([20]), device=flat.device, offset=4, group=None)
    )
    if other == "whole":
        second = ParameterSlot(("layer1",), params_of(flat[:7])[0])
    with pytest.raises(UnsupportedGradientError, match="gradients of layer0 and layer1 overlap"):
        transform_slots_([ShardSlot("layer0", shard), second], ZScore())
    assert torch.equal(flat, BUFFER)


@pytest.mark.parametrize("method", [Centralization(), SING()], ids=repr)
@pytest.mark.parametrize("on_device", [False, True])
def test_shard_without_rows_is_refused_before_anything_changes(
    method: AffineMethod, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:
        monkeypatch.setattr(dispatch, "is_on_cpu", lambda tensor: False)
    (whole,) = params_of(torch.arange(12.0).view(4, 3))
    shard = FlatShard(
        local=torch.arange(6.0),
        shape=torch.Size([2, 3]),
        device=torch.device("cpu"),
        offset=0,
        group=None,
        in_rows=False,
    )
    with pytest.raises(UnsupportedGradientError, match="mixes its rows"):
        transform_slots_([ParameterSlot(("layer0",), whole), ShardSlot("layer1", shard)], method)
    assert torch.equal(whole.grad, torch.arange(12.0).view(4, 3))
