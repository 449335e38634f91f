"""Gradients under the first version of FSDP (``FullyShardedDataParallel``): intervals of flattened layers.

FSDP1 has no public functions that tell which part of a gradient a rank holds. All private attributes that are used here
are checked by :meth:`FSDP1Adapter._handles`, which names those that a release of torch lacks.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_znorm.gradients.adapters.plain import PlainAdapter
from lightning_znorm.gradients.exceptions import UnsupportedGradientError, missing_attributes, untested_torch
from lightning_znorm.gradients.shards import FlatShard, Shard
from lightning_znorm.gradients.slots import GradientSlot, clean_name

if TYPE_CHECKING:
    from torch.distributed.fsdp._flat_param import FlatParamHandle


class FSDP1Slot(GradientSlot):
    """The slot of a parameter that is part of a flat one.

    Args:
        names: The parameter's names.
        handle: Manages the flat parameter.
        number: The parameter's number among those of the flat one.

    Raises:
        UnsupportedGradientError: If the parameter is sharded by tensor parallelism too.
    """

    def __init__(self, names: tuple[str, ...], handle: "FlatParamHandle", number: int) -> None:
        super().__init__(names)
        flat = handle.flat_param
        if flat._param_extensions[number] is not None:
            raise UnsupportedGradientError(
                f"{names[0]} is sharded by FSDP and by tensor parallelism: use FSDP2 for both (ModelParallelStrategy)"
            )
        self._shape = flat._shapes[number]
        self._interval = flat._shard_param_infos[number]
        # A parameter that is not contiguous is flattened in the order of its memory.
        stride = flat._strides[number]
        self._in_rows = flat._contiguities[number] or stride[0] == max(stride)
        self._is_unsharded = not handle.uses_sharded_strategy
        self._group = None if self._is_unsharded or handle.world_size == 1 else handle.process_group
        self._flat_parameter = flat
        # With `use_orig_params=True`, the module's own parameter, whose data and gradient are views of the flat ones.
        self._parameter: Tensor | None = None if flat._params is None else flat._params[number]

    @property
    def shape(self) -> torch.Size:  # noqa: D102
        return self._shape

    def read(self) -> Tensor | Shard | None:  # noqa: D102
        if self._parameter is not None and self._is_unsharded:
            return self._parameter.grad
        parameter = self._flat_parameter if self._parameter is None else self._parameter
        if not parameter.requires_grad:
            return None
        # A rank that holds nothing of the parameter has no gradient, while others may have one.
        local = parameter.grad if self._interval.in_shard else None
        if self._parameter is None and local is not None:
            local = self._part_of(local)
        return FlatShard(
            local=local,
            shape=self._shape,
            device=parameter.device,
            is_complex=parameter.is_complex(),
            offset=self._interval.intra_param_start_idx or 0,
            group=self._group,
            in_rows=self._in_rows,
        )

    def local_parameter(self) -> Tensor | None:  # noqa: D102
        if self._parameter is not None:
            return self._parameter
        return self._part_of(self._flat_parameter) if self._interval.in_shard else None

    def clear(self) -> None:  # noqa: D102
        if self._parameter is not None:
            self._parameter.grad = None
        elif self._flat_parameter.grad is not None and self._interval.in_shard:
            # The flat gradient holds other parameters' too.
            self._part_of(self._flat_parameter.grad).zero_()

    def _part_of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self._interval.offset_in_shard or 0, self._interval.numel_in_shard or 0)


class FSDP1Adapter(PlainAdapter):
    """The gradients of a model that is wrapped, at any depth, in ``FullyShardedDataParallel``.

    Args:
        module: The model, which gives the names.
        wrapped: The module that holds the wrappers: the model, or a wrapper around it.

    Raises:
        UnsupportedGradientError: If nothing is wrapped, or this release of torch keeps gradients elsewhere than the
            tested ones.
    """

    def __init__(self, module: nn.Module, wrapped: nn.Module) -> None:
        super().__init__(module)
        self._wrapped = wrapped
        self._handles()

    def read_slots(self) -> dict[Tensor, list[GradientSlot]]:  # noqa: D102
        slots = super().read_slots()
        prefixes = {module: f"{name}." if name else "" for name, module in self.module.named_modules()}
        for handle in self._handles():
            flat = handle.flat_param
            if flat._params is not None:
                for number, parameter in enumerate(flat._params):
                    names = slots[parameter][0].names if parameter in slots else (flat._fqns[number],)
                    slots[parameter] = [FSDP1Slot(names, handle, number)]
            else:
                prefix = prefixes.get(handle._fully_sharded_module, "")
                names_of = {name: [name] for name in flat._fqns}
                for shared in flat._shared_param_infos:
                    first = _joined(shared.prim_module_name, shared.prim_param_name)
                    names_of[first].append(_joined(shared.module_name, shared.param_name))
                slots[flat] = [
                    FSDP1Slot(tuple(clean_name(prefix + name) for name in names_of[fqn]), handle, number)
                    for number, fqn in enumerate(flat._fqns)
                ]
        return slots

    def _handles(self) -> list["FlatParamHandle"]:
        """Return the handle of each flat parameter, after checking that it has the attributes that are used here."""
        wrappers = FullyShardedDataParallel.fsdp_modules(self._wrapped)
        if not wrappers:
            raise UnsupportedGradientError(
                f"no FullyShardedDataParallel is found in the {type(self._wrapped).__name__} that FSDP is to train, so "
                "that nothing tells how its gradients are sharded"
            )
        for wrapper in wrappers:
            _check(wrapper, "_handle")
        # A module without parameters of its own has no handle.
        handles = [wrapper._handle for wrapper in wrappers if wrapper._handle is not None]
        for handle in handles:
            _check(
                handle, "_fully_sharded_module", "flat_param", "process_group", "uses_sharded_strategy", "world_size"
            )
            _check(
                handle.flat_param,
                "_contiguities",
                "_fqns",
                "_param_extensions",
                "_params",
                "_shapes",
                "_shard_param_infos",
                "_shared_param_infos",
                "_strides",
            )
            for interval in handle.flat_param._shard_param_infos:
                _check(interval, "in_shard", "intra_param_start_idx", "numel_in_shard", "offset_in_shard")
        return handles


def _check(owner: object, *names: str) -> None:
    if what := missing_attributes(owner, names):
        raise untested_torch(what)


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)
