"""What is used of GradScaler's insides: a release of torch without it is refused before the first step."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler, grad_scaler
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from lightning_znorm import ZNormCallback
from lightning_znorm.functional import attach
from lightning_znorm.gradients import UnsupportedGradientError, amp
from lightning_znorm.gradients.amp import check_grad_scaler
from tests.test_functional import ScalerAware


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    check_grad_scaler.cache_clear()
    yield
    check_grad_scaler.cache_clear()


def _without_scale(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(GradScaler, "_get_scale_async")


def _without_states(patch: pytest.MonkeyPatch) -> None:
    def init(self: GradScaler, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._states = self.__dict__.pop("_per_optimizer_states")

    original = GradScaler.__init__
    patch.setattr(GradScaler, "__init__", init)


def _without_found_inf(patch: pytest.MonkeyPatch) -> None:
    def unscale_(self: GradScaler, optimizer: Any) -> None:
        original(self, optimizer)
        del self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]

    original = GradScaler.unscale_
    patch.setattr(GradScaler, "unscale_", unscale_)


def _with_other_state(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def change(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(grad_scaler, "_refresh_per_optimizer_state", lambda: deepcopy(changes))

    return change


def _with_other_names_for_fused_optimizers(patch: pytest.MonkeyPatch) -> None:
    def step(self: GradScaler, optimizer: Any) -> None:
        optimizer.scale = self._get_scale_async()
        optimizer.step()

    patch.setattr(GradScaler, "step", step)


def _with_another_mark_of_fused_optimizers(patch: pytest.MonkeyPatch) -> None:
    def step(self: GradScaler, optimizer: Any) -> None:
        assert not hasattr(optimizer, "_unscales")
        self.unscale_(optimizer)  # and no step, for what is infinite

    patch.setattr(GradScaler, "step", step)


CHANGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "scale": (_without_scale, "_get_scale_async"),
    "states": (_without_states, "_per_optimizer_states"),
    "stage": (_with_other_state(found_inf_per_device={}), "'stage'"),
    "found inf": (_without_found_inf, "'found_inf_per_device'"),
    "stages": (_with_other_state(stage=0, found_inf_per_device={}), "whether gradients are unscaled"),
    "fused": (_with_other_names_for_fused_optimizers, "'grad_scale'"),
    "mark": (_with_another_mark_of_fused_optimizers, "was_given"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_refused(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    patch, message = CHANGES[change]
    patch(monkeypatch)
    with pytest.raises(
        UnsupportedGradientError, match=f"PyTorch .* does not keep gradients as .*GradScaler.*({message})"
    ):
        check_grad_scaler()


def test_scaler_of_this_release_is_as_before() -> None:
    seen: list[Optimizer] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer))
    check_grad_scaler()
    handle.remove()
    assert not seen  # hooks that a program has for all optimizers


@pytest.mark.parametrize(
    "make", [lambda weight: SGD([weight], lr=1.0, fused=True), lambda weight: ScalerAware([weight], lr=1.0)]
)
def test_attaching_to_what_unscales_in_its_step_looks_first(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    weight = nn.Parameter(torch.zeros(2))
    attach(make(weight))
    check_grad_scaler.cache_clear()
    _with_other_names_for_fused_optimizers(monkeypatch)
    attach(SGD([weight], lr=1.0))  # which the scaler unscales itself
    with pytest.raises(UnsupportedGradientError, match="GradScaler"):
        attach(make(weight))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_training_does_not_begin(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    scaler = GradScaler("cpu", enabled=enabled)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        plugins=MixedPrecision("16-mixed", "cpu", scaler) if enabled else None,
        callbacks=ZNormCallback(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    steps: list[Optimizer] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append(optimizer))
    # Nothing but our own look at it notices.
    monkeypatch.setattr(amp, "unscales_in_step", lambda optimizer: False)
    try:
        if enabled:
            with pytest.raises(UnsupportedGradientError, match="what it hands to fused optimizers"):
                trainer.fit(OneWeight(), DataLoader(torch.ones(2, 2)))
        else:
            trainer.fit(OneWeight(), DataLoader(torch.ones(2, 2)))
    finally:
        handle.remove()
    assert len(steps) == (not enabled)


class OneWeight(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def training_step(self, batch: Tensor) -> Tensor:
        return (self.weight * batch).square().sum()

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)
