"""Gradients under DeepSpeed: unsharded (ZeRO stage 0), or intervals of flattened ones (stages 1 to 3)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.adapters.plain import named_tensors
from lightning_znorm.gradients.exceptions import UnsupportedGradientError, missing_attributes
from lightning_znorm.gradients.shards import FlatShard, Shard
from lightning_znorm.gradients.slots import GradientSlot, ParameterSlot


class DeepSpeedAdapter(GradientAdapter):
    """The gradients of a DeepSpeed engine, where its step will read them, after their reduction.

    DeepSpeed's own functions, ``safe_get_full_grad`` and ``safe_set_full_grad``, gather every gradient, and are wrong
    in some configurations (with ``round_robin_gradients``, or if stage 3 shards a parameter unevenly).

    Args:
        module: The model, which gives the names.
        engine: The engine around it.

    Raises:
        UnsupportedGradientError: If a feature of the engine puts gradients out of reach, or if this version of
            DeepSpeed keeps them elsewhere than the tested ones.
    """

    def __init__(self, module: nn.Module, engine: Any) -> None:
        super().__init__(module)
        _check(engine, *_ENGINE_NEEDS)
        _check_features(engine)
        self._engine = engine
        self._store = _store_of(engine.optimizer, engine.zero_optimization_stage())
        named = named_tensors(module)
        # A parameter that is frozen, or that the optimizer was not given, takes no step.
        self._slots: dict[Tensor, GradientSlot] = {
            parameter: _UnsteppedSlot(names, parameter) for parameter, names in named.items()
        }
        self._stepped: list[list[GradientSlot]] = []  # by the store's groups
        for group, parameters in enumerate(self._store.groups()):
            self._stepped.append([])
            for number, parameter in enumerate(parameters):
                names = named.get(parameter, (f"parameter {number} of group {group}",))
                slot = self._store.slot(names, parameter, group, number)
                self._slots[parameter] = slot
                self._stepped[group].append(slot)
                if parameter not in named:
                    self.unnamed.add(slot)

    def is_complete(self) -> bool:  # noqa: D102
        return bool(self._engine.is_gradient_accumulation_boundary())

    def loss_scale(self) -> Tensor | None:  # noqa: D102
        if not self._engine.fp16_enabled():
            return None
        return torch.tensor(float(self._engine.optimizer.loss_scale), dtype=torch.float32, device="cpu")

    def slots(self) -> Iterator[GradientSlot]:  # noqa: D102
        yield from self._slots.values()

    def slots_of(self, optimizer: Optimizer) -> Iterator[GradientSlot]:
        """Yield the slots of the parameters that the engine steps. It has one optimizer, with flattened parameters."""
        self._store.refresh()
        yield from chain.from_iterable(self._stepped)

    def slots_by_group(self, optimizer: Optimizer) -> list[list[GradientSlot]]:
        """Return the slots of each parameter group, of which the store may have made several."""
        self._store.refresh()
        found: list[list[GradientSlot]] = [[] for _ in optimizer.param_groups]
        for group, slots in enumerate(self._stepped):
            found[self._store.parameter_group(group)] += slots
        return found

    def clip_norm(self) -> float:  # noqa: D102
        return float(self._engine.gradient_clipping()) or math.inf


class _UnsteppedSlot(GradientSlot):
    """The slot of a parameter of which the engine has no gradient."""

    def __init__(self, names: tuple[str, ...], parameter: Tensor) -> None:
        super().__init__(names)
        self._parameter = parameter

    @property
    def shape(self) -> torch.Size:
        """Shape of the unsharded parameter, which stage 3 shards."""
        shape: torch.Size = getattr(self._parameter, "ds_shape", self._parameter.shape)
        return shape

    def local_parameter(self) -> Tensor | None:
        local: Tensor = getattr(self._parameter, "ds_tensor", self._parameter)
        return local

    def read(self) -> Tensor | Shard | None:
        return None

    def clear(self) -> None:
        pass


class _UnshardedSlot(_UnsteppedSlot):
    """The slot of an unsharded gradient in memory of the optimizer."""

    def __init__(self, names: tuple[str, ...], parameter: Tensor, gradient: Tensor) -> None:
        super().__init__(names, parameter)
        self._gradient = gradient

    def read(self) -> Tensor | Shard | None:
        return self._gradient.view(self.shape)

    def clear(self) -> None:
        self._gradient.zero_()


class _ShardSlot(_UnsteppedSlot):
    """The slot of a gradient of which every process of a group holds an interval.

    Args:
        names: The parameter's names.
        parameter: The parameter.
        group: The process group.
        offset: Index, in the flattened gradient, of the first local element.
        local: Returns the local elements; ``None`` if this process holds nothing of the gradient.
        update_norm: Called with the local elements after they have been rewritten, if the optimizer has taken their
            norm.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        parameter: Tensor,
        group: ProcessGroup,
        offset: int = 0,
        local: Callable[[], Tensor] | None = None,
        update_norm: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__(names, parameter)
        self._group = None if torch.distributed.get_world_size(group) == 1 else group
        self._offset = offset
        self._local = local
        self._update_norm = update_norm

    def read(self) -> Tensor | Shard | None:
        if not self._parameter.requires_grad:
            return None
        return FlatShard(
            local=None if self._local is None else self._local(),
            shape=self.shape,
            device=self._parameter.device,
            offset=self._offset,
            group=self._group,
        )

    def on_rewritten(self) -> None:
        if self._local is not None and self._update_norm is not None:
            self._update_norm(self._local())

    def clear(self) -> None:
        if self._local is not None:
            self._local().zero_()
            self.on_rewritten()


class _Store(ABC):
    """Where one of DeepSpeed's optimizers keeps gradients.

    Attributes:
        needs: Attributes of the optimizer that are used here.
    """

    needs: Sequence[str] = ()

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        _check(optimizer, *self.needs)

    @abstractmethod
    def groups(self) -> list[list[Tensor]]:
        """Return the parameters that are stepped, in the same order on all processes."""

    @abstractmethod
    def slot(self, names: tuple[str, ...], parameter: Tensor, group: int, number: int) -> GradientSlot:
        """Return the slot of one of these parameters."""

    def parameter_group(self, group: int) -> int:
        """Return the number of the optimizer's parameter group that one of :meth:`groups` is a part of."""
        return group

    def refresh(self) -> None:
        """Look up what a backward pass has made anew, before the slots are read."""
        return


class _Stage0(_Store):
    """Stage 0: in ``grad``."""

    def groups(self) -> list[list[Tensor]]:
        return [[p for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups]

    def slot(self, names: tuple[str, ...], parameter: Tensor, group: int, number: int) -> GradientSlot:
        return ParameterSlot(names, parameter)


class _Stage0WithMasterWeights(_Stage0):
    """Stage 0 with master weights in float32, which are the parameters of the wrapped optimizer."""

    needs = ("fp16_groups",)

    def groups(self) -> list[list[Tensor]]:
        return [list(group) for group in self.optimizer.fp16_groups]


class _BF16(_Store):
    """Stage 1 in bfloat16 with accumulation in float32: unsharded, in memory of the optimizer.

    There are gradients in bfloat16 too, which the step ignores.
    """

    needs = ("bf16_groups", "fp32_groups_gradients")

    def groups(self) -> list[list[Tensor]]:
        return [list(group) for group in self.optimizer.bf16_groups]

    def slot(self, names: tuple[str, ...], parameter: Tensor, group: int, number: int) -> GradientSlot:
        return _UnshardedSlot(names, parameter, self.optimizer.fp32_groups_gradients[group][number])


class _Zero(_Store):
    """Stages 1 to 3: in lists of parts that each backward pass makes, or, if offloaded, in memory that stays.

    The step takes the norm of the parts in the lists, and looks there for inf and NaN: both happen after the parts have
    been rewritten. The norms of offloaded gradients are taken before, so they must be updated.
    """

    offloaded: bool

    def refresh(self) -> None:
        averaged = self.optimizer.averaged_gradients
        if self.offloaded:
            # The copies to the CPU may not have arrived yet.
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            return
        for group, parts in averaged.items():
            if parts and any(part.dtype == torch.float16 for part in parts):
                # Z-scores times the loss scale overflow in float16. The step makes these copies anyway.
                averaged[group] = [_widened(part) for part in parts]

    def _update_norm(self, parameter: Tensor) -> Callable[[Tensor], None] | None:
        if not self.offloaded:
            return None
        number = self.optimizer.get_param_id(parameter)

        def update_norm(part: Tensor) -> None:
            self.optimizer.norm_for_param_grads[number] = torch.linalg.vector_norm(part, dtype=torch.float32)

        return update_norm


class _Zero12(_Zero):
    """Stages 1 and 2: on each process, one interval of all parameters of a group, flattened together."""

    needs = (
        "averaged_gradients",
        "bit16_groups",
        "cpu_offload",
        "first_offset",
        "get_param_id",
        "params_in_partition",
        "real_dp_process_group",
        "single_partition_of_fp32_groups",
    )

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.offloaded = optimizer.cpu_offload
        if self.offloaded:
            _check(optimizer, "grad_position", "norm_for_param_grads")
        self._numbers = [{p: number for number, p in enumerate(params)} for params in optimizer.params_in_partition]
        self._parts: dict[int, list[Tensor]] = {}

    def groups(self) -> list[list[Tensor]]:
        return [list(group) for group in self.optimizer.bit16_groups]

    def refresh(self) -> None:
        super().refresh()
        if self.offloaded:
            return
        # Padding between parts is marked by this private attribute; padding at the end may be unmarked.
        self._parts = {
            group: [part for part in parts or () if not getattr(part, "_zero_padding", False)]
            for group, parts in self.optimizer.averaged_gradients.items()
        }

    def slot(self, names: tuple[str, ...], parameter: Tensor, group: int, number: int) -> GradientSlot:
        process_group = self.optimizer.real_dp_process_group[group]
        index = self._numbers[group].get(parameter)
        if index is None:
            return _ShardSlot(names, parameter, process_group)
        offset = int(self.optimizer.first_offset[group]) if index == 0 else 0
        is_last = index == len(self._numbers[group]) - 1

        def averaged() -> Tensor:
            parts = self._parts.get(group, [])
            length = parts[index].numel() if index < len(parts) else 0
            end = offset + length
            if not length or end > parameter.numel() or (end < parameter.numel() and not is_last):
                raise _unknown_layout(f"it holds {length} elements of the gradient of {names[0]} from number {offset}")
            return parts[index].view(-1)

        def offloaded() -> Tensor:
            _, _, start, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            gradient: Tensor = self.optimizer.single_partition_of_fp32_groups[group].grad
            return gradient.view(-1).narrow(0, start, length)

        local = offloaded if self.offloaded else averaged
        return _ShardSlot(names, parameter, process_group, offset, local, self._update_norm(parameter))


class _Zero3(_Zero):
    """Stage 3: on each process, one interval of each parameter. The last ones are padded with zeros."""

    needs = (
        "averaged_gradients",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "get_param_id",
        "grad_position",
        "offload_optimizer",
        "sub_group_to_group_id",
    )

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.offloaded = optimizer.offload_optimizer
        if self.offloaded:
            _check(optimizer, "norm_for_param_grads")

    def groups(self) -> list[list[Tensor]]:
        return [list(group) for group in self.optimizer.fp16_groups]

    def parameter_group(self, group: int) -> int:
        return int(self.optimizer.sub_group_to_group_id[group])

    def slot(self, names: tuple[str, ...], parameter: Any, group: int, number: int) -> GradientSlot:
        _check(parameter, "ds_numel", "ds_process_group", "ds_shape", "partition_numel")
        process_group = parameter.ds_process_group
        size = parameter.partition_numel()
        offset = torch.distributed.get_rank(process_group) * size
        length = min(size, parameter.ds_numel - offset)
        if length <= 0:
            return _ShardSlot(names, parameter, process_group)

        def local() -> Tensor:
            if self.offloaded:
                _, start, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                gradient: Tensor = self.optimizer.fp32_partitioned_groups_flat[group].grad
                return gradient.view(-1).narrow(0, start, length)
            part: Tensor = self.optimizer.averaged_gradients[group][number]
            if part.numel() != size:
                raise _unknown_layout(f"it holds {part.numel()} elements of the gradient of {names[0]}, not {size}")
            return part.view(-1).narrow(0, 0, length)

        return _ShardSlot(names, parameter, process_group, offset, local, self._update_norm(parameter))


# By name, and not by isinstance: subclasses (MiCS, ZenFlow, SuperOffload) keep gradients elsewhere.
_STORES: dict[str, type[_Store]] = {
    "FP16_Optimizer": _Stage0WithMasterWeights,
    "FP16_UnfusedOptimizer": _Stage0WithMasterWeights,
    "BF16_Optimizer": _BF16,
    "DeepSpeedZeroOptimizer": _Zero12,
    "DeepSpeedZeroOptimizer_Stage3": _Zero3,
}


def _store_of(optimizer: Any, stage: int) -> _Store:
    cls = type(optimizer)
    # The optimizers in `deepspeed.ops` are faster versions of torch's.
    if stage > 0 or (cls.__module__.startswith("deepspeed.") and not cls.__module__.startswith("deepspeed.ops.")):
        if cls.__name__ not in _STORES:
            raise UnsupportedGradientError(
                f"DeepSpeed's {cls.__name__} keeps gradients where they are not found: use ZeRO stage 0, 1, 2 or 3, "
                "without MiCS, ZenFlow and SuperOffload"
            )
        return _STORES[cls.__name__](optimizer)
    return _Stage0(optimizer)


def _widened(part: Tensor) -> Tensor:
    """Return a copy in float32, marked as padding if the part is."""
    wide = part.float()
    if getattr(part, "_zero_padding", False):
        wide._zero_padding = True  # type: ignore[attr-defined]
    return wide


def _check(owner: object, *names: str) -> None:
    if what := missing_attributes(owner, names):
        raise _unknown_layout(what)


def _unknown_layout(what: str) -> UnsupportedGradientError:
    return UnsupportedGradientError(
        f"DeepSpeed {version('deepspeed')} does not keep gradients as the tested releases do: {what}. Use "
        "one that lightning-znorm names in its extra `deepspeed`"
    )


# Attributes that tell which features are on, and when gradients are complete.
_ENGINE_NEEDS = (
    "autotp_size",
    "basic_optimizer",
    "fp16_enabled",
    "fp16_master_weights_and_gradients",
    "gradient_clipping",
    "has_moe_layers",
    "is_deepcompile_enabled",
    "is_gradient_accumulation_boundary",
    "managed_gradient_accumulation",
    "optimizer",
    "torch_autocast_z0_gradscaler",
    "zero_hpz_partition_size",
    "zero_offload_optimizer",
    "zero_offload_param",
    "zero_optimization_stage",
    "zero_quantized_gradients",
)


def _check_features(engine: Any) -> None:
    """Refuse features that keep gradients where they are not found, or that change them afterwards.

    Raises:
        UnsupportedGradientError: If such a feature is on.
    """

    # The tested releases have all of `_ENGINE_NEEDS`, and neither sparse gradients nor Apex any more.
    def setting(name: str) -> Any:
        value = getattr(engine, name, None)
        return value() if callable(value) else value

    stepping = type(engine.basic_optimizer).__name__
    offloads = [setting("zero_offload_optimizer"), setting("zero_offload_param")]
    scalers = [
        engine.torch_autocast_z0_gradscaler,
        getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    ]
    fp16 = setting("fp16_enabled")
    features = {
        f"the {type(engine).__name__}": type(engine).__name__ != "DeepSpeedEngine",
        "mixture-of-experts layers": setting("has_moe_layers"),
        "tensor parallelism": setting("autotp_size") > 1 or getattr(engine.optimizer, "model_parallel_group", None),
        "sparse gradients (`sparse_gradients`)": setting("sparse_gradients_enabled"),
        "ZeRO++ (`zero_hpz_partition_size`, `zero_quantized_gradients`)": setting("zero_hpz_partition_size") > 1
        or setting("zero_quantized_gradients"),
        "offloading to NVMe": any(getattr(offload, "device", None) == "nvme" for offload in offloads),
        f"the optimizer {stepping}, which makes its update of gradients before they are averaged": any(
            kind in stepping.lower() for kind in ("onebit", "zeroone", "muon")
        ),
        "DeepCompile": setting("is_deepcompile_enabled"),
        "`managed_gradient_accumulation=false`": not setting("managed_gradient_accumulation"),
        "Apex (`amp`)": setting("amp_enabled"),
        "`torch_autocast` in float16": any(scaler is not None for scaler in scalers),
        "float16 and ZeRO stage 0, where scaled z-scores would overflow (use stage 1, or bfloat16)": fp16
        and setting("zero_optimization_stage") == 0,
        "`fp16_master_weights_and_grads`, where scaled z-scores would overflow": setting(
            "fp16_master_weights_and_gradients"
        ),
    }
    for feature, is_on in features.items():
        if is_on:
            raise UnsupportedGradientError(
                f"gradients cannot be normalized under DeepSpeed with {feature}. Turn it off, or do without gradient "
                "callbacks"
            )
