"""Trains a small network under strategies that spread it over processes, and writes down its whole weights.

python training.py DIRECTORY SCENARIO [SCENARIO ...]

A strategy is added by adding scenarios, and, if weights are found in a way of its own, a function that gathers them.
"""

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import enable_wrap, wrap
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader

from lightning_znorm import GradientCentralizationCallback, GradientMonitor, SINGCallback, ZNormCallback

BATCH_SIZE = 4  # of each process
STEPS = 3  # of each run
LEARNING_RATE = 0.1
INIT_SCALE = 2.0**10  # the usual one overflows in float16, in which FSDP adds gradients up

Weights = dict[str, Tensor]

CALLBACKS = {"znorm": ZNormCallback, "centralization": GradientCentralizationCallback, "sing": SINGCallback}


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()


class Frozen(nn.Linear):
    """Does not train. A class of its own, because a flat parameter of FSDP trains as a whole or not at all."""

    def __init__(self) -> None:
        super().__init__(7, 7)
        self.requires_grad_(False)


class Network(nn.Module):
    """Sizes that processes cannot share evenly, but for those of `up` and `down`, which tensor parallelism needs even.

    No bias stands in front of the normalization.

    Args:
        gain_ndim: Number of dimensions of the parameter that is a single number.
        channels_last: Memory format of the convolution's weight.
    """

    def __init__(self, gain_ndim: int = 0, channels_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.ones((1,) * gain_ndim))
        self.conv = nn.Conv2d(3, 7, 3)
        if channels_last:
            self.conv.to(memory_format=torch.channels_last)
        self.up = nn.Linear(63, 8)
        self.down = nn.Linear(8, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.tied = Tied()
        self.frozen = Frozen()
        self.head = nn.Linear(7, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).tanh().flatten(1)
        x = self.norm(self.down(self.up(x).tanh()))
        return self.head(self.frozen(self.tied(x)).tanh()) * self.gain


@dataclass(frozen=True)
class Scenario:
    """What is special about a run.

    Attributes:
        kind: The row of the table of supported strategies (support.py) that this is an example of.
        strategy: Makes the Trainer's strategy for a number of processes and a kind of device.
        gather: Returns the whole weights by name, on every process.
        precision: The Trainer's.
        plugin: Makes the precision plugin for a kind of device, where the precision's name alone does not do on a CPU.
        device: Kind of device.
        computes_in: Type in which the forward and backward pass are computed, if not that of the weights.
        autocast: Whether that is autocast's doing, which leaves gradients in the weights' type, or the weights are cast
            and gradients averaged in that type too.
        processes: Number of processes.
        shares: Number of them with batches of their own; the others have the same as a neighbour.
        parallelize: Spreads the network over processes, in the module's `configure_model`.
        gain_ndim: See :class:`Network`.
        channels_last: See :class:`Network`.
        frozen: Parameters that do not train, besides those of :class:`Frozen`.
        flat_parameters: Whether the optimizer holds what the strategy has made of the parameters.
        accumulate: Number of batches in a step.
        fused: Whether SGD is.
        momentum: Of SGD.
        two_optimizers: Whether :class:`Tied` has one of its own, which skips every other step, and optimization is
            manual.
        callback: Which one of :data:`CALLBACKS`.
        options: Its arguments.
        monitored: Whether a GradientMonitor is there too, of which the record then keeps what it logs.
        leaves: Parameters that it leaves alone.
        overflowing_batch: Batch in which the last process' gradients, and no other's, become infinite.
        overflowing: Of which parameters: the one in the last shard, or all.
        saves: File to write a checkpoint to, after the run.
        resumes: Scenario whose checkpoint this goes on from.
    """

    kind: str
    strategy: Callable[[int, str], Any]
    gather: Callable[["Training"], Weights]
    precision: str = "32-true"
    plugin: Callable[[str], Any] | None = None
    device: str = "cpu"
    computes_in: torch.dtype | None = None
    autocast: bool = False
    processes: int = 2
    shares: int = 2
    parallelize: Callable[[Network, DeviceMesh], None] | None = None
    gain_ndim: int = 0
    channels_last: bool = False
    frozen: tuple[str, ...] = ()
    flat_parameters: bool = False
    accumulate: int = 1
    fused: bool = False
    momentum: float = 0.0
    two_optimizers: bool = False
    callback: Literal["znorm", "centralization", "sing"] = "znorm"
    options: dict[str, Any] = field(default_factory=dict)
    monitored: bool = False
    leaves: tuple[str, ...] = ()
    overflowing_batch: int | None = None
    overflowing: Literal["last parameter", "all parameters"] = "last parameter"
    saves: bool = False
    resumes: str | None = None

    def network(self) -> Network:
        network = Network(self.gain_ndim, self.channels_last)
        for name in self.frozen:
            network.get_parameter(name).requires_grad_(False)
        return network


# Where weights are


def whole_parameters(module: "Training") -> Weights:
    """The weights of plain tensors and DTensors."""
    named = module.network.named_parameters(remove_duplicate=False)
    return {name: (param.full_tensor() if isinstance(param, DTensor) else param) for name, param in named}


def fsdp1_weights(module: "Training") -> Weights:
    """The weights that FSDP1 gathers for a checkpoint, in the type in which it keeps them."""
    wrapper = module.trainer.model
    with FullyShardedDataParallel.state_dict_type(
        wrapper, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)
    ):
        state = wrapper.state_dict()
    return {name.removeprefix("network."): weight for name, weight in state.items()}


# Strategies


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning's, on CPUs, where it does not run as it is."""

    def setup_environment(self) -> None:
        mesh = self.kwargs.pop("device_mesh", None)
        super().setup_environment()
        if mesh is not None:  # which Lightning makes for CUDA devices
            self.kwargs["device_mesh"] = init_device_mesh("cpu", mesh)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with enable_wrap(
            wrapper_cls=FullyShardedDataParallel,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        ):
            yield

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model
        with self.model_sharded_context():
            return wrap(model)


def fsdp1(nested: bool = True, **kwargs: Any) -> Callable[[int, str], FSDPStrategy]:
    # Of the shards of the layer norm's flat parameter, one is the weight and one the bias.
    policy = {nn.Conv2d, nn.LayerNorm, Tied, Frozen} if nested else {Frozen}

    def make(processes: int, device: str) -> FSDPStrategy:
        cls = CPUFSDPStrategy if device == "cpu" else FSDPStrategy
        return cls(auto_wrap_policy=policy, **kwargs)

    return make


def sharded_scaler(device: str) -> FSDPPrecision:
    plugin = FSDPPrecision("16-mixed")
    plugin.scaler = ShardedGradScaler(device, init_scale=INIT_SCALE)  # its own is for CUDA devices
    return plugin


def scaler(device: str) -> MixedPrecision:
    return MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device, init_scale=INIT_SCALE))


def shard(network: Network, mesh: DeviceMesh, **kwargs: Any) -> None:
    """FSDP2."""
    for layer in (network.conv, network.norm, network.tied, network.frozen):
        fully_shard(layer, mesh=mesh, **kwargs)
    fully_shard(network, mesh=mesh, **kwargs)


def shard_some(network: Network, mesh: DeviceMesh) -> None:
    """FSDP2 for some layers. The other parameters are plain tensors, whose gradients no one averages."""
    for layer in (network.conv, network.norm, network.tied):
        fully_shard(layer, mesh=mesh["data_parallel"])


def tensor_parallel(network: Network, mesh: DeviceMesh) -> None:
    """Columns, rows and a norm that sees a part of the batch; the other parameters are plain tensors."""
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "tied": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True),
    }
    parallelize_module(network, mesh["tensor_parallel"], plan)


def both(network: Network, mesh: DeviceMesh) -> None:
    tensor_parallel(network, mesh)
    shard(network, mesh["data_parallel"])


def model_parallel(tensor: int = 1, **kwargs: Any) -> Callable[[int, str], ModelParallelStrategy]:
    """Tensor parallelism over this many processes, or all if they are fewer, and data parallelism over the rest."""

    def make(processes: int, device: str) -> ModelParallelStrategy:
        size = min(tensor, processes)
        return ModelParallelStrategy(processes // size, size, **kwargs)

    return make


# Scenarios

SINGLE = Scenario("single device", lambda *_: "auto", whole_parameters, processes=1, shares=1)
DDP = Scenario("DDP", lambda *_: "ddp", whole_parameters)
FSDP1 = Scenario("FSDP", fsdp1(), fsdp1_weights, gain_ndim=1)  # FSDP refuses a parameter of no dimension
FLAT = replace(FSDP1, strategy=fsdp1(use_orig_params=False), flat_parameters=True)
FSDP2 = Scenario(
    "FSDP2, TP",
    model_parallel(),
    whole_parameters,
    parallelize=lambda network, mesh: shard(network, mesh["data_parallel"]),
    gain_ndim=1,  # as FSDP1
)
TP = replace(FSDP2, strategy=model_parallel(2), parallelize=tensor_parallel, shares=1, gain_ndim=0)
TWO_D = replace(FSDP2, strategy=model_parallel(2), parallelize=both, processes=4)

AUTOCAST_BF16: dict[str, Any] = {"precision": "bf16-mixed", "computes_in": torch.bfloat16, "autocast": True}
AUTOCAST_FP16: dict[str, Any] = {
    "precision": "16-mixed", "plugin": scaler, "computes_in": torch.float16, "autocast": True
}  # fmt: skip
CAST_BF16: dict[str, Any] = {"precision": "bf16-mixed", "computes_in": torch.bfloat16}
CAST_FP16: dict[str, Any] = {"precision": "16-mixed", "plugin": sharded_scaler, "computes_in": torch.float16}
TRUE_BF16: dict[str, Any] = {"precision": "bf16-true"}
TRUE_FP16: dict[str, Any] = {"precision": "16-true"}
FLOAT64: dict[str, Any] = {"precision": "64-true"}

NOT_MATRICES = ("gain", "conv.bias", "up.bias", "norm.weight", "norm.bias", "tied.first.bias", "tied.second.bias", "head.bias")  # fmt: skip # noqa: E501
TIED = ("tied.first.weight", "tied.first.bias", "tied.second.weight", "tied.second.bias")
CHOICES: dict[str, dict[str, Any]] = {
    "min_ndim": {"options": {"min_ndim": 2}, "leaves": NOT_MATRICES},
    # A shared weight is excluded by either of its names.
    "exclude": {"options": {"exclude": ["network.tied.second.*", "*.conv.bias"]},
                "leaves": ("tied.first.weight", "tied.second.weight", "tied.second.bias", "conv.bias")},
    "include": {"options": {"include": ["network.tied.*"]},
                "leaves": tuple(name for name, _ in Network().named_parameters() if name not in TIED)},
}  # fmt: skip
CENTRALIZATION: dict[str, Any] = {"callback": "centralization"}


def by_precision(base: Scenario, name: str, *settings: dict[str, Any], fused: bool = True) -> dict[str, Scenario]:
    """A scenario for each precision, and with the fused optimizer, plain and under a scaler."""
    made = {f"{name}-{setting.get('precision', '32-true')}": replace(base, **setting) for setting in settings}
    if fused:
        made |= {
            f"{key}-fused": replace(own, fused=True)
            for key, own in made.items()
            if own.precision in ("32-true", "16-mixed")
        }
    return made


def resumed(base: Scenario, name: str, *sizes: int, shares: int | None = None) -> dict[str, Scenario]:
    """A run with momentum, and runs that go on from its checkpoint with other numbers of processes."""
    base = replace(base, momentum=0.9)
    made = {f"{name}-save": replace(base, saves=True)}
    for size in sizes:
        made[f"{name}-resume-{size}"] = replace(
            base,
            processes=size,
            shares=shares or max(1, size * base.shares // base.processes),
            resumes=f"{name}-save",
        )
    return made


def in_one_file(base: Scenario, tensor: int = 1) -> Scenario:
    """With checkpoints that the first process writes."""
    return replace(base, strategy=model_parallel(tensor, save_distributed_checkpoint=False))


SCENARIOS: dict[str, Scenario] = {
    **by_precision(SINGLE, "single", {}, FLOAT64, AUTOCAST_BF16, TRUE_BF16, AUTOCAST_FP16, TRUE_FP16),
    **by_precision(DDP, "ddp", {}, FLOAT64, AUTOCAST_BF16, TRUE_BF16, AUTOCAST_FP16, TRUE_FP16),
    "ddp-overflow": replace(DDP, **AUTOCAST_FP16, overflowing_batch=1),
    # FSDP1 with the parameters as they are, which is Lightning's default
    **by_precision(FSDP1, "fsdp", {}, CAST_BF16, TRUE_BF16, CAST_FP16, TRUE_FP16),
    # An inf in one process' batch, in the second of three steps.
    "fsdp-overflow": replace(FSDP1, **CAST_FP16, overflowing_batch=1),
    "fsdp-overflow-fused": replace(FSDP1, **CAST_FP16, overflowing_batch=1, fused=True),
    "fsdp-overflow-of_all-fused": replace(
        FSDP1, **CAST_FP16, overflowing_batch=1, fused=True, overflowing="all parameters"
    ),
    "fsdp-overflow-accumulate": replace(FSDP1, **CAST_FP16, overflowing_batch=5, accumulate=4),
    "fsdp-min_ndim": replace(FSDP1, **CHOICES["min_ndim"]),
    "fsdp-exclude": replace(FSDP1, **CHOICES["exclude"]),
    "fsdp-accumulate": replace(FSDP1, accumulate=4),
    "fsdp-bf16-mixed-accumulate": replace(FSDP1, **CAST_BF16, accumulate=4),
    "fsdp-16-mixed-accumulate": replace(FSDP1, **CAST_FP16, accumulate=4),
    "fsdp-one_flat_parameter": replace(FSDP1, strategy=fsdp1(nested=False)),
    "fsdp-channels_last": replace(FSDP1, channels_last=True),
    "fsdp-centralization": replace(FSDP1, **CENTRALIZATION),
    "fsdp-centralization-one_flat_parameter": replace(FSDP1, strategy=fsdp1(nested=False), **CENTRALIZATION),
    "fsdp-centralization-channels_last": replace(FSDP1, channels_last=True, **CENTRALIZATION),
    "fsdp-shard_grad_op": replace(FSDP1, strategy=fsdp1(sharding_strategy="SHARD_GRAD_OP")),
    "fsdp-no_shard": replace(FSDP1, strategy=fsdp1(sharding_strategy="NO_SHARD")),
    "fsdp-no_shard-centralization": replace(FSDP1, strategy=fsdp1(sharding_strategy="NO_SHARD"), **CENTRALIZATION),
    "fsdp-no_shard-overflow": replace(
        FSDP1, strategy=fsdp1(sharding_strategy="NO_SHARD"), **CAST_FP16, overflowing_batch=1
    ),
    "fsdp-no_shard-overflow-fused": replace(
        FSDP1, strategy=fsdp1(sharding_strategy="NO_SHARD"), **CAST_FP16, overflowing_batch=1, fused=True
    ),
    # FSDP1 with flat parameters
    **by_precision(FLAT, "fsdp-flat", {}, CAST_BF16, TRUE_BF16, CAST_FP16, TRUE_FP16),
    "fsdp-flat-overflow": replace(FLAT, **CAST_FP16, overflowing_batch=1),
    "fsdp-flat-overflow-of_all-fused": replace(
        FLAT, **CAST_FP16, overflowing_batch=1, fused=True, overflowing="all parameters"
    ),
    **{f"fsdp-flat-{name}": replace(FLAT, **choice) for name, choice in CHOICES.items()},
    "fsdp-flat-accumulate": replace(FLAT, accumulate=4),
    "fsdp-flat-one_flat_parameter": replace(FLAT, strategy=fsdp1(nested=False, use_orig_params=False)),
    "fsdp-flat-channels_last": replace(FLAT, channels_last=True),
    "fsdp-flat-centralization": replace(FLAT, **CENTRALIZATION),
    "fsdp-flat-centralization-channels_last": replace(FLAT, channels_last=True, **CENTRALIZATION),
    "fsdp-flat-shard_grad_op": replace(FLAT, strategy=fsdp1(sharding_strategy="SHARD_GRAD_OP", use_orig_params=False)),
    "fsdp-flat-no_shard": replace(FLAT, strategy=fsdp1(sharding_strategy="NO_SHARD", use_orig_params=False)),
    "fsdp-flat-no_shard-centralization": replace(
        FLAT, strategy=fsdp1(sharding_strategy="NO_SHARD", use_orig_params=False), **CENTRALIZATION
    ),
    # FSDP1, sharded over two processes and replicated over two
    **{
        f"fsdp-{name}-{shards}": replace(
            base,
            strategy=fsdp1(sharding_strategy=shards, device_mesh=(2, 2), use_orig_params=not base.flat_parameters),
            processes=4,
            shares=4,
            **setting,
        )
        for name, base, setting, shards in [
            ("hybrid", FSDP1, {}, "HYBRID_SHARD"),
            ("hybrid", FSDP1, {}, "_HYBRID_SHARD_ZERO2"),
            ("hybrid-bf16-mixed", FSDP1, CAST_BF16, "HYBRID_SHARD"),
            ("hybrid-centralization", FSDP1, CENTRALIZATION, "HYBRID_SHARD"),
            ("hybrid-overflow", FSDP1, CAST_FP16 | {"overflowing_batch": 1, "fused": True}, "HYBRID_SHARD"),
            ("hybrid-overflow", FSDP1, CAST_FP16 | {"overflowing_batch": 1, "fused": True}, "_HYBRID_SHARD_ZERO2"),
            ("hybrid-flat", FLAT, {"accumulate": 4}, "HYBRID_SHARD"),
        ]
    },
    "fsdp-four": replace(FSDP1, processes=4, shares=4),
    # Several optimizers
    **{
        f"{name}-two_optimizers": replace(base, two_optimizers=True)
        for name, base in [
            ("ddp", DDP),
            ("fsdp", FSDP1),
            ("fsdp-16-mixed", replace(FSDP1, **CAST_FP16)),
            ("fsdp-16-mixed-fused", replace(FSDP1, **CAST_FP16, fused=True)),
            ("fsdp-flat", FLAT),
            ("fsdp2", FSDP2),
            ("tp", TP),
            ("fsdp2-tp", TWO_D),
        ]
    },
    # FSDP2 and tensor parallelism; DTensors have no fused SGD
    **by_precision(FSDP2, "fsdp2", {}, AUTOCAST_BF16, TRUE_BF16, TRUE_FP16, fused=False),
    "fsdp2-include": replace(FSDP2, **CHOICES["include"]),
    "fsdp2-accumulate": replace(FSDP2, accumulate=4),
    "fsdp2-bf16-mixed-accumulate": replace(FSDP2, **AUTOCAST_BF16, accumulate=4),
    "fsdp2-centralization": replace(FSDP2, **CENTRALIZATION),
    "fsdp2-mixed_precision_policy": replace(
        FSDP2,
        computes_in=torch.bfloat16,
        parallelize=lambda network, mesh: shard(
            network, mesh["data_parallel"], mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
        ),
    ),
    "fsdp2-some_layers": replace(
        FSDP2,
        parallelize=shard_some,
        frozen=("gain", "up.weight", "up.bias", "down.weight", "head.weight", "head.bias"),
    ),
    "fsdp2-hybrid": replace(
        FSDP2, strategy=model_parallel(2), parallelize=shard, processes=4, shares=4
    ),
    "fsdp2-hybrid-centralization": replace(
        FSDP2, strategy=model_parallel(2), parallelize=shard, processes=4, shares=4, **CENTRALIZATION
    ),
    "fsdp2-four": replace(FSDP2, processes=4, shares=4),
    **by_precision(TP, "tp", {}, AUTOCAST_BF16, TRUE_BF16, TRUE_FP16, fused=False),
    "tp-min_ndim": replace(TP, **CHOICES["min_ndim"]),
    "tp-accumulate": replace(TP, accumulate=4),
    "tp-centralization": replace(TP, **CENTRALIZATION),
    **by_precision(TWO_D, "fsdp2-tp", {}, AUTOCAST_BF16, fused=False),
    "fsdp2-tp-accumulate": replace(TWO_D, accumulate=4),
    "fsdp2-tp-centralization": replace(TWO_D, **CENTRALIZATION),
    "fsdp2-tp-exclude": replace(TWO_D, **CHOICES["exclude"]),
    # SING
    **{
        f"{name}-sing": replace(base, callback="sing")
        for name, base in {
            "ddp": DDP,
            "fsdp": FSDP1,
            "fsdp-channels_last": replace(FSDP1, channels_last=True),
            "fsdp-one_flat_parameter": replace(FSDP1, strategy=fsdp1(nested=False)),
            "fsdp2": FSDP2,
            "tp": TP,
            "fsdp2-tp": TWO_D,
        }.items()
    },
    # GradientMonitor
    "ddp-monitored": replace(DDP, monitored=True),
    "fsdp-monitored": replace(FSDP1, monitored=True),
    "fsdp-16-mixed-monitored": replace(FSDP1, **CAST_FP16, fused=True, overflowing_batch=1, monitored=True),
    "fsdp-flat-monitored": replace(FLAT, monitored=True),
    "fsdp2-monitored": replace(FSDP2, monitored=True),
    "fsdp2-tp-monitored": replace(TWO_D, monitored=True),
    # Checkpoints
    **resumed(DDP, "checkpoint-ddp", 2, 4),
    **resumed(FSDP1, "checkpoint-fsdp", 2, 4, 1),
    **resumed(replace(FSDP1, strategy=fsdp1(state_dict_type="sharded")), "checkpoint-fsdp-sharded", 2, 4),
    # Lightning cannot write a full checkpoint of these.
    **resumed(
        replace(FLAT, strategy=fsdp1(state_dict_type="sharded", use_orig_params=False)), "checkpoint-fsdp-flat", 2, 4
    ),
    **resumed(FSDP2, "checkpoint-fsdp2", 2, 4),
    **resumed(in_one_file(FSDP2), "checkpoint-fsdp2-full", 2, 4),
    **resumed(TP, "checkpoint-tp", 2, 1),
    **resumed(in_one_file(TP, 2), "checkpoint-tp-full", 2, 1),
    **resumed(replace(TP, strategy=model_parallel(4)), "checkpoint-tp-wider", 4, shares=1),
    **resumed(TWO_D, "checkpoint-fsdp2-tp", 4, 1),
    **resumed(in_one_file(TWO_D, 2), "checkpoint-fsdp2-tp-full", 4, 1),
    **resumed(replace(TWO_D, processes=2, shares=1), "checkpoint-fsdp2-tp-wider", 4),
}  # fmt: skip


def alone(device: str, *names: str) -> dict[str, Scenario]:
    """What a single process makes of scenarios on its device."""
    return {f"{device}-{name}": replace(SCENARIOS[name], device=device, processes=1, shares=1) for name in names}


# FSDP1 does not shard what is a single process'. PyTorch then fails to accumulate gradients of another type than that
# of the weights, and gives those of weights that are channels-last in a wrong order.
ON_CUDA = alone(
    "cuda",
    *(
        name
        for name, own in SCENARIOS.items()
        if own.processes <= 2
        and not name.startswith("checkpoint")
        and not (own.kind == "FSDP" and (own.channels_last or (own.computes_in is not None and own.accumulate > 1)))
    ),
)
# Which needs a GPU to be moved from.
ON_CUDA |= {
    f"{name}-cpu_offload": replace(ON_CUDA[name], strategy=fsdp1(cpu_offload=True, use_orig_params="flat" not in name))
    for name in ("cuda-fsdp-32-true", "cuda-fsdp-flat-32-true", "cuda-fsdp-bf16-mixed")
}
# A GPU's scenarios, on a CPU.
SCENARIOS |= alone("cpu", "ddp-16-mixed-fused", "fsdp-32-true", "fsdp-flat-16-mixed", "fsdp2-bf16-mixed", "tp-32-true")


def batch_of(scenario: Scenario, number: int, share: int) -> tuple[Tensor, Tensor]:
    """The images and labels of one batch."""
    generator = torch.Generator().manual_seed(number * 4 + share)
    dtype = torch.float64 if scenario.precision == "64-true" else torch.float32
    images = torch.randn(BATCH_SIZE, 3, 5, 5, generator=generator, dtype=dtype)
    return images, torch.randint(5, (BATCH_SIZE,), generator=generator)


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = network(images.to(network.gain.dtype))
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


class Training(LightningModule):
    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        self.scenario = scenario
        self.automatic_optimization = not scenario.two_optimizers
        self.network = self.scenario.network()
        self.weights: list[Weights] = []
        self.scales: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.infinite: list[bool] = []

    def configure_model(self) -> None:
        if self.scenario.parallelize is not None:
            self.scenario.parallelize(self.network, self.device_mesh)
        elif not self.automatic_optimization:
            # Where Lightning wraps this module, FSDP cannot take a backward pass in the midst of its forward pass.
            self.network = wrap(self.network)

    def training_step(self, number: Tensor) -> Tensor:
        scenario = self.scenario
        batch = self.current_epoch * STEPS * scenario.accumulate + int(number)
        share = self.global_rank * scenario.shares // scenario.processes
        images, labels = (tensor.to(self.trainer.strategy.root_device) for tensor in batch_of(scenario, batch, share))
        loss = loss_of(self.network, images, labels)
        if batch == scenario.overflowing_batch and self.global_rank == scenario.processes - 1:
            if scenario.overflowing == "all parameters":
                return loss * 1e38
            loss = loss + 1e38 * self.network.head.bias.float().sum()
        if scenario.two_optimizers:
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            if batch % 2 == 1:
                second.step()
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        scenario = self.scenario
        module = self.trainer.model if scenario.flat_parameters else self
        tied = list(self.network.tied.parameters()) if scenario.two_optimizers else []
        parts = [[param for param in module.parameters() if param not in set(tied)], tied]
        return [
            torch.optim.SGD(part, LEARNING_RATE, momentum=scenario.momentum, fused=scenario.fused)
            for part in parts
            if part
        ]

    def on_after_backward(self) -> None:
        grads = [param.grad for param in self.trainer.model.parameters() if param.grad is not None]
        locals_ = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        self.infinite.append(not all(local.isfinite().all() for local in locals_))

    def on_train_start(self) -> None:
        self.write_down()

    def on_train_batch_end(self, *_: Any) -> None:
        self.write_down()

    def write_down(self) -> None:
        self.weights.append({key: weight.detach().cpu().clone() for key, weight in self.scenario.gather(self).items()})
        own_scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.scales.append(1.0 if own_scaler is None else own_scaler.get_scale())
        self.metrics.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


def train(name: str, directory: Path, with_callback: bool = True) -> None:
    """Trains in one scenario, and writes what each process has seen into a file."""
    scenario = (SCENARIOS | ON_CUDA)[name]
    untested = scenario.kind == "FSDP"
    callbacks: list[Callback] = [CALLBACKS[scenario.callback](allow_untested_strategy=untested, **scenario.options)]
    if scenario.monitored:
        callbacks.append(GradientMonitor(per_parameter=True, allow_untested_strategy=untested))
    module = Training(scenario)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(
            accelerator=scenario.device,
            devices=scenario.processes,
            strategy=scenario.strategy(scenario.processes, scenario.device),
            precision=scenario.precision if scenario.plugin is None else None,
            plugins=None if scenario.plugin is None else [scenario.plugin(scenario.device)],
            accumulate_grad_batches=scenario.accumulate,
            use_distributed_sampler=False,  # each process gets all numbers of batches, and makes its own images
            max_epochs=1 if scenario.resumes is None else 2,
            callbacks=callbacks if with_callback else [],
            log_every_n_steps=1,
            default_root_dir=directory / name,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        checkpoint = None if scenario.resumes is None else directory / f"{scenario.resumes}.ckpt"
        trainer.fit(module, DataLoader(range(STEPS * scenario.accumulate)), ckpt_path=checkpoint)
        if scenario.saves:
            trainer.save_checkpoint(directory / f"{name}.ckpt")
    record = {key: getattr(module, key) for key in ("weights", "scales", "infinite", "metrics")}
    record["warnings"] = [str(warning.message) for warning in caught]
    suffix = "" if with_callback else "-without_callback"
    torch.save(record, directory / f"{name}{suffix}-{trainer.global_rank}.pt")


def main(directory: str, names: Sequence[str]) -> None:
    torch.backends.cudnn.allow_tf32 = False  # the reference has more digits
    for name in names:
        try:
            train(name.removesuffix("-without_callback"), Path(directory), not name.endswith("-without_callback"))
        except Exception:
            if name not in ON_CUDA:
                raise
            # Nobody waits for a process that is alone.
            torch.save({"error": traceback.format_exc()}, Path(directory) / f"{name}-0.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
