"""The strategies of the scenarios, made to run on CPUs, and where each keeps its weights."""

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
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

from tests.strategies.network import Frozen, Network, Tied

FSDP_INIT_SCALE = 2.0**10  # the usual one overflows in float16, in which FSDP adds gradients up

Weights = dict[str, Tensor]
MakeStrategy = Callable[[int, str], Any]
"""Makes a Trainer's strategy for a number of processes and a kind of device."""


# Loss scalers: Lightning's own are for CUDA devices.


def scaler(device: str) -> MixedPrecision:
    return MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device))


def sharded_scaler(device: str) -> FSDPPrecision:
    plugin = FSDPPrecision("16-mixed")
    plugin.scaler = ShardedGradScaler(device, init_scale=FSDP_INIT_SCALE)
    return plugin


# DDP


def ddp(**options: Any) -> MakeStrategy:
    return lambda processes, device: DDPStrategy(**options) if options else "ddp"


def whole_parameters(module: LightningModule) -> Weights:
    """Return the weights of plain tensors and DTensors."""
    named = module.network.named_parameters(remove_duplicate=False)
    return {name: (param.full_tensor() if isinstance(param, DTensor) else param) for name, param in named}


# FSDP1


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning's strategy, made to run on CPUs."""

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


def fsdp1(nested: bool = True, **kwargs: Any) -> MakeStrategy:
    # Of the shards of the layer norm's flat parameter, one is the weight and one the bias.
    policy = {nn.Conv2d, nn.LayerNorm, Tied, Frozen} if nested else {Frozen}

    def make(processes: int, device: str) -> FSDPStrategy:
        cls = CPUFSDPStrategy if device == "cpu" else FSDPStrategy
        return cls(auto_wrap_policy=policy, **kwargs)

    return make


def fsdp1_weights(module: LightningModule) -> Weights:
    """Return the weights that FSDP1 gathers for a checkpoint, in the type in which it keeps them."""
    wrapper = module.trainer.model
    with FullyShardedDataParallel.state_dict_type(
        wrapper, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)
    ):
        state = wrapper.state_dict()
    return {name.removeprefix("network."): weight for name, weight in state.items()}


# FSDP2 and tensor parallelism


def model_parallel(tensor: int = 1, **kwargs: Any) -> MakeStrategy:
    """Tensor parallelism over this many processes, or all if they are fewer, and data parallelism over the rest."""

    def make(processes: int, device: str) -> ModelParallelStrategy:
        size = min(tensor, processes)
        return ModelParallelStrategy(processes // size, size, **kwargs)

    return make


def shard(network: Network, mesh: DeviceMesh, **kwargs: Any) -> None:
    """Shard every layer by FSDP2."""
    for layer in (network.conv, network.norm, network.tied, network.frozen):
        fully_shard(layer, mesh=mesh, **kwargs)
    fully_shard(network, mesh=mesh, **kwargs)


def shard_data_parallel(network: Network, mesh: DeviceMesh) -> None:
    shard(network, mesh["data_parallel"])


def shard_some(network: Network, mesh: DeviceMesh) -> None:
    """Shard some layers by FSDP2. The other parameters are plain tensors, whose gradients no one averages."""
    for layer in (network.conv, network.norm, network.tied):
        fully_shard(layer, mesh=mesh["data_parallel"])


def tensor_parallel(network: Network, mesh: DeviceMesh) -> None:
    """Split columns, rows and a norm that sees a part of the batch. The other parameters are plain tensors."""
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


# DeepSpeed


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy, without its checks for GPUs."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        # An extension for CPUs alone, which adds up in shared memory: its compiler takes longer than all scenarios.
        # Without it the process group adds up, as on GPUs.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
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


def deepspeed(
    stage: int,
    offload: bool = False,
    zero: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> MakeStrategy:
    """DeepSpeed at a ZeRO stage.

    Args:
        stage: 0 to 3.
        offload: Whether the optimizer's state is on the CPU.
        zero: Entries of the section ``zero_optimization`` of DeepSpeed's configuration.
        config: Entries of the configuration itself.
    """

    def make(processes: int, device: str) -> DeepSpeedStrategy:
        on_cpu = device == "cpu"
        if on_cpu:
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True  # by PyTorch on a CPU; not by DeepSpeed's kernels
        strategy = (CPUDeepSpeedStrategy if on_cpu else DeepSpeedStrategy)(
            stage=stage,
            offload_optimizer=offload,
            overlap_comm=False,
            process_group_backend="gloo" if on_cpu else None,
        )
        strategy.config["zero_optimization"].update(zero or {})
        # The optimizer of the tests is plain SGD, of which DeepSpeed has no version of its own.
        strategy.config["zero_force_ds_cpu_optimizer"] = False
        strategy.config["steps_per_print"] = 10**9
        strategy.config.update(config or {})
        return strategy

    return make


def deepspeed_weights(module: LightningModule) -> Weights:
    """Return the weights that are stepped: in half precision, float32 copies of the model's."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = module.trainer.model.optimizer
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    copies = {param: copy for params, own in groups for param, copy in zip(params, own, strict=True)}
    weights = deepspeed_model_weights(module)
    for name, param in module.network.named_parameters(remove_duplicate=False):
        if param.requires_grad and param.dtype != torch.float32:
            copy = copies[param] if param in copies else safe_get_full_fp32_param(param)
            weights[name] = copy.detach().clone().view(weights[name].shape)
    return weights


def deepspeed_model_weights(module: LightningModule) -> Weights:
    """Return the weights with which the forward pass computes."""
    from deepspeed import zero

    weights = {}
    for name, param in module.network.named_parameters(remove_duplicate=False):
        with zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            weights[name] = param.detach().clone()
    return weights


def deepspeed_gradients(module: LightningModule) -> Weights:
    """Return the averaged gradients of the step that comes next, times the loss scale."""
    from deepspeed.utils import safe_get_full_grad

    named = {name: param for name, param in module.network.named_parameters() if param.requires_grad}
    return {name: safe_get_full_grad(param).detach().clone() for name, param in named.items()}
