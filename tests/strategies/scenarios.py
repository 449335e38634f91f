"""All training runs under strategies that use several processes, or one: what is special about each, and its tier.

A new strategy is a line of :data:`STRATEGIES`, and a function that gathers its weights if they are found in a way of
its own (strategies.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.dtypes import fused_sgd_is_right
from tests.fsdp import FSDP1_GATHERS_STATE_ON_CPU, FSDP2_RUNS_ON_CPU
from tests.strategies.network import Network
from tests.strategies.strategies import (
    MakeStrategy,
    Weights,
    both,
    ddp,
    deepspeed,
    deepspeed_weights,
    fsdp1,
    fsdp1_weights,
    model_parallel,
    scaler,
    shard,
    shard_data_parallel,
    shard_some,
    sharded_scaler,
    tensor_parallel,
    whole_parameters,
)

Optimizer = Literal["SGD", "fused", "momentum", "manual", "manual fused"]


@dataclass(frozen=True)
class Scenario:
    """What is special about a run.

    Attributes:
        kind: Row of the table of supported strategies (support.py).
        strategy: Makes the Trainer's strategy.
        gather: Returns the whole weights by name, on every process.
        precision: The Trainer's precision.
        plugin: Makes the precision plugin for a kind of device, where the precision's name does not do on a CPU.
        device: Kind of device.
        computes_in: Type of the forward and backward pass, if not that of the weights.
        autocast: Whether autocast casts, so that gradients have the weights' type. If not, the weights are cast, and
            gradients are averaged in that type too.
        shows_gradients: Whether the reference starts from the averaged gradients that the callback saw, because the
            strategy rounds them in an order of its own.
        steps_in: Type in which the strategy keeps what the callback made of the gradients.
        processes: Number of processes.
        shares: Number of processes with batches of their own. The others have the same batches as a neighbour.
        parallelize: Spreads the network over processes, in the module's ``configure_model``.
        network: Arguments of :class:`Network`.
        frozen: Parameters that do not train, besides those of :class:`Frozen`.
        flat_parameters: Whether the optimizer holds what the strategy has made of the parameters.
        accumulate: Number of batches in a step.
        divides_twice: Whether Lightning and the strategy both divide gradients by ``accumulate``.
        optimizer: ``"SGD"``; ``"fused"``; ``"momentum"``: with momentum, and a group of parameters with another
            learning rate; ``"manual"``: manual optimization, with a second optimizer that skips every other step;
            ``"manual fused"``: both of them fused.
        one_optimizer: Whether the strategy takes one optimizer only, under manual optimization too.
        clip: Norm to which gradients are clipped, after the callback.
        callback: Which one of training.py's ``CALLBACKS``.
        options: Its arguments.
        leaves: Parameters that it leaves alone.
        monitored: Whether there is a GradientMonitor, whose metrics are recorded.
        overflowing_batch: Batch in which gradients of the last process, and of no other, become infinite.
        overflowing: Which gradients: that of the last parameter, or all.
        epochs: Number of epochs, of a run from the beginning. One that resumes trains for one more.
        saves: Whether a checkpoint is saved after the run.
        resumes: Scenario from whose checkpoint this one goes on.
        without_callback: Whether it goes on without the callback.
        refused: Pattern of the error that ends the run before its first step.
    """

    kind: str
    strategy: MakeStrategy
    gather: Callable[[LightningModule], Weights]
    precision: str = "32-true"
    plugin: Callable[[str], Any] | None = None
    device: str = "cpu"
    computes_in: torch.dtype | None = None
    autocast: bool = False
    shows_gradients: bool = False
    steps_in: torch.dtype = torch.float32
    processes: int = 2
    shares: int = 2
    parallelize: Callable[[Network, DeviceMesh], None] | None = None
    network: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    flat_parameters: bool = False
    accumulate: int = 1
    divides_twice: bool = False
    optimizer: Optimizer = "SGD"
    one_optimizer: bool = False
    clip: float | None = None
    callback: Literal["znorm", "adaptive", "centralization", "sing"] = "znorm"
    options: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    monitored: bool = False
    overflowing_batch: int | None = None
    overflowing: Literal["last parameter", "all parameters"] = "last parameter"
    epochs: int = 1
    saves: bool = False
    resumes: str | None = None
    without_callback: bool = False
    refused: str | None = None

    def make_network(self) -> Network:
        network = Network(**self.network)
        for name in self.frozen:
            network.get_parameter(name).requires_grad_(False)
        return network

    @property
    def is_manual(self) -> bool:
        return self.optimizer.startswith("manual")

    @property
    def is_fused(self) -> bool:
        return self.optimizer.endswith("fused")

    @property
    def weight_type(self) -> torch.dtype:
        """Type of the weights that the optimizer steps."""
        types = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
        return torch.float32 if self.kind == "DeepSpeed" else types.get(self.precision, torch.float32)


# The axes of the product: strategies, precisions, accumulation and optimizers

SINGLE = Scenario("single device", lambda *_: "auto", whole_parameters, processes=1, shares=1)
DDP = Scenario("DDP", ddp(), whole_parameters)
FSDP1 = Scenario("FSDP", fsdp1(), fsdp1_weights, network={"gain_ndim": 1})  # FSDP refuses parameters of no dimension
FLAT = replace(FSDP1, strategy=fsdp1(use_orig_params=False), flat_parameters=True)
FSDP2 = Scenario(
    "FSDP2, TP", model_parallel(), whole_parameters, parallelize=shard_data_parallel, network={"gain_ndim": 1}
)
TP = replace(FSDP2, strategy=model_parallel(2), parallelize=tensor_parallel, shares=1, network={})
TWO_D = replace(FSDP2, strategy=model_parallel(2), parallelize=both, processes=4)


def zero(stage: int, **kwargs: Any) -> Scenario:
    """A scenario of DeepSpeed at a ZeRO stage."""
    return Scenario(
        "DeepSpeed",
        deepspeed(stage, **kwargs),
        deepspeed_weights,
        network={"gain_ndim": 1, "unused": True},
        divides_twice=True,
        one_optimizer=True,
    )


STRATEGIES: dict[str, Scenario] = {
    "single": SINGLE,
    "ddp": DDP,
    "fsdp": FSDP1,  # with the parameters as they are, which is Lightning's default
    "fsdp-flat": FLAT,
    "fsdp2": FSDP2,
    "tp": TP,
    "fsdp2-tp": TWO_D,
    **{f"zero{stage}": zero(stage) for stage in range(4)},
}

AUTOCAST_BF16: dict[str, Any] = {"precision": "bf16-mixed", "computes_in": torch.bfloat16, "autocast": True}
AUTOCAST_FP16: dict[str, Any] = {
    "precision": "16-mixed", "plugin": scaler, "computes_in": torch.float16, "autocast": True
}  # fmt: skip
CAST_BF16: dict[str, Any] = {"precision": "bf16-mixed", "computes_in": torch.bfloat16}
CAST_FP16: dict[str, Any] = {"precision": "16-mixed", "plugin": sharded_scaler, "computes_in": torch.float16}
TRUE_BF16: dict[str, Any] = {"precision": "bf16-true"}
TRUE_FP16: dict[str, Any] = {"precision": "16-true"}
FLOAT64: dict[str, Any] = {"precision": "64-true"}
# For DeepSpeed, mixed precision differs from true half precision in the weights that it starts with alone.
ZERO_BF16: dict[str, Any] = {"computes_in": torch.bfloat16, "shows_gradients": True, "steps_in": torch.bfloat16}
ZERO_FP16: dict[str, Any] = {"computes_in": torch.float16, "shows_gradients": True}  # widened for the loss scale
FP16_CONFIG: dict[str, Any] = {"fp16": {"enabled": True, "loss_scale": 128.0}}
FP32_GRADIENTS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}


def precisions(name: str) -> list[dict[str, Any]]:
    """Return what each precision changes of a strategy's scenario."""
    if name in ("single", "ddp"):
        return [{}, FLOAT64, TRUE_BF16, TRUE_FP16, AUTOCAST_BF16, AUTOCAST_FP16]
    if name in ("fsdp", "fsdp-flat"):
        return [{}, TRUE_BF16, TRUE_FP16, CAST_BF16, CAST_FP16]
    if name.startswith("zero"):
        half = [{"precision": f"bf16-{kind}", **ZERO_BF16} for kind in ("true", "mixed")]
        if name == "zero0":  # where the callback refuses float16
            return [{}, *half]
        stage = deepspeed(int(name[-1]), config=FP16_CONFIG)
        return [{}, *half, *({"precision": f"16-{kind}", "strategy": stage, **ZERO_FP16} for kind in ("true", "mixed"))]
    return [{}, TRUE_BF16, TRUE_FP16, AUTOCAST_BF16]


def optimizers(scenario: Scenario) -> list[Optimizer]:
    """Return the optimizers that a scenario can have."""
    found: list[Optimizer] = ["SGD", "momentum"]
    if scenario.parallelize is None:  # DTensors have no fused SGD
        found.append("fused")
    if scenario.accumulate == 1:  # with more, manual optimization is refused
        found.append("manual")
    return found


Row = tuple[str, str, int, str]


def full_product() -> dict[Row, Scenario]:
    """Return the scenario of each strategy, precision, number of accumulated batches and optimizer that go together."""
    rows: dict[Row, Scenario] = {}
    for (name, base), accumulate in product(STRATEGIES.items(), (1, 4)):
        for changes in precisions(name):
            scenario = replace(base, accumulate=accumulate, **changes)
            for optimizer in optimizers(scenario):
                rows[name, scenario.precision, accumulate, optimizer] = replace(scenario, optimizer=optimizer)
    return rows


def name_of(row: Row) -> str:
    name, precision, accumulate, optimizer = row
    return f"{name}-{precision}{'-accumulate' if accumulate > 1 else ''}{'' if optimizer == 'SGD' else '-' + optimizer}"


def pairs(row: Sequence[Any]) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    """Return all pairs of values of a row, each with its column."""
    return set(combinations(enumerate(row), 2))


def pairwise(rows: Iterable[Row]) -> list[Row]:
    """Return a subset of the rows that has every pair of values which the rows have, chosen greedily."""
    left = list(rows)
    missing = set[Any]().union(*map(pairs, left))
    chosen = []
    while missing:
        best = max(left, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


PRODUCT = full_product()
PAIRWISE = pairwise(PRODUCT)
OF_PRODUCT = {name_of(row): scenario for row, scenario in PRODUCT.items()}

# Other scenarios

NOT_MATRICES = (
    "gain",
    "conv.bias",
    "up.bias",
    "norm.weight",
    "norm.bias",
    "tied.first.bias",
    "tied.second.bias",
    "head.bias",
)
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
CHANNELS_LAST: dict[str, Any] = {"network": {"gain_ndim": 1, "channels_last": True}}
FUSED: dict[str, Any] = {"optimizer": "fused"}

# Strides of gradients differ from those of DDP's buckets.
STRIDED: dict[str, Any] = {"channels_last": True}
PARTLY_USED: dict[str, Any] = {**STRIDED, "unused": True, "partly_used": True}
OF_DDP = {
    "ddp-channels_last": replace(DDP, precision="64-true", network=STRIDED),
    "ddp-centralization": replace(DDP, **CENTRALIZATION),
    "ddp-clip": replace(DDP, clip=0.5),
    "ddp-overflow": replace(DDP, **AUTOCAST_FP16, overflowing_batch=1),
    "ddp-overflow-fused": replace(DDP, **AUTOCAST_FP16, **FUSED, network=STRIDED, overflowing_batch=1),
    "ddp-overflow-of_all-fused": replace(
        DDP, **AUTOCAST_FP16, **FUSED, overflowing_batch=1, overflowing="all parameters"
    ),
    # With two optimizers, each would change the loss scale.
    "ddp-overflow-manual": replace(DDP, **AUTOCAST_FP16, optimizer="manual", one_optimizer=True, overflowing_batch=1),
    "ddp-overflow-accumulate": replace(DDP, **AUTOCAST_FP16, network=STRIDED, overflowing_batch=2, accumulate=2),
    # Gradients are views of the buckets that DDP averages.
    **{
        f"ddp-{name}": replace(DDP, strategy=ddp(**options), precision="64-true", **{"network": STRIDED, **changes})
        for name, options, changes in [
            ("bucket_view", {"gradient_as_bucket_view": True}, {}),
            ("bucket_view-accumulate", {"gradient_as_bucket_view": True}, {"accumulate": 2}),
            ("static_graph", {"static_graph": True}, {}),
            ("static_graph-bucket_view", {"static_graph": True, "gradient_as_bucket_view": True}, {}),
            ("small_buckets", {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}, {}),
            *(
                (f"find_unused{suffix}", {"find_unused_parameters": True, **options}, changes)
                for suffix, options, changes in [
                    ("", {}, {"network": PARTLY_USED}),
                    ("-accumulate", {}, {"network": PARTLY_USED, "accumulate": 2}),
                    ("-bucket_view", {"gradient_as_bucket_view": True}, {"network": PARTLY_USED}),
                ]
            ),
        ]
    },
    "ddp-bucket_view-overflow": replace(
        DDP, strategy=ddp(gradient_as_bucket_view=True), **AUTOCAST_FP16, network=STRIDED, overflowing_batch=1
    ),
}

OF_FSDP1 = {
    # An inf in one process' batch, in the second of three steps.
    "fsdp-overflow": replace(FSDP1, **CAST_FP16, overflowing_batch=1),
    "fsdp-overflow-fused": replace(FSDP1, **CAST_FP16, **FUSED, overflowing_batch=1),
    "fsdp-overflow-of_all-fused": replace(
        FSDP1, **CAST_FP16, **FUSED, overflowing_batch=1, overflowing="all parameters"
    ),
    "fsdp-overflow-accumulate": replace(FSDP1, **CAST_FP16, overflowing_batch=5, accumulate=4),
    "fsdp-min_ndim": replace(FSDP1, **CHOICES["min_ndim"]),
    "fsdp-exclude": replace(FSDP1, **CHOICES["exclude"]),
    "fsdp-one_flat_parameter": replace(FSDP1, strategy=fsdp1(nested=False)),
    "fsdp-channels_last": replace(FSDP1, **CHANNELS_LAST),
    "fsdp-centralization": replace(FSDP1, **CENTRALIZATION),
    "fsdp-centralization-one_flat_parameter": replace(FSDP1, strategy=fsdp1(nested=False), **CENTRALIZATION),
    "fsdp-centralization-channels_last": replace(FSDP1, **CHANNELS_LAST, **CENTRALIZATION),
    "fsdp-shard_grad_op": replace(FSDP1, strategy=fsdp1(sharding_strategy="SHARD_GRAD_OP")),
    **{
        f"fsdp-no_shard{suffix}": replace(FSDP1, strategy=fsdp1(sharding_strategy="NO_SHARD"), **changes)
        for suffix, changes in {
            "": {},
            "-centralization": CENTRALIZATION,
            "-overflow": {**CAST_FP16, "overflowing_batch": 1},
            "-overflow-fused": {**CAST_FP16, **FUSED, "overflowing_batch": 1},
        }.items()
    },
    # With flat parameters
    "fsdp-flat-overflow": replace(FLAT, **CAST_FP16, overflowing_batch=1),
    "fsdp-flat-overflow-of_all-fused": replace(
        FLAT, **CAST_FP16, **FUSED, overflowing_batch=1, overflowing="all parameters"
    ),
    **{f"fsdp-flat-{name}": replace(FLAT, **choice) for name, choice in CHOICES.items()},
    "fsdp-flat-one_flat_parameter": replace(FLAT, strategy=fsdp1(nested=False, use_orig_params=False)),
    "fsdp-flat-channels_last": replace(FLAT, **CHANNELS_LAST),
    "fsdp-flat-centralization": replace(FLAT, **CENTRALIZATION),
    "fsdp-flat-centralization-channels_last": replace(FLAT, **CHANNELS_LAST, **CENTRALIZATION),
    "fsdp-flat-shard_grad_op": replace(FLAT, strategy=fsdp1(sharding_strategy="SHARD_GRAD_OP", use_orig_params=False)),
    "fsdp-flat-no_shard": replace(FLAT, strategy=fsdp1(sharding_strategy="NO_SHARD", use_orig_params=False)),
    "fsdp-flat-no_shard-centralization": replace(
        FLAT, strategy=fsdp1(sharding_strategy="NO_SHARD", use_orig_params=False), **CENTRALIZATION
    ),
    # Sharded over two processes and replicated over two
    **{
        f"fsdp-{name}-{shards}": replace(
            base,
            strategy=fsdp1(sharding_strategy=shards, device_mesh=(2, 2), use_orig_params=not base.flat_parameters),
            processes=4,
            shares=4,
            **changes,
        )
        for name, base, changes, shards in [
            ("hybrid", FSDP1, {}, "HYBRID_SHARD"),
            ("hybrid", FSDP1, {}, "_HYBRID_SHARD_ZERO2"),
            ("hybrid-bf16-mixed", FSDP1, CAST_BF16, "HYBRID_SHARD"),
            ("hybrid-centralization", FSDP1, CENTRALIZATION, "HYBRID_SHARD"),
            ("hybrid-overflow", FSDP1, {**CAST_FP16, **FUSED, "overflowing_batch": 1}, "HYBRID_SHARD"),
            ("hybrid-overflow", FSDP1, {**CAST_FP16, **FUSED, "overflowing_batch": 1}, "_HYBRID_SHARD_ZERO2"),
            ("hybrid-flat", FLAT, {"accumulate": 4}, "HYBRID_SHARD"),
        ]
    },
    "fsdp-four": replace(FSDP1, processes=4, shares=4),
    "fsdp-16-mixed-manual-fused": replace(FSDP1, **CAST_FP16, optimizer="manual fused"),
}

OF_DTENSORS = {
    "fsdp2-include": replace(FSDP2, **CHOICES["include"]),
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
    "fsdp2-hybrid": replace(FSDP2, strategy=model_parallel(2), parallelize=shard, processes=4, shares=4),
    "fsdp2-hybrid-centralization": replace(
        FSDP2, strategy=model_parallel(2), parallelize=shard, processes=4, shares=4, **CENTRALIZATION
    ),
    "fsdp2-four": replace(FSDP2, processes=4, shares=4),
    "tp-min_ndim": replace(TP, **CHOICES["min_ndim"]),
    "tp-centralization": replace(TP, **CENTRALIZATION),
    "fsdp2-tp-centralization": replace(TWO_D, **CENTRALIZATION),
    "fsdp2-tp-exclude": replace(TWO_D, **CHOICES["exclude"]),
}


def in_fp32(stage: int) -> dict[str, Any]:
    """Return a scenario of DeepSpeed in bfloat16, with gradients that are accumulated in float32."""
    # DeepSpeed before 0.19 accumulates gradients of stage 2 in float32, and then rounds them.
    steps_in = torch.bfloat16 if stage == 2 else torch.float32
    return {**ZERO_BF16, "precision": "bf16-true", "steps_in": steps_in}


def on_parts(processes: int) -> dict[str, Any]:
    return {"processes": processes, "shares": processes}


PERSISTENT_NONE = {"stage3_param_persistence_threshold": 0}
DYNAMIC_FP16 = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}}
OF_DEEPSPEED = {
    **{
        f"zero{stage}-bf16-true-in_fp32{suffix}": replace(
            zero(stage, config=FP32_GRADIENTS), **in_fp32(stage), **changes
        )
        for stage in (1, 2, 3)
        for suffix, changes in [("", {}), ("-accumulate", {"accumulate": 4})]
    },
    **{f"zero{stage}-centralization": replace(zero(stage), **CENTRALIZATION) for stage in range(4)},
    "zero1-centralization-in_fp32": replace(zero(1, config=FP32_GRADIENTS), **in_fp32(1), **CENTRALIZATION),
    **{f"zero{stage}-clip": replace(zero(stage), clip=0.5) for stage in range(4)},
    "zero1-clip-in_fp32": replace(zero(1, config=FP32_GRADIENTS), **in_fp32(1), clip=0.5),
    **{f"zero{stage}-clip-offload": replace(zero(stage, offload=True), clip=0.5, accumulate=2) for stage in (1, 2, 3)},
    "zero2-offload": zero(2, offload=True),
    # Offloaded gradients are in float32.
    **{
        f"zero{stage}-offload-bf16-true": replace(
            zero(stage, offload=True), **{**ZERO_BF16, "steps_in": torch.float32}, precision="bf16-true"
        )
        for stage in (2, 3)
    },
    "zero3-offload_parameters": zero(3, offload=True, zero={"offload_param": {"device": "cpu"}, **PERSISTENT_NONE}),
    **{
        f"zero{stage}-min_ndim": replace(
            zero(stage),
            options={"min_ndim": 2, "exclude": "*head*"},
            leaves=(*NOT_MATRICES, "unused", "head.weight"),
        )
        for stage in (0, 2, 3)
    },
    "zero1-momentum-in_fp32": replace(zero(1, config=FP32_GRADIENTS), **in_fp32(1), optimizer="momentum"),
    **{f"zero{stage}-round_robin": zero(stage, zero={"round_robin_gradients": True}) for stage in (1, 2)},
    **{f"zero{stage}-overlap": replace(zero(stage, zero={"overlap_comm": True}), accumulate=2) for stage in (2, 3)},
    "zero2-small_buckets": zero(2, zero={"reduce_bucket_size": 20}),
    "zero3-small_buckets": zero(3, zero={"reduce_bucket_size": 20, "sub_group_size": 20, **PERSISTENT_NONE}),
    "zero2-no_reduce_scatter": zero(2, zero={"reduce_scatter": False}),
    "zero3-overflow": replace(zero(3), overflowing_batch=1),
    "zero1-overflow-in_fp32": replace(zero(1, config=FP32_GRADIENTS), **in_fp32(1), overflowing_batch=1),
    **{
        f"zero{stage}-16-true-{name}": replace(
            zero(stage, config=config, **arguments),
            precision="16-true",
            **{**ZERO_FP16, "overflowing_batch": 1, **changes},
        )
        for stage in (1, 2, 3)
        for name, config, arguments, changes in [
            ("overflow-accumulate", FP16_CONFIG, {}, {"accumulate": 2, "overflowing_batch": 3}),
            ("in_fp32", {**FP16_CONFIG, **FP32_GRADIENTS}, {}, {"accumulate": 2, "overflowing_batch": 3}),
            ("large_scale", DYNAMIC_FP16, {}, {}),
            ("offload", FP16_CONFIG, {"offload": True}, {}),
            ("clip", FP16_CONFIG, {}, {"clip": 0.5}),
        ]
    },
    **{
        f"zero{stage}-16-mixed-overflow": replace(
            zero(stage, config=FP16_CONFIG), precision="16-mixed", **ZERO_FP16, overflowing_batch=1
        )
        for stage in (1, 3)
    },
}
# Three processes share the network even less evenly.
OF_DEEPSPEED |= {
    f"{name}-three": replace((OF_PRODUCT | OF_DEEPSPEED)[name], **on_parts(3))
    for name in [
        *(f"zero{stage}-32-true-accumulate" for stage in (1, 2, 3)),
        *(f"zero{stage}-bf16-true-in_fp32-accumulate" for stage in (1, 2, 3)),
        *(f"zero{stage}-centralization" for stage in (1, 2, 3)),
        *(f"zero{stage}-clip-offload" for stage in (1, 2, 3)),
        *(f"zero{stage}-16-true-overflow-accumulate" for stage in (1, 2, 3)),
    ]
}
REFUSED = {
    f"{name}-refused": replace(scenario, **on_parts(1), refused=f"under DeepSpeed {message}")
    for name, scenario, message in [
        ("zero3-zero++", zero(3, zero={"zero_quantized_gradients": True}), r"with ZeRO\+\+"),
        (
            "zero2-unmanaged",
            zero(2, config={"managed_gradient_accumulation": False}),
            "with `managed_gradient_accumulation=false`",
        ),
        ("zero0-fp16", replace(zero(0, config=FP16_CONFIG), precision="16-true"), "with float16 and ZeRO stage 0"),
    ]
}

SINGS = {
    f"{name}-sing": replace(base, callback="sing")
    for name, base in {
        "ddp": DDP,
        "fsdp": FSDP1,
        "fsdp-channels_last": replace(FSDP1, **CHANNELS_LAST),
        "fsdp-one_flat_parameter": replace(FSDP1, strategy=fsdp1(nested=False)),
        "fsdp2": FSDP2,
        "tp": TP,
        "fsdp2-tp": TWO_D,
    }.items()
}
ADAPTIVE = {
    f"{name}-adaptive": replace(base, callback="adaptive")
    for name, base in {
        "single": SINGLE,
        "single-16-mixed": replace(SINGLE, **AUTOCAST_FP16, **FUSED),
        "ddp": DDP,
        "fsdp": FSDP1,
        "fsdp-bf16-true": replace(FSDP1, **TRUE_BF16),
        "fsdp-flat": FLAT,
        "fsdp-one_flat_parameter": replace(FSDP1, strategy=fsdp1(nested=False)),
        "fsdp2": FSDP2,
        "tp": TP,
        "fsdp2-tp": TWO_D,
        **{f"zero{stage}": zero(stage) for stage in range(4)},
    }.items()
}
MONITORED = {
    f"{name}-monitored": replace(base, monitored=True)
    for name, base in {
        "ddp": DDP,
        "fsdp": FSDP1,
        "fsdp-16-mixed": replace(FSDP1, **CAST_FP16, **FUSED, overflowing_batch=1),
        "fsdp-flat": FLAT,
        "fsdp2": FSDP2,
        "fsdp2-tp": TWO_D,
        "zero2": zero(2),
        "zero3": zero(3),
    }.items()
}


def resumed(base: Scenario, name: str, *sizes: int, shares: int | None = None) -> dict[str, Scenario]:
    """Return a run with momentum, and runs that resume its checkpoint with other numbers of processes."""
    base = replace(base, optimizer="momentum")
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
    """Return the scenario with checkpoints that the first process writes."""
    return replace(base, strategy=model_parallel(tensor, save_distributed_checkpoint=False))


CHECKPOINTS = {
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
    **{
        name: scenario
        for stage in range(4)
        for name, scenario in resumed(zero(stage), f"checkpoint-zero{stage}", 2).items()
    },
    # What is saved and resumed is compared with these bit by bit.
    **{f"checkpoint-zero{stage}-whole": replace(zero(stage), optimizer="momentum", epochs=2) for stage in range(4)},
}
# Their checkpoints hold the callback's state, so that Lightning warns if the callback is absent.
CHECKPOINTS |= {
    f"{name}-without_callback": replace(CHECKPOINTS[name], without_callback=True)
    for name in [
        f"checkpoint-{kind}-resume-2"
        for kind in ("ddp", "fsdp", "fsdp-sharded", "fsdp2", *(f"zero{stage}" for stage in range(4)))
    ]
}


def alone(device: str, scenarios: dict[str, Scenario]) -> dict[str, Scenario]:
    """Return scenarios as a single process runs them on its device."""
    return {f"{device}-{name}": replace(own, device=device, **on_parts(1)) for name, own in scenarios.items()}


SCENARIOS: dict[str, Scenario] = {
    **OF_PRODUCT,
    **OF_DDP,
    **OF_FSDP1,
    **OF_DTENSORS,
    **OF_DEEPSPEED,
    **REFUSED,
    **SINGS,
    **ADAPTIVE,
    **MONITORED,
    **CHECKPOINTS,
}

OF_COLLECTIVES = [name for name in OF_DEEPSPEED if name.endswith(("round_robin", "overlap", "buckets", "scatter"))]

# FSDP1 does not shard over a single process. PyTorch then fails to accumulate gradients whose type is not that of the
# weights, and returns the gradients of channels-last weights in a wrong order.
ON_CUDA = alone(
    "cuda",
    {
        name: own
        for name, own in SCENARIOS.items()
        if own.processes <= 2
        and name not in CHECKPOINTS
        and name not in REFUSED
        # One process adds nothing up.
        and not (own.kind == "DeepSpeed" and (own.is_manual or own.optimizer == "momentum" or name in OF_COLLECTIVES))
        and not (own.kind == "FSDP" and ("channels_last" in own.network or (own.computes_in and own.accumulate > 1)))
    },
)
# Offloading needs a GPU.
ON_CUDA |= {
    f"{name}-cpu_offload": replace(ON_CUDA[name], strategy=fsdp1(cpu_offload=True, use_orig_params="flat" not in name))
    for name in ("cuda-fsdp-32-true", "cuda-fsdp-flat-32-true", "cuda-fsdp-bf16-mixed")
}
# A GPU's scenarios, on a CPU.
SCENARIOS |= alone(
    "cpu",
    {
        name: SCENARIOS[name]
        for name in (
            "ddp-16-mixed-fused",
            "fsdp-32-true",
            "fsdp-flat-16-mixed",
            "fsdp2-bf16-mixed",
            "tp-32-true",
            "zero1-bf16-true-accumulate",
            "zero2-32-true",
            "zero3-16-true-overflow-accumulate",
            "zero3-clip-offload",
        )
    },
)

ALL = SCENARIOS | ON_CUDA

# The default tier: every pair of the product's values, and one of each kind of the other scenarios.
DEFAULT = {
    *map(name_of, PAIRWISE),
    "checkpoint-fsdp2-resume-4",
    "checkpoint-fsdp2-save",
    "ddp-bucket_view",
    "ddp-find_unused",
    "ddp-overflow",
    "fsdp-16-mixed-monitored",
    "fsdp-centralization",
    "fsdp-flat-adaptive",
    "fsdp-flat-exclude",
    "fsdp-hybrid-overflow-HYBRID_SHARD",
    "fsdp2-include",
    "fsdp2-monitored",
    "fsdp2-tp-adaptive",
    "fsdp2-tp-centralization",
    "tp-sing",
    "zero3-adaptive",
    "zero3-min_ndim",
    "zero3-monitored",
    "zero0-fp16-refused",
    "zero2-clip-offload-three",
    "zero3-16-true-overflow-accumulate",
}


def obstacle(name: str) -> str | None:
    """Return why this environment cannot run a scenario on a CPU, if so."""
    scenario = SCENARIOS[name]
    if scenario.kind == "FSDP2, TP" and scenario.parallelize is not tensor_parallel and not FSDP2_RUNS_ON_CPU:
        return "FSDP2 calls methods that a CPU's streams do not have in this torch (2.6): install a newer one"
    if name.startswith(("checkpoint-fsdp-save", "checkpoint-fsdp-resume")) and not FSDP1_GATHERS_STATE_ON_CPU:
        return "FSDP1 crashes on a CPU when it gathers a checkpoint in this torch (2.6): install a newer one"
    if scenario.is_fused and scenario.weight_type.itemsize == 2 and not fused_sgd_is_right(scenario.weight_type):
        return f"torch {torch.__version__} is wrong with fused SGD in half precision on a CPU: install a newer one"
    return None


def selected(condition: Callable[[str, Scenario], bool] = lambda name, scenario: True) -> list[Any]:
    """Return pytest parameters for the scenarios of which a condition holds, with their tier and their xdist group.

    All tests of a scenario, and of those that resume it, run in one process, which then trains it once.
    """
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.xdist_group(scenario.resumes or name.replace("-whole", "-save")),
                *([] if name in DEFAULT else [pytest.mark.full]),
            ],
        )
        for name, scenario in SCENARIOS.items()
        if condition(name, scenario)
    ]
