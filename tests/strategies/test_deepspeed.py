"""Which of DeepSpeed's engines and optimizers are supported, and which are refused; scenarios.py trains with them."""

import math
from importlib.metadata import requires, version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from lightning_znorm.functional import zscore_grads_
from lightning_znorm.gradients import UnsupportedGradientError
from lightning_znorm.gradients.adapters.deepspeed import _ENGINE_NEEDS, DeepSpeedAdapter

deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install '.[deepspeed]'")


class DeepSpeedEngine(SimpleNamespace):
    """Stands for an engine that only a larger machine, or another optimizer, could set up."""

    def fp16_enabled(self) -> bool:
        return False


# The attributes of a plain engine.
SETTINGS = {
    "autotp_size": 0,
    "fp16_master_weights_and_gradients": False,
    "gradient_clipping": lambda: 0.0,
    "has_moe_layers": False,
    "is_deepcompile_enabled": False,
    "is_gradient_accumulation_boundary": True,
    "managed_gradient_accumulation": True,
    "torch_autocast_z0_gradscaler": None,
    "zero_hpz_partition_size": 1,
    "zero_offload_optimizer": None,
    "zero_offload_param": None,
    "zero_optimization_stage": lambda: 0,
    "zero_quantized_gradients": False,
}


def engine(cls: type = DeepSpeedEngine, optimizer: Any = None, **settings: Any) -> SimpleNamespace:
    optimizer = optimizer or torch.optim.SGD(nn.Linear(2, 2).parameters())
    return cls(**{"optimizer": optimizer, "basic_optimizer": optimizer} | SETTINGS | settings)


def instance_of(name: str, module: str = "deepspeed.runtime.zero.stage3", **attributes: Any) -> Any:
    return type(name, (SimpleNamespace,), {"__module__": module})(**attributes)


NVME = SimpleNamespace(device="nvme")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (engine(type("PipelineEngine", (DeepSpeedEngine,), {})), "with the PipelineEngine"),
        (engine(has_moe_layers=True), "with mixture-of-experts layers"),
        (engine(autotp_size=lambda: 2), "with tensor parallelism"),
        (engine(sparse_gradients_enabled=lambda: True), "with sparse gradients"),
        (engine(zero_hpz_partition_size=lambda: 2), r"with ZeRO\+\+"),
        (engine(zero_offload_optimizer=lambda: NVME), "with offloading to NVMe"),
        (engine(zero_offload_param=lambda: NVME), "with offloading to NVMe"),
        (engine(basic_optimizer=instance_of("OnebitAdam")), "with the optimizer OnebitAdam"),
        (engine(basic_optimizer=instance_of("ZeroOneAdam")), "with the optimizer ZeroOneAdam"),
        (engine(basic_optimizer=instance_of("MuonWithAuxAdam")), "with the optimizer MuonWithAuxAdam"),
        (engine(is_deepcompile_enabled=lambda: True), "with DeepCompile"),
        (engine(amp_enabled=lambda: True), r"with Apex"),
        (engine(torch_autocast_z0_gradscaler=object()), "with `torch_autocast` in float16"),
        (engine(fp16_master_weights_and_gradients=lambda: True), "with `fp16_master_weights_and_grads`"),
        (engine(optimizer=instance_of("MiCS_Optimizer")), "DeepSpeed's MiCS_Optimizer keeps gradients where"),
        (engine(optimizer=instance_of("ZenFlowZeroOptimizer")), "DeepSpeed's ZenFlowZeroOptimizer keeps"),
    ],
)
def test_feature_is_refused(made: SimpleNamespace, message: str) -> None:
    with pytest.raises(UnsupportedGradientError, match=message):
        DeepSpeedAdapter(nn.Linear(2, 2), made)


@pytest.mark.parametrize("cls", ["DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"])
def test_another_layout_of_the_optimizer_is_refused(cls: str) -> None:
    message = f"DeepSpeed {version('deepspeed')} does not keep gradients as.*{cls} has no .*groups"
    with pytest.raises(UnsupportedGradientError, match=message):
        DeepSpeedAdapter(nn.Linear(2, 2), engine(optimizer=instance_of(cls)))


@pytest.mark.parametrize("name", [*SETTINGS, "optimizer", "basic_optimizer"])
def test_engine_that_does_not_tell_a_setting_is_refused(name: str) -> None:
    DeepSpeedAdapter(nn.Linear(2, 2), engine())
    made = engine()
    delattr(made, name)
    with pytest.raises(UnsupportedGradientError, match=f"DeepSpeed .* does not keep .* DeepSpeedEngine has no {name}"):
        DeepSpeedAdapter(nn.Linear(2, 2), made)


def test_settings_of_a_plain_engine_are_those_that_are_needed() -> None:
    assert {*SETTINGS, "optimizer", "basic_optimizer", "fp16_enabled"} == {*_ENGINE_NEEDS}
    assert {name for name in _ENGINE_NEEDS if not hasattr(deepspeed.DeepSpeedEngine, name)} == {
        "basic_optimizer",
        "has_moe_layers",
        "optimizer",
        "torch_autocast_z0_gradscaler",
    }  # which its __init__ sets


@pytest.mark.parametrize(
    ("module", "stage", "name"),
    [
        ("deepspeed.zero.stage3", 0, "DeepSpeedZeroOptimizer_Stage4"),
        ("renamed.zero", 3, "DeepSpeedZeroOptimizer_Stage4"),
        ("torch.optim.sgd", 1, "SGD"),
    ],
)
def test_optimizer_by_another_name_is_refused(module: str, stage: int, name: str) -> None:
    made = engine(optimizer=instance_of(name, module, param_groups=[]), zero_optimization_stage=lambda: stage)
    with pytest.raises(UnsupportedGradientError, match=f"DeepSpeed's {name} keeps gradients where they are not found"):
        DeepSpeedAdapter(nn.Linear(2, 2), made)


# The attributes of a plain optimizer of each stage, for a model of one layer.
LAYER = nn.Linear(2, 2)
FLAT = [torch.zeros(4), torch.zeros(2)]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "FP16_Optimizer": {"fp16_groups": [list(LAYER.parameters())]},
    "FP16_UnfusedOptimizer": {"fp16_groups": [list(LAYER.parameters())]},
    "BF16_Optimizer": {"bf16_groups": [list(LAYER.parameters())], "fp32_groups_gradients": [FLAT]},
    "DeepSpeedZeroOptimizer": {
        "averaged_gradients": {},
        "bit16_groups": [list(LAYER.parameters())],
        "cpu_offload": True,
        "first_offset": [0],
        "get_param_id": id,
        "grad_position": {},
        "norm_for_param_grads": {},
        "params_in_partition": [list(LAYER.parameters())],
        "real_dp_process_group": [None],
        "single_partition_of_fp32_groups": FLAT,
    },
    "DeepSpeedZeroOptimizer_Stage3": {
        "averaged_gradients": {},
        "fp16_groups": [[]],
        "fp32_partitioned_groups_flat": FLAT,
        "get_param_id": id,
        "grad_position": {},
        "norm_for_param_grads": {},
        "offload_optimizer": True,
        "sub_group_to_group_id": {},
    },
}


@pytest.mark.parametrize(("name", "lacking"), [(name, key) for name, own in OPTIMIZERS.items() for key in own])
def test_optimizer_without_what_is_needed_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, lacking: str) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    DeepSpeedAdapter(LAYER, engine(optimizer=instance_of(name, **OPTIMIZERS[name])))
    made = instance_of(name, **OPTIMIZERS[name])
    delattr(made, lacking)
    with pytest.raises(UnsupportedGradientError, match=f"{name} has no {lacking}"):
        DeepSpeedAdapter(LAYER, engine(optimizer=made))


@pytest.mark.parametrize("lacking", ["ds_numel", "ds_process_group", "ds_shape", "partition_numel"])
def test_parameter_of_stage_3_without_what_is_needed_is_refused(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    model = nn.Linear(2, 2, bias=False)
    own = {"ds_numel": 4, "ds_process_group": None, "ds_shape": torch.Size([2, 2]), "partition_numel": lambda: 4}
    vars(model.weight).update(own)
    cls = "DeepSpeedZeroOptimizer_Stage3"
    optimizer = instance_of(cls, **OPTIMIZERS[cls] | {"fp16_groups": [[model.weight]]})
    DeepSpeedAdapter(model, engine(optimizer=optimizer))
    delattr(model.weight, lacking)
    with pytest.raises(UnsupportedGradientError, match=f"Parameter has no {lacking}"):
        DeepSpeedAdapter(model, engine(optimizer=optimizer))


def test_slots_by_parameter_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of stages 1 and 2, each group is one of the optimizer's; stage 3 cuts them into several."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    first, first_bias, last, last_bias = parameters = list(model.parameters())
    for parameter in parameters:
        shape, size = parameter.shape, parameter.numel()
        own = {"ds_numel": size, "ds_process_group": None, "ds_shape": shape, "partition_numel": lambda size=size: size}
        vars(parameter).update(own)
    groups = [{"lr": 0.1}, {"lr": 0.2}]  # DeepSpeed puts flat tensors in place of their parameters

    def names(cls: str, **own: Any) -> list[list[str]]:
        optimizer = instance_of(cls, **OPTIMIZERS[cls] | own, param_groups=groups)
        adapter = DeepSpeedAdapter(model, engine(optimizer=optimizer, zero_optimization_stage=lambda: 1))
        found = adapter.slots_by_group(optimizer)
        assert {slot for group in found for slot in group} == set(adapter.slots_of(optimizer))
        return [[slot.names[0] for slot in group] for group in found]

    two = [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    held = [[first, first_bias], [last, last_bias]]
    assert two == names(
        "DeepSpeedZeroOptimizer",
        bit16_groups=held,
        first_offset=[0, 0],
        params_in_partition=held,
        real_dp_process_group=[None, None],
    )
    assert two == names("BF16_Optimizer", bf16_groups=held, fp32_groups_gradients=[[None, None]] * 2)
    cut = [[first, first_bias], [last], [last_bias]]
    assert two == names("DeepSpeedZeroOptimizer_Stage3", fp16_groups=cut, sub_group_to_group_id={0: 0, 1: 1, 2: 1})


@pytest.mark.parametrize(("setting", "norm"), [(0.0, math.inf), (0.5, 0.5)])
def test_engines_own_clipping(setting: float, norm: float) -> None:
    assert DeepSpeedAdapter(nn.Linear(2, 2), engine(gradient_clipping=lambda: setting)).clip_norm() == norm


def test_parameter_of_stage_3_is_told_by_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 5.0])
    weight.tag = "an attribute that says nothing of gradients"  # type: ignore[attr-defined]
    zscore_grads_(weight)
    assert weight.grad.tolist() == [-1, 1]
    weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedGradientError, match="gradient of parameter 0 is sharded by DeepSpeed"):
        zscore_grads_(weight)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.delattr(deepspeed.runtime.zero.utils, "is_zero_param")
    with pytest.raises(UnsupportedGradientError, match=r"sharded by DeepSpeed .* cannot be told .*'is_zero_param'"):
        zscore_grads_(weight)


def test_installed_version_is_one_that_the_extra_allows() -> None:
    extras = [Requirement(line) for line in requires("lightning-znorm") or ()]
    (allowed,) = {e.specifier for e in extras if e.name == "deepspeed" and "deepspeed" in str(e.marker)}
    assert version("deepspeed") in allowed
