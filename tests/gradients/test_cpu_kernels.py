"""The kernels for gradients on a CPU: tiny ones in one vector, others measured as they are and rewritten once."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_znorm.functional import zscore_grads_
from lightning_znorm.gradients import SING, AffineMethod, Centralization, ZScore
from lightning_znorm.gradients.kernels import cpu, cpu_blocks, transform_segments_, transform_unsharded_
from lightning_znorm.gradients.methods import Statistics
from lightning_znorm.gradients.shards import unsharded_segments
from tests.gradients.reference import centralized, wide, zscore
from tests.gradients.test_methods import Counted, HalfCentered, RMSNorm, RowZScore


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unsupported(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors that the kernels for a CPU do not support, and that go to the one for any segments."""
    tensors: list[Tensor] = []
    contiguous_buffers = cpu_blocks.contiguous_buffers

    def recorded(segments):  # type: ignore[no-untyped-def]
        segments = list(segments)
        tensors.extend(segment.tensor for segment in segments)
        return contiguous_buffers(segments)

    monkeypatch.setattr(cpu_blocks, "contiguous_buffers", recorded)
    return tensors


def test_a_networks_gradients_are_theirs(unsupported: list[Tensor]) -> None:
    grads = [randn(16), randn(64, 3, 3, 3), randn(700_000), randn(9).double(), randn(9).half()]
    transform_segments_(unsharded_segments(grads, ZScore()), ZScore())
    assert not unsupported


@pytest.mark.parametrize("method", [ZScore(), ZScore(centering="adaptive"), Centralization(), SING()], ids=repr)
def test_a_networks_gradients_in_channels_last_are_theirs(unsupported: list[Tensor], method: AffineMethod) -> None:
    """Nothing is copied: the gradients are rewritten where they are."""
    grads = [
        randn(16, 8, 3, 3).to(memory_format=torch.channels_last),
        randn(4, 2, 3, 3).to(memory_format=torch.channels_last),
        randn(16, 8, 1, 1).to(memory_format=torch.channels_last),
        randn(16, 1, 3, 3).to(memory_format=torch.channels_last),
        randn(16, 8, 3, 3, 3).double().to(memory_format=torch.channels_last_3d),
    ]
    memory = [(grad.data_ptr(), grad.stride()) for grad in grads]
    plain = [grad.contiguous() for grad in grads]
    for each in (grads, plain):
        transform_unsharded_(each, method)
    assert not unsupported
    assert [(grad.data_ptr(), grad.stride()) for grad in grads] == memory
    torch.testing.assert_close(grads, plain, rtol=1e-5, atol=1e-6)


def test_others_are_unsupported(unsupported: list[Tensor]) -> None:
    grads = [randn(40, 30).t(), randn(2000).bfloat16(), torch.complex(randn(9), randn(9)), torch._neg_view(randn(9))]
    want = [zscore(grad.resolve_neg()) for grad in grads]
    transform_segments_(unsharded_segments(grads, ZScore()), ZScore())
    assert [grad.data_ptr() for grad in unsupported] == [grad.data_ptr() for grad in grads]
    for grad, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(wide(grad.resolve_neg()), expected, rtol=0, atol=2e-2)


class Tagged(Tensor):
    """A subclass of Tensor, which may not work in inference mode."""


class TestRows:
    """Of matrices in their own memory, without segments and buffers."""

    @pytest.mark.parametrize("method", [Centralization(), RowZScore()], ids=repr)
    def test_a_networks_gradients_are_theirs(self, unsupported: list[Tensor], method: AffineMethod) -> None:
        grads = [randn(16, 30), randn(64, 3, 3, 3), randn(2, 7_000), randn(5, 9).double()]
        self.check(grads, method)
        assert not unsupported

    def test_those_without_rows_of_several_elements_stay_as_they_are(self, unsupported: list[Tensor]) -> None:
        grads = [randn(16), randn(16, 1), randn(3, 1, 1, 1), randn(0, 4), randn(4, 0), randn()]
        want = [grad.clone() for grad in grads]
        transform_unsharded_(grads, Centralization())
        assert all(map(torch.equal, grads, want))
        assert not unsupported

    def test_others_are_unsupported(self, unsupported: list[Tensor]) -> None:
        others = [randn(40, 30).t(), randn(20, 30).bfloat16(), torch.complex(randn(3, 3), randn(3, 3))]
        self.check(
            [randn(4, 5), *others, torch._neg_view(randn(3, 3)), randn(4, 5).as_subclass(Tagged)], Centralization()
        )
        assert [grad.data_ptr() for grad in unsupported[: len(others)]] == [grad.data_ptr() for grad in others]
        assert len(unsupported) == len(others) + 2

    def check(self, grads: list[Tensor], method: AffineMethod) -> None:
        plain = [wide(grad.as_subclass(Tensor).resolve_neg()) for grad in grads]
        by_row = centralized if isinstance(method, Centralization) else lambda grad: torch.stack([*map(zscore, grad)])
        transform_unsharded_(grads, method)
        for got, grad in zip(grads, plain, strict=True):
            tolerance = 2e-2 if got.dtype == torch.bfloat16 else 1e-5
            got = wide(got.as_subclass(Tensor).resolve_neg())
            torch.testing.assert_close(got, by_row(grad), rtol=0, atol=tolerance)


@pytest.mark.parametrize("mean", [0.0, 0.9, 1.1, 1e3, 1e6])
@pytest.mark.parametrize("numel", [100, 5_000, cpu_blocks.CPU_BLOCK + 1])
def test_mean_of_the_result_is_zero_whatever_the_mean_was(mean: float, numel: int) -> None:
    # The mean itself is rounded: at 1e6, a tenth of the deviation is still mean after the subtraction.
    grad = randn(numel) + mean
    expected = zscore(grad)
    transform_segments_(unsharded_segments([grad], ZScore()), ZScore())
    torch.testing.assert_close(wide(grad), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "method", [RMSNorm(), HalfCentered(), Counted(), ZScore(eps=0.5), ZScore(0.5, "adaptive")], ids=repr
)
def test_methods_where_some_means_are_subtracted_first(method: AffineMethod) -> None:
    def grads() -> list[Tensor]:
        return [randn(numel) + mean for numel, mean in itertools.product((30, 3_000), (0.1, 20.0))]

    together, alone = grads(), [grad.double() for grad in grads()]
    transform_segments_(unsharded_segments(together, ZScore()), method)
    for grad in alone:
        transform_segments_(unsharded_segments([grad], ZScore()), method)
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(wide(got), want, rtol=2e-5, atol=2e-5)


def test_what_is_cached_and_concatenated_together_ends_where_tensors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CACHED_NUMEL", 2_000)
    monkeypatch.setattr(cpu, "CPU_BLOCK", 600)
    monkeypatch.setattr(cpu, "_ROW_NUMEL", 64)
    monkeypatch.setattr(cpu, "_VECTOR_NUMEL", 2 * cpu.TINY_NUMEL)
    grads = [randn(numel) * (index + 1) for index, numel in enumerate((704, 5_000, 600, 900, 3, 512, 40, 513, 1_999))]
    want = [zscore(grad) for grad in grads]
    transform_segments_(unsharded_segments(grads, ZScore()), ZScore())
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(wide(got), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("numel", [cpu_blocks.CPU_BLOCK + 1, 2**20, 2**22, 2**23 + 77])
@pytest.mark.parametrize("values", ["signs", "normal", "uniform", "alternating"])
def test_squares_of_long_tensors_are_exact_to_a_few_units_of_rounding(values: str, numel: int) -> None:
    grad = {
        "signs": lambda: 0.1 * randn(numel).sign(),
        "normal": lambda: randn(numel),
        "uniform": lambda: torch.rand(numel, generator=torch.Generator().manual_seed(0)) + 0.5,
        "alternating": lambda: torch.tensor([1.0, 1e-3]).repeat(numel // 2 + 1)[:numel],
    }[values]()
    got, _ = cpu._squares_and_sum(grad)
    torch.testing.assert_close(got.double(), grad.double().square().sum(), rtol=12 * torch.finfo().eps, atol=0)


def test_subclasses_are_unsupported(unsupported: list[Tensor]) -> None:
    grads = [randn(numel).as_subclass(Tagged) for numel in (40, 2_000)]
    want = [zscore(grad.as_subclass(Tensor)) for grad in grads]
    transform_segments_(unsharded_segments(grads, ZScore()), ZScore())
    assert len(unsupported) == 2
    for grad, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(wide(grad.as_subclass(Tensor)), expected, rtol=0, atol=2e-5)


class Running(AffineMethod):
    """Keeps a running deviation, which a user may reset and use in a loss."""

    running: Tensor | None = None

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        std = stats.std.mean().double()
        if self.running is None:
            self.running = std
        else:
            self.running.lerp_(std, 0.5)
        self.count = stats.count
        return None, stats.count / stats.count


def test_a_method_may_keep_and_change_what_it_is_given_whatever_the_gradients() -> None:
    for order in itertools.permutations(
        [randn(2_000), randn(40), randn(30, 20).t(), randn(700).bfloat16(), randn(30).half()]
    ):
        method = Running()
        for grad in order:
            transform_segments_(unsharded_segments([grad], ZScore()), ZScore())  # which may have made what is cached
            transform_unsharded_([grad], Centralization())
            transform_segments_(unsharded_segments([grad], ZScore()), method)
        assert method.running is not None
        method.running.zero_()
        weight = torch.nn.Parameter(torch.ones(1))
        (weight * method.running + weight * method.count).sum().backward()
        assert weight.grad is not None


@pytest.mark.parametrize("numel", [40, 2_000])
def test_the_gradient_is_none_of_inference_mode(numel: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(numel))
    (2 * weight).sum().backward()
    assert weight.grad is not None
    weight.grad.add_(randn(numel))
    version = weight.grad._version
    zscore_grads_([weight])
    assert not weight.grad.is_inference()
    assert weight.grad._version > version  # autograd sees that it has changed
    (weight * weight.grad).sum().backward()


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations make and that are alive at the same time, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: storage for key, storage in self._alive.items() if not storage[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_extra_memory_is_less_than_one_tensor(mean: float) -> None:
    grads = [randn(numel) + mean for numel in [300_000] * 3 + [16, 64, 512] * 20]
    with Allocations() as allocations:
        transform_segments_(unsharded_segments(grads, ZScore()), ZScore())
    assert 0 < allocations.peak < grads[0].nbytes


def test_that_measure_of_memory_sees_a_copy() -> None:
    grad = randn(1000)
    with Allocations() as allocations:
        copy = grad * 2
        copy.add_(1)
        del copy
        _ = grad + 1
    assert allocations.peak == grad.nbytes
