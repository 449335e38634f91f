"""A method attached to the optimizer of a Trainer of transformers, or of a loop of accelerate."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_znorm.functional import attach
from lightning_znorm.gradients import ZScore
from tests.gradients.reference import wide, zscore

# Others' warnings, of each other, are not what is tested.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[test]'")
    pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[test]'")
    import transformers
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

pytestmark = pytest.mark.filterwarnings("ignore")

LR = 0.1
EPS = 0.01  # not small beside the deviations, so that a wrong scale shows
BATCH_SIZE, STEPS = 8, 2

Weights = dict[str, Tensor]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.first(inputs).tanh())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "inputs": torch.randn(BATCH_SIZE, 6, generator=generator),
        "labels": torch.randint(3, (BATCH_SIZE,), generator=generator),
    }


def weights_of(model: nn.Module) -> Weights:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def check_step(step: int, before: Weights, after: Weights, tolerance: float = 1e-6) -> None:
    model = Network().double()
    model.load_state_dict({name: wide(weight) for name, weight in before.items()})
    given = batch(step)
    model(given["inputs"].double(), given["labels"])["loss"].backward()
    for name, param in model.named_parameters():
        expected = param.detach() - LR * zscore(param.grad, EPS)
        torch.testing.assert_close(wide(after[name]), expected, rtol=0, atol=tolerance)


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Recorder(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.weights: list[Weights] = []

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.weights.append(weights_of(model))

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.weights.append(weights_of(model))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        *(
            pytest.param(arguments, marks=pytest.mark.full)
            for arguments in ({"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}, {"bf16": True})
        ),
    ],
    ids=str,
)
def test_trainer(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model, recorder = Network(), Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    attach(optimizer, ZScore(EPS))
    batches = [batch(step) for step in range(STEPS)]
    samples = [{key: given[key][index] for key in given} for given in batches for index in range(BATCH_SIZE)]
    trainer = InOrder(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH_SIZE // arguments.get("gradient_accumulation_steps", 1),
            num_train_epochs=1,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=samples,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[recorder],
    )
    trainer.train()
    assert len(recorder.weights) == STEPS + 1
    for step in range(STEPS):
        check_step(step, *recorder.weights[step : step + 2], tolerance=1e-2 if "bf16" in arguments else 1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_accelerate_with_a_grad_scaler(fused: bool, unscale_first: bool) -> None:
    model = Network()
    before = weights_of(model)
    inner = torch.optim.SGD(model.parameters(), lr=LR, fused=fused)
    attach(inner, ZScore(EPS))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    Accelerator(cpu=True)  # which an AcceleratedOptimizer asks for the kind of run
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    scaler.scale(model(**batch(0))["loss"]).backward()
    if unscale_first:  # as clipping does
        scaler.unscale_(inner)
    optimizer.step()
    assert not optimizer.step_was_skipped
    check_step(0, before, weights_of(model))


def test_attach_too_late() -> None:

    model = Network()
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=LR))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer runs no hooks .*before it is wrapped"):
        attach(optimizer)
