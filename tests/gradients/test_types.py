"""Gradients of types that torch computes no mean in: refused by name, with nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm import GradientMonitor, GradientTransform, SINGCallback, ZNormCallback
from lightning_znorm.functional import attach, centralize_grads_, transform_grads_, zscore_grads_
from lightning_znorm.gradients import SING, UnsupportedGradientError
from lightning_znorm.gradients.apply import check_finite
from lightning_znorm.gradients.slots import UnnamedSlots
from tests.callbacks.training import Training, batches

REFUSED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.uint8, torch.bool]


def with_gradient(dtype: torch.dtype, numel: int = 6) -> Tensor:
    values = (torch.arange(float(numel)) % 2).view(2, -1).to(dtype)
    made = nn.Parameter(values, requires_grad=dtype.is_floating_point or dtype.is_complex)
    made.grad = values.clone()
    return made


def stepped(parameters: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    attach(optimizer)
    optimizer.step()


USES: dict[str, Callable[[list[Tensor]], Any]] = {
    "zscore": zscore_grads_,
    "centralize": centralize_grads_,
    "sing": lambda parameters: transform_grads_(parameters, SING()),
    "function": lambda parameters: transform_grads_(parameters, torch.neg),
    "attached": stepped,
}


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
@pytest.mark.parametrize("use", USES)
def test_refused_before_anything_is_changed(use: str, dtype: torch.dtype) -> None:
    for numel in (6, 3000):
        parameters = [with_gradient(torch.float32, numel), with_gradient(dtype, numel)]
        before = [(one.detach().clone(), one.grad.clone()) for one in parameters if one.grad is not None]
        message = (
            rf"the gradient of parameter 1 .*is of type {dtype}, in which PyTorch takes neither means .*: keep it in"
        )
        with pytest.raises(UnsupportedGradientError, match=message):
            USES[use](parameters)
        for one, (value, grad) in zip(parameters, before, strict=True):
            assert one.grad is not None
            # Compared as bytes, because torch cannot compare numbers of some of these types.
            assert torch.equal(one.detach().view(torch.uint8), value.view(torch.uint8))
            assert torch.equal(one.grad.view(torch.uint8), grad.view(torch.uint8))


@pytest.mark.parametrize(
    "callback", [ZNormCallback, SINGCallback, GradientMonitor, lambda: GradientTransform(torch.neg)]
)
def test_refused_before_the_first_update_of_a_training(tmp_path, callback: Callable[[], Any]) -> None:
    class Eight(Training):
        def __init__(self) -> None:
            super().__init__()
            self.eight = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn))

        def on_train_start(self) -> None:
            pass

        def on_after_backward(self) -> None:
            self.eight.grad = torch.ones(3).to(torch.float8_e4m3fn)
            self.before = [one.detach().clone() for one in self.net.parameters()]

    module = Eight()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[callback()], log_every_n_steps=1, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(UnsupportedGradientError, match=r"the gradient of eight is of type torch.float8_e4m3fn"):
        trainer.fit(module, DataLoader(batches(1), batch_size=None))
    assert all(map(torch.equal, module.before, module.net.parameters()))


def test_frozen_ones_are_none_of_it() -> None:
    frozen = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)
    weight = with_gradient(torch.float32)
    zscore_grads_([frozen, weight])
    assert weight.grad is not None
    assert weight.grad.abs().tolist() == [[1.0] * 3] * 2


def test_the_look_for_nan_passes_them_over() -> None:
    check_finite(UnnamedSlots([with_gradient(torch.float8_e4m3fn), with_gradient(torch.float32)]))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.complex32, torch.complex64, torch.float64], ids=str
)
def test_taken(dtype: torch.dtype) -> None:
    weight = with_gradient(dtype)
    zscore_grads_(weight)
    assert weight.grad is not None
    assert weight.grad.to(torch.complex64).tolist() == [[-1, 1, -1], [1, -1, 1]]
