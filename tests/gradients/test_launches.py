"""How few launches, and how little memory, the kernel for devices takes: counted on a device that only pretends."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from unittest.mock import patch

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.launches import (
    CUDA,
    Launches,
    counted,
    counted_shards,
    pretended_device,
    shapes_of,
    shards_of,
    slots_of,
    with_gradients,
    without_the_wait,
)
from lightning_znorm.functional import transform_grads_
from lightning_znorm.gradients import SING, AffineMethod, Centralization, ZScore, apply

KINDS = [
    pytest.param(model, dtype, id=f"{model} {dtype}", marks=() if is_in_every_run else pytest.mark.full)
    for model in ("DenseNet-121", "ResNet-152", "ResNet-56", "ViT-B/16", "transformer, 1 G")
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64)
    for is_in_every_run in [model in ("DenseNet-121", "ResNet-152") and dtype in (torch.float32, torch.bfloat16)]
]

shapes = lru_cache(shapes_of)


def can_be_sliced() -> bool:
    """Whether a tensor of a pretended device can: PyTorch 2.6 asks for the device itself."""
    with pretended_device():
        try:
            torch.empty(2, device=CUDA)[:1]
        except RuntimeError:
            return False
    return True


pytestmark = pytest.mark.skipif(not can_be_sliced(), reason="this PyTorch slices no tensors of a pretended device")


def check(launches: Launches, per_large: int, others: int) -> None:
    assert max(launches.of_large.values(), default=0) <= per_large
    assert launches.others.total() <= others, launches.others.most_common()
    assert not launches.uploads
    assert not launches.waits


def memory(parameters: Sequence[Tensor], by_row: bool) -> int:
    """The largest gradient in float32 (or its wider type), or 16 MiB, and some numbers for each tensor or row."""
    itemsize = max(parameters[0].dtype.itemsize, 4)
    numbers = sum(len(parameter) if by_row and parameter.ndim else 1 for parameter in parameters)
    return itemsize * (max(2**22, *(parameter.numel() for parameter in parameters)) + 16 * numbers)


def per_large(dtype: torch.dtype) -> int:
    """Launches of each large gradient: two, and in half precision one more, to float32."""
    return 3 if dtype.itemsize == 2 else 2


@pytest.mark.parametrize(("model", "dtype"), KINDS)
# The aim is 40 for all others. SING adds up the rows of each tensor too, and adaptive centring has more arithmetic.
@pytest.mark.parametrize(
    ("method", "others"),
    [(ZScore(), 40), (Centralization(), 40), (SING(), 48), (ZScore(centering="adaptive"), 50)],
    ids=repr,
)
def test_of_a_step(method: AffineMethod, others: int, model: str, dtype: torch.dtype) -> None:
    shapes(model)
    with pretended_device():
        parameters = with_gradients(shapes(model), dtype)
        found = counted(lambda: transform_grads_(parameters, method), parameters)
        check(found, per_large(dtype), others)
        assert len(found.of_large) == sum(parameter.numel() > 2**14 for parameter in parameters)
        assert found.peak <= memory(parameters, by_row=method.over == "row")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_with_a_loss_scale(dtype: torch.dtype) -> None:
    shapes("ResNet-152")
    with pretended_device():
        parameters = with_gradients(shapes("ResNet-152"), dtype)
        slots = slots_of(parameters)
        scale = torch.ones((), device=CUDA)
        found = counted(lambda: apply.transform_slots_(slots, ZScore(), scale), parameters)
        check(found, per_large(dtype), 40 + 4)  # mean, squared deviation (twice) and shift


def grows(function: Callable[[list[nn.Parameter]], object], sizes: tuple[int, int] = (100, 1000)) -> int:
    """By how many launches a call grows with 900 more small gradients, of ten shapes."""
    counts = []
    for number in sizes:
        with pretended_device():
            parameters = with_gradients([torch.Size((8, 3 + index % 10)) for index in range(number)], torch.float32)
            counts.append(counted(lambda parameters=parameters: function(parameters), parameters).total)
    return counts[1] - counts[0]


@pytest.mark.parametrize("method", [ZScore(), Centralization(), SING()], ids=repr)
def test_more_small_gradients_only_take_more_to_copy(method: AffineMethod) -> None:
    # 128 (with their padding, 64) a launch to concatenate, and 64 a launch to copy back.
    assert grows(lambda parameters: transform_grads_(parameters, method)) <= 2 * 900 / 64 + 2


@pytest.mark.parametrize("method", [Centralization(), SING()], ids=repr)
def test_each_length_of_rows_takes_two_more(method: AffineMethod) -> None:
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in timm.create_model("efficientnet_b0").parameters()]
    lengths = {shape[1:].numel() for shape in shapes if shape[0] < shape.numel() <= 2**14}
    assert len(lengths) == 16
    with pretended_device():
        parameters = with_gradients(shapes, torch.float32)
        found = counted(lambda: transform_grads_(parameters, method), parameters)
        check(found, 2, 40 + 2 * len(lengths))


LOW_RANK = [torch.Size((8, 2048)), torch.Size((2048, 8))] * 224  # as LoRA has them: 7 million elements, none large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [ZScore(), Centralization(), SING()], ids=repr)
def test_of_more_small_gradients_than_are_copied_at_a_time(method: AffineMethod, dtype: torch.dtype) -> None:
    with pretended_device(), without_the_wait():
        parameters = with_gradients(LOW_RANK, dtype)
        found = counted(lambda: transform_grads_(parameters, method), parameters)
        check(found, 0, 200)  # and not two for each of 448
        by_row = method.over == "row"
        assert found.peak <= memory(parameters, by_row)
        shards = shards_of(parameters, ranks=1)
        assert counted_shards(shards, method).peak <= memory(parameters, by_row)


@pytest.mark.parametrize("method", [ZScore(), SING()], ids=repr)
def test_of_shards_over_several_groups(method: AffineMethod) -> None:
    with pretended_device(), without_the_wait():
        parameters = with_gradients(LOW_RANK[:192], torch.float32)  # 12 MiB
        shards = [shard for group in range(6) for shard in shards_of(parameters[group::6], ranks=1)]
        assert len({tuple(shard.cuts) for shard in shards}) == 6
        found = counted_shards(shards, method)
        assert found.peak <= 10 * 2**20  # and not the copies of all groups


# What only reads.


@pytest.mark.parametrize(("model", "dtype"), KINDS)
def test_of_a_measurement(model: str, dtype: torch.dtype) -> None:
    shapes(model)
    with pretended_device():
        parameters = with_gradients(shapes(model), dtype)
        slots = slots_of(parameters)
        with without_the_wait():
            found = counted(lambda: apply.measure_slots(slots), parameters)
        check(found, per_large(dtype) - 1, 40)
        assert found.peak <= memory(parameters, by_row=False)


@pytest.mark.parametrize(("model", "dtype"), KINDS)
def test_of_the_look_for_inf_and_nan(model: str, dtype: torch.dtype) -> None:
    shapes(model)
    with pretended_device():
        parameters = with_gradients(shapes(model), dtype)
        slots = slots_of(parameters)
        with without_the_wait():
            found = counted(lambda: apply.check_finite(slots), parameters)
        # Norms of lists are computed in blocks, of which a billion elements have many.
        numbers = 2 if dtype.is_complex else 1
        blocks = sum(-(-numbers * parameter.numel() // 65_536) for parameter in parameters) // 320
        check(found, 0, 40 + blocks)
        assert found.peak <= 2**20


# Shards: the same on each process, with two collectives.


# More than of whole gradients, by what is exchanged: sums and squared deviations, in float64.
@pytest.mark.parametrize(
    ("method", "others", "collectives"),
    [(ZScore(), 56, 2), (Centralization(), 40, 0), (SING(), 84, 1)],
    ids=["ZScore", "Centralization", "SING"],
)
@pytest.mark.parametrize(("model", "dtype"), KINDS)
def test_of_shards(model: str, dtype: torch.dtype, method: AffineMethod, others: int, collectives: int) -> None:
    shapes(model)
    calls: list[Tensor] = []
    with pretended_device(), patch("torch.distributed.all_reduce", lambda tensor, group: calls.append(tensor)):
        shards = shards_of(with_gradients(shapes(model), dtype), ranks=2)
        found = counted_shards(shards, method)
        assert len(calls) == 2 * collectives  # it is called twice
        check(found, per_large(dtype), others)
        assert found.peak <= memory([shard.local for shard in shards], by_row=method.over == "row")


# The counting itself.


def test_a_loop_is_seen() -> None:
    with pretended_device():
        parameters = with_gradients([torch.Size((300, 300))] * 5 + [torch.Size((30,))] * 7, torch.float32)

        def loop() -> None:
            for parameter in parameters:
                grad = parameter.grad
                assert grad is not None
                grad.sub_(grad.mean()).div_(grad.std() + 1e-10)

        found = counted(loop, parameters)
        assert found.of_large == dict.fromkeys(range(5), 4)  # of which two read, and two write
        assert found.others.total() == 5 + 7 * 5  # the sum with eps
        assert not found.waits
        assert found.peak > 0


def test_waits_and_uploads_are_seen() -> None:
    with pretended_device(), Launches() as found:
        torch.ones(3).to(CUDA)
        assert found.uploads.total() == 1
        assert not found.waits
        torch.ones(3, device=CUDA).cpu()
        assert found.waits == ["aten._to_copy.default"]
    for upload in (
        lambda: torch.ones(()).to(CUDA),
        lambda: torch.tensor(2.0, device=CUDA),
        lambda: torch.empty((), device=CUDA).copy_(torch.ones(())),
        lambda: torch.empty(2, device=CUDA).copy_(torch.ones(())),
    ):
        with pretended_device(), Launches() as found:
            upload()
        assert found.uploads.total() == 1
    with pretended_device(), Launches() as found:
        torch.empty(2, device=CUDA).mul_(torch.ones(())).add_(1.0)  # numbers that are arguments
    assert not found.uploads
    assert found.total == 2


@pytest.mark.parametrize("method", [ZScore(), Centralization(), SING(), ZScore(centering="adaptive")], ids=repr)
def test_only_the_first_step_copies_tables(method: AffineMethod) -> None:
    with pretended_device():
        parameters = with_gradients([torch.Size((300, 300)), torch.Size((30, 5)), torch.Size((30,))], torch.float32)
        with Launches() as first:
            transform_grads_(parameters, method)
        assert first.uploads
        assert not first.waits
        with Launches() as second:
            transform_grads_(parameters, method)
        assert not second.uploads
        assert not second.waits


def test_memory_is_that_of_what_is_alive() -> None:
    with pretended_device(), Launches() as found:
        for _ in range(5):
            torch.empty(1000, device=CUDA).add_(1)
        assert found.peak == 4000
        kept = [torch.empty(1000, device=CUDA) for _ in range(3)]
        assert found.peak == 12_000
        del kept


def test_lists_are_counted_in_the_portions_of_torchs_kernels() -> None:
    with pretended_device():
        for number, numel, launches in [(110, 5, 1), (111, 5, 2), (2, 320 * 65_536, 2), (1, 641 * 65_536, 3)]:
            tensors = [torch.empty(numel, device=CUDA) for _ in range(number)]
            with Launches() as found:
                torch._foreach_mul_(tensors, 2.0)
            assert found.total == launches, (number, numel)
        with Launches() as found:
            torch._foreach_mul_(tensors * 70, [torch.ones((), device=CUDA)] * 70)
        assert found.total > 70  # numbers on the device take the slow route
        with Launches() as found:
            torch.cat([torch.empty(3, device=CUDA)] * 129)
        assert found.total == 2
