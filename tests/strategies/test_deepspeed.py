"""Normalization under DeepSpeed: every step is that of one process which sees the union of the processes' batches."""

import math
from importlib.metadata import requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from lightning_znorm.functional import zscore_grads_
from lightning_znorm.gradients import UnsupportedGradientError
from lightning_znorm.gradients.deepspeed import _ENGINE_NEEDS, DeepSpeedSource
from tests.gradients.reference import zscore
from tests.processes import run_python
from tests.strategies.deepspeed_reference import check, records, true_grads, updates_of
from tests.strategies.deepspeed_training import ALONE, REFUSED, RESUMED, SCENARIOS, STEPS, UNEVEN

deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(900)  # the first run compiles an extension of DeepSpeed's

SCRIPT = Path(__file__).with_name("deepspeed_training.py")
RUNS = [(name, 2) for name in SCENARIOS] + [(name, 3) for name in UNEVEN] + [(name, 1) for name in ALONE]


def run(directory: Path, processes: int, *names: str) -> Path:
    finished = run_python(SCRIPT, directory, str(processes), *names, timeout=800, DS_ACCELERATOR="cpu")
    assert finished.returncode == 0, finished.stdout
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes wrote down in all scenarios, which they run one after the other."""
    directory = tmp_path_factory.mktemp("deepspeed")
    run(directory, 2, *SCENARIOS, *RESUMED)
    run(directory, 3, *UNEVEN)
    return run(directory, 1, *ALONE, *REFUSED)


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_steps_are_those_of_one_process(runs: Path, name: str, processes: int) -> None:
    check(SCENARIOS[name], records(runs, name, processes)[0], processes)


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_weights_are_identical_in_all_processes(runs: Path, name: str, processes: int) -> None:
    first, *others = records(runs, name, processes)
    for other in others:
        for ours, theirs in zip(first["weights"], other["weights"], strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_frozen_and_unused_parameters_stay(runs: Path, name: str, processes: int) -> None:
    first, *_, last = records(runs, name, processes)[0]["weights"]
    stay = {"frozen.weight", "frozen.bias", "unused"}
    assert {key for key in first if torch.equal(first[key], last[key])} == stay


@pytest.mark.parametrize(
    ("name", "processes"), [run for run in RUNS if SCENARIOS[run[0]].overflowing_batch is not None]
)
def test_overflow_in_one_process_skips_the_step_in_all(runs: Path, name: str, processes: int) -> None:
    scenario = SCENARIOS[name]
    step = scenario.overflowing_batch // scenario.accumulate
    for record in records(runs, name, processes):
        before, after = record["weights"][step : step + 2]
        assert all(torch.equal(before[key], after[key]) for key in before)
        if "large_scale" in name:
            # No other step is skipped, although scaled z-scores are beyond the range of float16.
            assert record["scales"] == [2.0**16, 2.0**16, 2.0**15, 2.0**15]


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_number_of_collectives(runs: Path, name: str, processes: int) -> None:
    scenario = SCENARIOS[name]
    is_whole = processes == 1 or scenario.stage == 0 or "bf16_in_fp32_stage_1" in name or name.endswith("bf16_in_fp32")
    each = 0 if is_whole else 1 if scenario.centralize else 2
    counts = records(runs, name, processes)[0]["collectives"]
    before_the_step = [0] * (scenario.accumulate - 1)
    assert counts == [*before_the_step, each] * STEPS


def test_zscore_of_the_own_part_would_show(runs: Path) -> None:
    # The reference can tell the z-score of the gradient from z-scores of its halves.
    before = records(runs, "32_stage_3_accumulate_1", 2)[0]["weights"][0]
    grad = true_grads(SCENARIOS["32_stage_3_accumulate_1"], before, 0, 2)["first.weight"].view(-1)
    halves = torch.cat([zscore(half) for half in grad.tensor_split(2)])
    assert (zscore(grad) - halves).abs().max() > 0.01


def test_clipping_of_what_was_there_before_would_show(runs: Path) -> None:
    scenario = SCENARIOS["clip_stage_2"]
    grads = true_grads(scenario, records(runs, "clip_stage_2", 2)[0]["weights"][0], 0, 2)
    norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
    ours = math.sqrt(sum(grad.square().sum().item() for grad in updates_of(scenario, grads).values()))
    assert ours == pytest.approx(scenario.clip, rel=1e-4)
    assert norm < ours * 10  # with a factor from this norm, the step would be several times as long


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_goes_on_as_if_it_had_not_ended(runs: Path, name: str) -> None:
    for record in records(runs, name, 2):
        for part, start in (("half", 0), ("rest", STEPS)):
            for ours, theirs in zip(record["whole"][start : start + STEPS + 1], record[part], strict=True):
                assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not torch.equal(record["half"][-1]["head.weight"], record["rest"][-1]["head.weight"])


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_without_the_callback_warns(runs: Path, name: str) -> None:
    messages = records(runs, name, 2)[0]["warnings"]
    assert any("ZNormCallback" in message and "checkpoint" in message for message in messages)
    # Each step has its effect, although a process may hold nothing of a gradient.
    assert not [message for message in messages if message.startswith("ZNormCallback:")]


@pytest.mark.parametrize("name", REFUSED)
def test_configuration_is_refused_before_the_first_step(runs: Path, name: str) -> None:
    _, message = REFUSED[name]
    steps, _, reason = (runs / f"{name}.txt").read_text().partition(" ")
    assert steps == "0"
    with pytest.raises(UnsupportedGradientError, match=f"under DeepSpeed {message}"):
        raise UnsupportedGradientError(reason)


class DeepSpeedEngine(SimpleNamespace):
    """Says what the real one does that only a larger machine, or another optimizer, could set up."""

    def fp16_enabled(self) -> bool:
        return False


# What a plain engine says of itself.
SETTINGS = {
    "autotp_size": 0,
    "fp16_master_weights_and_gradients": False,
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
        DeepSpeedSource(nn.Linear(2, 2), made)


@pytest.mark.parametrize("cls", ["DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"])
def test_another_layout_of_the_optimizer_is_refused(cls: str) -> None:
    message = f"DeepSpeed {version('deepspeed')} keeps gradients otherwise.*{cls} has no .*groups"
    with pytest.raises(UnsupportedGradientError, match=message):
        DeepSpeedSource(nn.Linear(2, 2), engine(optimizer=instance_of(cls)))


@pytest.mark.parametrize("name", [*SETTINGS, "optimizer", "basic_optimizer"])
def test_engine_that_does_not_tell_a_setting_is_refused(name: str) -> None:
    DeepSpeedSource(nn.Linear(2, 2), engine())
    made = engine()
    delattr(made, name)
    with pytest.raises(UnsupportedGradientError, match=f"DeepSpeed .* keeps .* DeepSpeedEngine has no {name}"):
        DeepSpeedSource(nn.Linear(2, 2), made)


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
        DeepSpeedSource(nn.Linear(2, 2), made)


# What a plain optimizer of each stage holds of a model of one layer.
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
    },
}


@pytest.mark.parametrize(("name", "lacking"), [(name, key) for name, own in OPTIMIZERS.items() for key in own])
def test_optimizer_without_what_is_needed_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, lacking: str) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    DeepSpeedSource(LAYER, engine(optimizer=instance_of(name, **OPTIMIZERS[name])))
    made = instance_of(name, **OPTIMIZERS[name])
    delattr(made, lacking)
    with pytest.raises(UnsupportedGradientError, match=f"{name} has no {lacking}"):
        DeepSpeedSource(LAYER, engine(optimizer=made))


@pytest.mark.parametrize("lacking", ["ds_numel", "ds_process_group", "ds_shape", "partition_numel"])
def test_parameter_of_stage_3_without_what_is_needed_is_refused(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    model = nn.Linear(2, 2, bias=False)
    own = {"ds_numel": 4, "ds_process_group": None, "ds_shape": torch.Size([2, 2]), "partition_numel": lambda: 4}
    vars(model.weight).update(own)
    cls = "DeepSpeedZeroOptimizer_Stage3"
    optimizer = instance_of(cls, **OPTIMIZERS[cls] | {"fp16_groups": [[model.weight]]})
    DeepSpeedSource(model, engine(optimizer=optimizer))
    delattr(model.weight, lacking)
    with pytest.raises(UnsupportedGradientError, match=f"Parameter has no {lacking}"):
        DeepSpeedSource(model, engine(optimizer=optimizer))


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
