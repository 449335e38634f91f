"""One callback over several runs, Trainers, copies and checkpoints; and where it has nothing to do."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_znorm import GradientCentralizationCallback, GradientTransform, ZNormCallback
from tests.callbacks.training import (
    LR,
    Training,
    amp,
    assert_every_step,
    assert_weights,
    batches,
    loss_of,
    network,
    stepped,
    weights_of,
)
from tests.gradients.reference import centralized, zscore

# This loader begins anew; the tests that resume give it equal batches.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")

EPS = 0.3


def z(grad: Tensor) -> Tensor:
    return zscore(grad, EPS)


def centralized_matrices(grad: Tensor) -> Tensor:
    return centralized(grad) if grad.ndim > 1 else grad


class Evaluating(Training):
    def validation_step(self, batch: Tensor) -> None:
        loss_of(self.net, batch)

    test_step = predict_step = validation_step


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
@pytest.mark.parametrize("used", [False, True], ids=["before-fit", "after-fit"])
@pytest.mark.parametrize(
    ("callback", "method"),
    [
        (ZNormCallback(EPS, exclude="*.bias"), z),
        (GradientCentralizationCallback(exclude="*.bias"), centralized_matrices),
        (GradientTransform(z, exclude="*.bias"), z),
    ],
    ids=["znorm", "centralization", "function"],
)
def test_copies_work(fit, callback, method, used: bool, duplicate: Callable[[Callback], Callback]) -> None:
    if used:
        fit(Training(), batches(1), callback)
    copied = duplicate(callback)
    module, data = Training(), batches(2)
    fit(module, data, copied)
    assert_every_step(module, data, method=method, chosen=lambda name: name != "first.bias")


def test_a_used_callback_holds_no_parameters(fit) -> None:
    callback = ZNormCallback()
    fit(Training(nn.Linear(6, 1000)), batches(1), callback)
    own = {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}  # Lightning's
    assert len(pickle.dumps(own)) < 2000


def test_copy_during_training_works(fit) -> None:
    callback, module, data = ZNormCallback(EPS), Training(), batches(2)
    copies = []

    class Copying(Callback):
        def on_train_batch_end(self, *_) -> None:
            copies.append(copy.deepcopy(callback))

    fit(module, data, callback, Copying())
    again = Training()
    fit(again, data, copies[0])
    assert_every_step(again, data, method=z)


@pytest.mark.parametrize("arguments", [dict, lambda: amp(init_scale=2.0**8)], ids=["32", "16-mixed"])
def test_one_callback_for_two_models(fit, arguments) -> None:
    callback, data = ZNormCallback(EPS, exclude="*.bias"), batches(2)
    bias = nn.Linear(6, 3)
    for net in (network(), bias):
        module = Training(net)
        fit(module, data, callback, **arguments())
        atol = 1e-3 if arguments() else 1e-6
        assert_every_step(module, data, atol, method=z, chosen=lambda name: not name.endswith("bias"))


def test_one_callback_after_a_run_that_failed(fit) -> None:
    class Failing(Training):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise RuntimeError("user's own")
            return super().training_step(batch, batch_idx)

    callback, data = ZNormCallback(EPS), batches(2)
    with pytest.raises(RuntimeError, match="user's own"):
        fit(Failing(), data, callback)
    module = Training(nn.Linear(6, 3))
    fit(module, data, callback)
    assert_every_step(module, data, method=z)


def test_a_model_trained_twice(fit) -> None:
    callback, module, data = ZNormCallback(EPS), Training(), batches(2)
    fit(module, data, callback)
    module.weights.clear()
    fit(module, data, callback)
    assert_every_step(module, data, method=z)


def test_validation_test_and_predict_are_left_alone(trainer, recwarn: pytest.WarningsRecorder) -> None:
    class ThirdParty(SingleDeviceStrategy):
        pass

    # A filter that does not fit, and any strategy, are no matter where nothing is trained.
    made = trainer(ZNormCallback(include="no such parameter"), strategy=ThirdParty(device=torch.device("cpu")))
    module, loader = Evaluating(), DataLoader(batches(2), batch_size=None)
    before = weights_of(module.net)
    made.validate(module, loader, verbose=False)
    made.test(module, loader, verbose=False)
    made.predict(module, loader)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(module.net).items())
    assert not [warning for warning in recwarn if "Callback" in str(warning.message)]


def test_validation_within_training(trainer) -> None:
    module, data = Evaluating(), batches(4)
    loader = DataLoader(data, batch_size=None)
    made = trainer(ZNormCallback(EPS), val_check_interval=1)
    made.fit(module, loader, loader)
    assert_every_step(module, data, method=z)


@pytest.mark.parametrize("arguments", [dict, lambda: amp(init_scale=2.0**8, growth_interval=3)], ids=["32", "16-mixed"])
@pytest.mark.parametrize("max_steps", [2, 3], ids=["end-of-epoch", "mid-epoch"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_training_is_the_uninterrupted_one(fit, trainer, tmp_path: Path, arguments, max_steps: int) -> None:
    def module() -> Training:
        return Training(optimizer=lambda own: SGD(own, LR, momentum=0.9))

    data = batches(1) * 2
    whole = module()
    fit(whole, data, ZNormCallback(), max_epochs=3, **arguments())

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(module(), data, ZNormCallback(), checkpoint, max_steps=max_steps, max_epochs=3, enable_checkpointing=True,
        **arguments())  # fmt: skip
    resumed = module()
    made = trainer(ZNormCallback(), checkpoint, max_epochs=3, enable_checkpointing=True, **arguments())
    made.fit(resumed, DataLoader(data, batch_size=None), ckpt_path=tmp_path / f"step={max_steps}.ckpt")

    assert len(resumed.weights) == 1 + 6 - max_steps
    for ours, reference in zip(resumed.weights, whole.weights[max_steps:], strict=True):
        for name, weight in reference.items():
            torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)
    assert resumed.scales == whole.scales[max_steps:]


def test_used_callback_resumes_in_the_middle_of_an_accumulation(fit, trainer, tmp_path: Path) -> None:
    """There, a backward pass comes before the first zero_grad."""

    class SaveAfter(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    callback, data = ZNormCallback(EPS), batches(1) * 4
    fit(Training(), data, callback, SaveAfter(), accumulate_grad_batches=2)
    resumed = Training()
    made = trainer(callback, accumulate_grad_batches=2)
    made.fit(resumed, DataLoader(data, batch_size=None), ckpt_path=tmp_path / "middle.ckpt")
    expected = stepped(resumed.net, resumed.weights[0], data[:1], z, accumulate=2)
    assert_weights(resumed.weights[1], expected)


def test_resuming_without_the_method_warns(fit, trainer, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit(Training(), batches(1), ZNormCallback(EPS, min_ndim=2), checkpoint, enable_checkpointing=True)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = (state for key, state in content["callbacks"].items() if "ZNorm" in key)
    assert state == {"method": "ZScore(eps=0.3)", "include": ["*"], "exclude": [], "min_ndim": 2}
    for callbacks in ([], [ZNormCallback(min_ndim=2)]):  # another eps is another method
        with pytest.warns(UserWarning, match="Please add the following callbacks.*ZNormCallback.*eps=0.3"):
            trainer(*callbacks).fit(
                Training(), DataLoader(batches(1), batch_size=None), ckpt_path=tmp_path / "last.ckpt"
            )


def test_twice_the_same_method_is_refused(trainer) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ZNormCallback`"):
        trainer(ZNormCallback(), ZNormCallback())
    trainer(ZNormCallback(include="net.0.*"), ZNormCallback(include="net.1.*"))


def test_subclass_with_attributes_of_its_own(fit) -> None:
    """Names that a user may choose for them are no properties without setters."""

    class Own(ZNormCallback):
        def __init__(self) -> None:
            super().__init__()
            self.label, self.name, self.action, self.advice, self.description = "mine", 1, 2, 3, 4

    callback = Own()
    fit(Training(), batches(2), callback)
    assert (callback.label, callback.name, callback.description) == ("mine", 1, 4)
