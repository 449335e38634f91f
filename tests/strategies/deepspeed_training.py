"""Trains a small network under DeepSpeed on CPUs, and writes down every weight. Run by test_deepspeed.py.

python deepspeed_training.py DIRECTORY PROCESSES SCENARIO [SCENARIO ...]
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm import GradientCentralizationCallback, GradientTransform, ZNormCallback
from lightning_znorm.gradients import UnsupportedGradientError

BATCH_SIZE = 4  # of each process
STEPS = 3
LEARNING_RATE = 0.1
SECOND_LEARNING_RATE = 0.03
SIZE = 7  # shared out evenly by none of 2, 3 and 4 processes


@dataclass(frozen=True)
class Scenario:
    """What is special about a run."""

    stage: int = 2
    precision: str = "32-true"
    accumulate: int = 1
    device: str = "cpu"
    zero: dict[str, Any] = field(default_factory=dict)
    """Of the section ``zero_optimization``."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of DeepSpeed's configuration."""
    offload: bool = False
    clip: float | None = None
    centralize: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Of the callback."""
    fused: bool = False
    two_groups: bool = False
    manual: bool = False
    overflowing_batch: int | None = None
    """Batch in which the last process' gradients, and no other's, become infinite."""
    overflowing_parameter: str = "head.weight"
    """The only one whose gradient becomes infinite."""

    @property
    def callback(self) -> GradientTransform:
        cls = GradientCentralizationCallback if self.centralize else ZNormCallback
        return cls(**self.options, allow_untested_strategy=True)


FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "loss_scale": 128.0}}
DYNAMIC_FP16 = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1}}

SCENARIOS = {
    **{
        f"{precision}_stage_{stage}_accumulate_{accumulate}": Scenario(stage, f"{precision}-true", accumulate)
        for precision in ("32", "bf16")
        for stage in range(4)
        for accumulate in (1, 4)
    },
    **{
        f"bf16_in_fp32_stage_{stage}_accumulate_{accumulate}": Scenario(stage, "bf16-true", accumulate, config=FP32)
        for stage in (1, 2, 3)
        for accumulate in (1, 4)
    },
    **{f"centralize_stage_{stage}": Scenario(stage, centralize=True) for stage in range(4)},
    "centralize_bf16_in_fp32": Scenario(1, "bf16-true", config=FP32, centralize=True),
    **{f"clip_stage_{stage}": Scenario(stage, clip=0.5) for stage in range(4)},
    "clip_bf16_in_fp32": Scenario(1, "bf16-true", config=FP32, clip=0.5),
    **{f"clip_offload_stage_{stage}": Scenario(stage, accumulate=2, offload=True, clip=0.5) for stage in (1, 2, 3)},
    "offload_stage_2": Scenario(2, offload=True),
    # To DeepSpeed the same as true half precision, but for the weights that it starts with.
    "bf16_mixed_stage_0": Scenario(0, "bf16-mixed"),
    "bf16_mixed_stage_2": Scenario(2, "bf16-mixed"),
    "fp16_mixed_stage_1": Scenario(1, "16-mixed", config=FP16, overflowing_batch=1),
    "fp16_mixed_stage_3": Scenario(3, "16-mixed", config=FP16, overflowing_batch=1),
    "offload_bf16_stage_2": Scenario(2, "bf16-true", offload=True),
    "offload_bf16_stage_3": Scenario(3, "bf16-true", offload=True),
    "offload_parameters": Scenario(
        3, offload=True, zero={"offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    ),
    **{f"filter_stage_{stage}": Scenario(stage, options={"min_ndim": 2, "exclude": "*head*"}) for stage in (0, 2, 3)},
    **{f"two_groups_stage_{stage}": Scenario(stage, two_groups=True) for stage in range(4)},
    "two_groups_bf16_in_fp32": Scenario(1, "bf16-true", config=FP32, two_groups=True),
    **{f"fused_stage_{stage}": Scenario(stage, fused=True) for stage in (0, 2, 3)},
    **{f"manual_stage_{stage}": Scenario(stage, manual=True) for stage in (0, 2, 3)},
    **{f"round_robin_stage_{stage}": Scenario(stage, zero={"round_robin_gradients": True}) for stage in (1, 2)},
    "overlap_stage_2": Scenario(2, zero={"overlap_comm": True}, accumulate=2),
    "overlap_stage_3": Scenario(3, zero={"overlap_comm": True}, accumulate=2),
    "small_buckets_stage_2": Scenario(2, zero={"reduce_bucket_size": 20}),
    "small_buckets_stage_3": Scenario(
        3, zero={"reduce_bucket_size": 20, "sub_group_size": 20, "stage3_param_persistence_threshold": 0}
    ),
    "no_reduce_scatter": Scenario(2, zero={"reduce_scatter": False}),
    **{f"overflow_stage_{stage}": Scenario(stage, overflowing_batch=1) for stage in (3,)},
    "overflow_bf16_in_fp32": Scenario(1, "bf16-true", config=FP32, overflowing_batch=1),
    **{
        f"fp16_stage_{stage}": Scenario(stage, "16-true", config=FP16, accumulate=2, overflowing_batch=3)
        for stage in (1, 2, 3)
    },
    **{
        f"fp16_in_fp32_stage_{stage}": Scenario(stage, "16-true", config=FP16 | FP32, accumulate=2, overflowing_batch=3)
        for stage in (1, 2, 3)
    },
    **{
        f"fp16_large_scale_stage_{stage}": Scenario(stage, "16-true", config=DYNAMIC_FP16, overflowing_batch=1)
        for stage in (1, 2, 3)
    },
    **{
        f"fp16_offload_stage_{stage}": Scenario(stage, "16-true", config=FP16, offload=True, overflowing_batch=1)
        for stage in (1, 2, 3)
    },
    **{
        f"fp16_clip_stage_{stage}": Scenario(stage, "16-true", config=FP16, clip=0.5, overflowing_batch=1)
        for stage in (1, 2, 3)
    },
}
MATRIX = [name for name in SCENARIOS if name.startswith(("32_", "bf16_", "fp16_", "offload_", "clip_", "fused_"))]
"""A precision with a stage, and what a GPU could change about it."""
ON_CUDA = {f"cuda_{name}": replace(SCENARIOS[name], device="cuda") for name in MATRIX}
ALONE = ["32_stage_2_accumulate_1", "bf16_stage_1_accumulate_4", "clip_offload_stage_3", "fp16_stage_3"]
"""Run by one process too, as those on a GPU are."""
UNEVEN = [
    *(f"{precision}_stage_{stage}_accumulate_4" for precision in ("32", "bf16_in_fp32") for stage in (1, 2, 3)),
    *(f"centralize_stage_{stage}" for stage in (1, 2, 3)),
    *(f"clip_offload_stage_{stage}" for stage in (1, 2, 3)),
    *(f"fp16_stage_{stage}" for stage in (1, 2, 3)),
]
"""Run by three processes too."""
RESUMED = {f"resumed_stage_{stage}": Scenario(stage, two_groups=True) for stage in range(4)}
REFUSED = {
    "refused_zero_plus_plus": (Scenario(3, zero={"zero_quantized_gradients": True}), r"with ZeRO\+\+"),
    "refused_unmanaged": (
        Scenario(2, config={"managed_gradient_accumulation": False}),
        "with `managed_gradient_accumulation=false`",
    ),
    "refused_fp16_stage_0": (Scenario(0, "16-true", config=FP16), "with float16 and ZeRO stage 0"),
}
"""Configurations that one process can set up, and why they are refused."""


class Overflowing(torch.autograd.Function):
    """A parameter as it is, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[0] = torch.inf
        return grad


class Head(nn.Linear):
    """The last layer."""

    overflows = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Overflowing.apply(self.weight) if self.overflows else self.weight, self.bias)


class Network(nn.Module):
    """A shared weight, a frozen layer, an unused parameter, vectors of one element, and odd sizes.

    Without biases in front of a normalization, whose gradient would be rounding noise.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 3, 3)
        self.first = nn.Linear(15, SIZE, bias=False)
        self.norm = nn.LayerNorm(SIZE)
        self.second = nn.Linear(SIZE, SIZE, bias=False)
        self.frozen = nn.Linear(SIZE, SIZE).requires_grad_(False)
        self.third = nn.Linear(SIZE, SIZE)
        self.third.weight = self.second.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))
        self.unused = nn.Parameter(torch.randn(5))
        self.head = Head(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.conv(x.unsqueeze(1)).tanh().flatten(1)))
        x = self.third(self.frozen(self.second(x)).tanh()).tanh()
        return self.head(x * self.gain + self.shift)


def batch_of(number: int, rank: int) -> tuple[Tensor, Tensor]:
    """One batch of one process."""
    generator = torch.Generator().manual_seed(number * 10 + rank)
    return torch.randn(BATCH_SIZE, SIZE, generator=generator), torch.randint(SIZE, (BATCH_SIZE,), generator=generator)


def is_in_second_group(name: str) -> bool:
    return name.startswith("head") or name == "gain"


class Training(LightningModule):
    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        self.scenario = scenario
        self.automatic_optimization = not scenario.manual
        self.network = Network()
        self.weights: list[dict[str, Tensor]] = []
        self.rounded: list[dict[str, Tensor]] = []
        self.scales: list[float] = []

    def training_step(self, number: Tensor) -> Tensor:
        inputs, labels = (
            tensor.to(self.trainer.strategy.root_device) for tensor in batch_of(int(number), self.global_rank)
        )
        dtype = next(self.parameters()).dtype
        self.network.head.overflows = (
            int(number) == self.scenario.overflowing_batch and self.global_rank == self.trainer.world_size - 1
        )
        loss = F.cross_entropy(self.network(inputs.to(dtype)).float(), labels)
        if self.scenario.manual:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = [(name, param) for name, param in self.network.named_parameters() if param.requires_grad]
        groups = [{"params": [param for _, param in named]}]
        if self.scenario.two_groups:
            groups = [
                {"params": [param for name, param in named if not is_in_second_group(name)]},
                {"params": [param for name, param in named if is_in_second_group(name)], "lr": SECOND_LEARNING_RATE},
            ]
        return torch.optim.SGD(groups, lr=LEARNING_RATE, fused=self.scenario.fused)

    def on_train_start(self) -> None:
        self.write_down()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.scenario.accumulate == 0:
            self.write_down()

    def write_down(self) -> None:
        """The weights that are stepped, and what the forward pass makes of them."""
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        engine = self.trainer.model
        optimizer = engine.optimizer
        of_copies = {
            param: copy
            for group, copies in zip(
                getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False
            )
            for param, copy in zip(group, copies, strict=True)
        }
        weights, rounded = {}, {}
        for name, param in self.network.named_parameters():
            with zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
                rounded[name] = param.detach().cpu().clone()
            if not param.requires_grad or param.dtype == torch.float32:
                weights[name] = rounded[name]
            else:
                copy = of_copies[param] if param in of_copies else safe_get_full_fp32_param(param)
                weights[name] = copy.detach().cpu().clone().view(rounded[name].shape)
        self.weights.append(weights)
        self.rounded.append(rounded)
        self.scales.append(float(getattr(optimizer, "loss_scale", 1.0)))


class BeforeTheCallback(Callback):
    """Keeps the averaged gradients that the callback will see, in half precision."""

    def __init__(self) -> None:
        self.grads: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        is_half = pl_module.scenario.precision != "32-true"
        if not is_half or not trainer.model.is_gradient_accumulation_boundary():
            return
        from deepspeed.utils import safe_get_full_grad

        named = {name: param for name, param in pl_module.network.named_parameters() if param.requires_grad}
        self.grads.append({name: safe_get_full_grad(param).cpu().clone() for name, param in named.items()})


class CountingCollectives:
    """Surrounds a callback's hook, and counts the collectives in it."""

    NAMES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor")

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.originals: dict[str, Any] = {}

    @property
    def callbacks(self) -> tuple[Callback, Callback]:
        """Those in front of the callback, and behind it."""
        return (
            LambdaCallback(on_before_optimizer_step=lambda *_: self.start()),
            LambdaCallback(on_before_optimizer_step=lambda *_: self.stop()),
        )

    def start(self) -> None:
        self.counts.append(0)
        for name in self.NAMES:
            self.originals[name] = getattr(torch.distributed, name)
            setattr(torch.distributed, name, partial(self.call, name))

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.counts[-1] += 1
        return self.originals[name](*args, **kwargs)

    def stop(self) -> None:
        for name, original in self.originals.items():
            setattr(torch.distributed, name, original)


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's, without its checks for GPUs."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        import deepspeed

        engine, deepspeed_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=-1),
            config=self.config,
            model=model,
            model_parameters=filter(lambda p: p.requires_grad, model.parameters()),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, deepspeed_optimizer


def strategy_of(scenario: Scenario) -> DeepSpeedStrategy:
    on_cpu = scenario.device == "cpu"
    strategy = (CPUDeepSpeedStrategy if on_cpu else DeepSpeedStrategy)(
        stage=scenario.stage,
        offload_optimizer=scenario.offload,
        overlap_comm=False,
        process_group_backend="gloo" if on_cpu else None,
    )
    strategy.config["zero_optimization"].update(scenario.zero)
    # The optimizer of the tests is plain SGD, of which DeepSpeed has no version of its own.
    strategy.config["zero_force_ds_cpu_optimizer"] = False
    strategy.config["steps_per_print"] = 10**9
    strategy.config.update(scenario.config)
    return strategy


def trainer_of(scenario: Scenario, processes: int, *callbacks: Callback, **kwargs: Any) -> Trainer:
    if scenario.precision in ("16-true", "16-mixed") and scenario.device == "cpu":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # by PyTorch on a CPU; not by DeepSpeed's kernels
    return Trainer(
        accelerator=scenario.device,
        devices=processes,
        strategy=strategy_of(scenario),
        precision=scenario.precision,
        accumulate_grad_batches=scenario.accumulate,
        gradient_clip_val=scenario.clip,
        use_distributed_sampler=False,  # each process gets all numbers of batches, and makes its own
        callbacks=list(callbacks),
        **{
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **kwargs,
        },
    )


def batches(scenario: Scenario) -> DataLoader:
    return DataLoader(range(STEPS * scenario.accumulate))


def train(name: str, processes: int, directory: Path) -> None:
    scenario = (SCENARIOS | ON_CUDA)[name]
    module, before, counting = Training(scenario), BeforeTheCallback(), CountingCollectives()
    start, stop = counting.callbacks
    trainer = trainer_of(scenario, processes, before, start, scenario.callback, stop)
    trainer.fit(module, batches(scenario))
    record = {key: getattr(module, key) for key in ("weights", "rounded", "scales")}
    record |= {"grads": before.grads, "collectives": counting.counts}
    torch.save(record, directory / f"{name}-{processes}-{trainer.global_rank}.pt")


def refuse(name: str, processes: int, directory: Path) -> None:
    """Writes down why a configuration is refused, and whether a step was taken before."""
    scenario, _ = REFUSED[name]
    module, reason = Training(scenario), "nothing"
    try:
        trainer_of(scenario, processes, scenario.callback).fit(module, batches(scenario))
    except UnsupportedGradientError as error:
        reason = str(error)
    (directory / f"{name}.txt").write_text(f"{len(module.weights)} {reason}")


def resume(name: str, processes: int, directory: Path) -> None:
    """Trains for two epochs at once, and for one epoch and then another; and resumes without the callback."""
    scenario = RESUMED[name]
    path = directory / f"{name}-{processes}"

    def fit(max_epochs: int, *callbacks: Callback, **kwargs: Any) -> tuple[Trainer, Training]:
        trainer = trainer_of(scenario, processes, *callbacks, max_epochs=max_epochs)
        module = Training(scenario)
        trainer.fit(module, batches(scenario), **kwargs)
        return trainer, module

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, whole = fit(2, scenario.callback)
        trainer, half = fit(1, scenario.callback)
        trainer.save_checkpoint(path)
        trainer, rest = fit(2, scenario.callback, ckpt_path=path)
        fit(2, ckpt_path=path)
    record = {"whole": whole.weights, "half": half.weights, "rest": rest.weights}
    record["warnings"] = [str(warning.message) for warning in caught]
    torch.save(record, directory / f"{name}-{processes}-{trainer.global_rank}.pt")


def main(directory: str, processes: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        run = resume if name in RESUMED else refuse if name in REFUSED else train
        run(name, int(processes), Path(directory))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
