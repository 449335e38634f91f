"""Launches and memory of a step's methods on a CUDA device, counted without one: ``python -m benchmarks.launches``.

Under ``FakeTensorMode``, tensors of a device have shapes and types and no memory. :class:`Launches` sees every
operation that would go to the device. The number of launches of an operation follows torch's source: ``cat`` takes up
to 128 tensors a launch. An operation on lists takes 110 tensors (64 with two lists, 48 with three) or 320 blocks of
65,536 elements. Where its fast route does not apply, it takes one launch for each tensor. A device may add small ones,
such as clearing a buffer. Time is not measured.
"""

import argparse
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernels import MODELS
from lightning_znorm.functional import centralize_grads_, transform_grads_, zscore_grads_
from lightning_znorm.gradients import SING, AffineMethod, ZScore, apply
from lightning_znorm.gradients.kernels import transform_shards_
from lightning_znorm.gradients.kernels.device import SMALL_NUMEL
from lightning_znorm.gradients.shards import BoxShard
from lightning_znorm.gradients.slots import ParameterSlot

CUDA = torch.device("cuda", 0)
_CONCATENATED = 128
_LISTED = {1: 110, 2: 64, 3: 48, 4: 36}  # tensors of so many lists a launch
_BLOCKS, _BLOCK_NUMEL = 320, 65_536
_COPIES = ("aten._to_copy.", "aten.copy_.")
_NO_LAUNCH = ("aten.empty", "aten.new_empty", "prim.device", "aten.detach", "aten.alias")


class Launches(TorchDispatchMode):
    """Counts what is launched and allocated on the pretended device while it is entered.

    Args:
        large: Tensors whose memory is counted one by one.

    Attributes:
        of_large: For each of these tensors, how many launches read or write it alone.
        others: All other launches, by the name of the operation.
        uploads: Copies from the host, which a first step may make.
        waits: Names of operations that wait for the device.
        peak: The most bytes that were allocated at a time.
    """

    def __init__(self, large: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._large = {_storage(tensor): number for number, tensor in enumerate(large)}
        self._keep = large
        self.of_large: Counter[int] = Counter()
        self.others: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.waits: list[str] = []
        self.peak = self._allocated = 0
        self._known: set[int] = set()

    @property
    def total(self) -> int:
        """Number of all launches."""
        return self.of_large.total() + self.others.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        given = _tensors((args, kwargs))
        returned = _tensors(result)
        before = set(map(_storage, given))
        for tensor in returned:
            if tensor.device == CUDA and _storage(tensor) not in before:
                self._allocate(tensor.untyped_storage())
        reads_device = any(tensor.device == CUDA for tensor in given)
        if name.startswith("aten._local_scalar_dense") or any(tensor.device != CUDA for tensor in returned):
            if reads_device:
                self.waits.append(name)
            return result
        if not (reads_device or returned) or _is_view(func) or name.startswith(_NO_LAUNCH):
            return result
        # A number on the host is an argument of a kernel, unless it is copied.
        if any(tensor.device != CUDA and (tensor.ndim > 0 or name.startswith(_COPIES)) for tensor in given):
            self.uploads[name] += 1
        elif name.startswith("aten._foreach"):
            self.others[name] += _of_lists(name, args)
        else:
            number = 1
            if name.startswith(("aten.cat.", "aten.stack.")):
                number = -(-len(args[0]) // _CONCATENATED)
            large = {tensor for tensor in given if _storage(tensor) in self._large}
            if len(numbers := {self._large[_storage(tensor)] for tensor in large}) == 1:
                (of,) = numbers
                self.of_large[of] += number
                # What works on a copy of it is its launch too.
                numels = [tensor.numel() for tensor in large]
                self._large |= {_storage(copy): of for copy in returned if copy.numel() in numels}
            else:
                self.others[name] += number
        return result

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._allocated += size
            self.peak = max(self.peak, self._allocated)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._large.pop(key, None)
        self._allocated -= size


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_view(func: Any) -> bool:
    """Return whether an operation returns views of its arguments and computes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _of_lists(name: str, args: tuple[Any, ...]) -> int:
    """Return the launches of an operation on lists of tensors."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    first = lists[0]
    is_fast = all(
        tensor.dtype == first[0].dtype
        and tensor.stride() == column[0].stride()
        and tensor.shape == column[0].shape
        and torch.ops.aten.is_non_overlapping_and_dense.default(tensor)
        for column in zip(*lists, strict=True)
        for tensor in column
    ) and not (name.startswith("aten._foreach_norm") and first[0].is_complex())
    if not is_fast:
        return len(first)
    launches = tensors = blocks = 0
    for tensor in first:
        tensors += 1
        num_blocks = -(-tensor.numel() // _BLOCK_NUMEL)
        for block in range(1, num_blocks + 1):
            blocks += 1
            if blocks == _BLOCKS or (tensors == _LISTED[len(lists)] and block == num_blocks):
                launches, blocks, tensors = launches + 1, 0, int(block < num_blocks)
    launches += blocks > 0
    if name.startswith("aten._foreach_norm"):  # clears its partial results first, and sums them at the end
        launches += 1 + -(-len(first) // _LISTED[1])
    return launches


@contextmanager
def pretended_device() -> Iterator[None]:
    """Let tensors be on a CUDA device that is not there. What kernels keep of one such device is none of the next."""
    caches = [
        function
        for name, module in sys.modules.items()
        if name.startswith("lightning_znorm.gradients.kernels.")
        for function in vars(module).values()
        if hasattr(function, "cache_clear")
    ]

    def forget() -> None:
        for cache in caches:
            cache.cache_clear()

    forget()
    try:
        with FakeTensorMode():
            yield
    finally:
        forget()


def shapes_of(model: str) -> list[torch.Size]:
    """Return the shapes of a model's parameters."""
    with torch.device("meta"):
        return [parameter.shape for parameter in MODELS[model]().parameters()]


def with_gradients(shapes: Iterable[torch.Size], dtype: torch.dtype) -> list[nn.Parameter]:
    """Return parameters on the pretended device, with gradients."""
    parameters = [nn.Parameter(torch.empty(shape, dtype=dtype, device=CUDA)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return parameters


def slots_of(parameters: Iterable[nn.Parameter]) -> list[ParameterSlot]:
    """Return where the gradients of parameters are kept."""
    return [ParameterSlot((str(number),), parameter) for number, parameter in enumerate(parameters)]


def counted(function: Callable[[], object], parameters: Sequence[nn.Parameter]) -> Launches:
    """Return what a call takes that is not the first one with these sizes."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    function()
    with Launches([grad for grad in grads if grad.numel() > SMALL_NUMEL]) as launches:
        function()
    return launches


class OtherRanks:
    """A stand-in for a process group: it has what the kernel reads."""

    _device_types = (torch.device("cuda"),)


def shards_of(parameters: Iterable[nn.Parameter], ranks: int) -> list[BoxShard]:
    """Return the rows of each gradient that the first of so many ranks holds, as FSDP2 cuts them."""
    group: Any = OtherRanks()
    shards = []
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        local = grad.chunk(ranks)[0].clone()
        is_complex = grad.is_complex()
        shards.append(
            BoxShard(
                local=local,
                shape=grad.shape,
                device=grad.device,
                is_complex=is_complex,
                rows=len(local),
                cuts={group: 0},
            )
        )
    return shards


@contextmanager
def without_the_wait() -> Iterator[None]:
    """Leave out the one wait of what needs numbers on the host, which a pretended device does not have."""
    with (
        patch.object(apply, "_to_host", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype)),
        patch.object(apply, "_indices_of_flags", lambda flags: []),
        patch("torch.distributed.all_reduce", lambda tensor, *others, **options: None),
    ):
        yield


def calls_of(parameters: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Return what is counted."""
    slots = slots_of(parameters)
    return {
        "clip_grad_norm_": lambda: clip_grad_norm_(parameters, 1.0, foreach=True),
        "ZNorm": lambda: zscore_grads_(parameters),
        "ZNorm, adaptive": lambda: zscore_grads_(parameters, centering="adaptive"),
        "centralization": lambda: centralize_grads_(parameters),
        "SING": lambda: transform_grads_(parameters, SING()),
        "measuring": lambda: apply.measure_slots(slots),
        "inf and NaN": lambda: apply.check_finite(slots),
    }


def counted_shards(shards: Sequence[BoxShard], method: AffineMethod) -> Launches:
    """Return what a process takes to transform its shards, without the collectives."""
    transform_shards_(shards, method)
    local = [shard.local for shard in shards if shard.local is not None and shard.local.numel() > SMALL_NUMEL]
    with Launches(local) as launches:
        transform_shards_(shards, method)
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, a pretended CUDA device. Of a call that is not the first one: launches that read"
    )
    print("or write one large gradient (of more than 2^14 elements) alone, all other launches together, waits for the")
    print(
        "device, but for the one of measuring and of looking for inf and NaN, and the most memory beyond gradients.\n"
    )
    print(f"| {'model':16} | {'type':8} | {'tensors':>7} | {'large':>5} | {'call':15} | ", end="")
    print(f"{'launches':>8} | {'each large':>10} | {'others':>6} | {'waits':>5} | {'MiB':>6} | {'of largest':>10} |")
    print(f"| {'-' * 16} | {'-' * 8} | {'-' * 6}: | {'-' * 4}: | {'-' * 15} | ", end="")
    print(f"{'-' * 7}: | {'-' * 9}: | {'-' * 5}: | {'-' * 4}: | {'-' * 5}: | {'-' * 9}: |")
    for model in args.models:
        shapes = shapes_of(model)
        numels = [shape.numel() for shape in shapes]
        large = sum(numel > SMALL_NUMEL for numel in numels)
        for dtype in args.dtypes:
            with pretended_device(), without_the_wait():
                parameters = with_gradients(shapes, getattr(torch, dtype))
                rows = {name: counted(call, parameters) for name, call in calls_of(parameters).items()}
                shards = shards_of(parameters, 2)
                rows["ZNorm, shards"] = counted_shards(shards, ZScore())
                rows["SING, shards"] = counted_shards(shards, SING())
            for name, found in rows.items():
                print(
                    f"| {model:16} | {dtype:8} | {len(numels):7} | {large:5} | {name:15} | "
                    f"{found.total:8} | {max(found.of_large.values(), default=0):10} | {found.others.total():6} | "
                    f"{len(found.waits):5} | {found.peak / 2**20:6.2f} | {found.peak / 4 / max(numels):10.2f} |"
                )


if __name__ == "__main__":
    main()
