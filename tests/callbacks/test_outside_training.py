"""Steps before, beside and after training, several Trainers, and what remains after a run."""

import gc
import weakref

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm import GradientMonitor, ZNormCallback
from lightning_znorm.callbacks.strategies import gradient_adapter
from tests.callbacks.conftest import QUIET
from tests.callbacks.training import (
    OPTIMIZERS,
    Training,
    Weights,
    amp,
    assert_every_step,
    assert_weights,
    batches,
    loss_of,
    stepped,
    weights_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

ADAPTED = batches(2, seed=1)  # of which steps outside training are taken


class Adapting(Training):
    """Takes steps on other batches at given points, and writes down the weights before and after each.

    Args:
        where: Names of hooks.
    """

    def __init__(self, *where: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.where = where
        self.pairs: list[tuple[Weights, Weights, Tensor]] = []

    def adapt(self, where: str) -> None:
        if where not in self.where:
            return
        optimizer = self.optimizers()
        with torch.enable_grad():
            for batch in ADAPTED:
                before = weights_of(self.net)
                optimizer.zero_grad()
                loss_of(self.net, batch).backward()
                optimizer.step()
                self.pairs.append((before, weights_of(self.net), batch))
        optimizer.zero_grad()

    def assert_adapted(self, times: int, **how) -> None:
        assert len(self.pairs) == len(ADAPTED) * times
        for before, after, batch in self.pairs:
            assert_weights(after, stepped(self.net, before, [batch], **how))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        return optimizer.step()

    def on_fit_start(self) -> None:
        self.adapt("on_fit_start")

    def on_train_epoch_end(self) -> None:
        self.adapt("on_train_epoch_end")

    def on_fit_end(self) -> None:
        self.adapt("on_fit_end")

    def validation_step(self, batch: Tensor) -> None:
        self.adapt("validation_step")

    def test_step(self, batch: Tensor) -> None:
        self.adapt("test_step")

    def predict_step(self, batch: Tensor) -> Tensor:
        self.adapt("predict_step")
        return batch

    def teardown(self, stage: str) -> None:
        self.adapt("teardown")


def loader(data: list[Tensor]) -> DataLoader:
    return DataLoader(data, batch_size=None)


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    ("where", "times"),
    [("on_fit_start", 1), ("on_train_epoch_end", 2), ("validation_step", 3), ("on_fit_end", 1), ("teardown", 1)],
)
def test_in_fit(trainer, where: str, times: int, automatic: bool) -> None:
    """A sanity check comes before the two epochs."""
    module, data = Adapting(where), batches(2)
    module.automatic_optimization = automatic
    monitor = GradientMonitor()
    made = trainer(monitor, ZNormCallback(), max_epochs=2, inference_mode=False, log_every_n_steps=1)
    made.fit(module, loader(data), loader(data[:1]))
    module.assert_adapted(times)
    assert_weights(module.weights[1], stepped(module.net, module.weights[0], data[:1]))
    if where != "on_train_epoch_end":
        assert monitor._history.steps == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
def test_steps_that_lightning_skips_leave_the_scaler_alone(trainer, kind: str) -> None:
    """In automatic optimization, a step without a closure is none under a scaler."""
    runs = []
    for callbacks in ([ZNormCallback()], []):
        module, data = Adapting("validation_step", optimizer=OPTIMIZERS[kind]), batches(4)
        made = trainer(*callbacks, val_check_interval=2, inference_mode=False, **amp(init_scale=2.0**10))
        made.fit(module, loader(data), loader(data[:1]))
        assert all(torch.equal(before[name], after[name]) for before, after, _ in module.pairs for name in before)
        runs.append(module)
    assert runs[0].scales == runs[1].scales
    assert_every_step(runs[0], data, atol=1e-3)


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_in_other_functions(trainer, function: str) -> None:
    module, data = Adapting(f"{function.replace('validate', 'validation')}_step"), batches(2)
    made = trainer(GradientMonitor(), ZNormCallback(min_ndim=2), inference_mode=False, log_every_n_steps=1)
    made.fit(module, loader(data))
    getattr(made, function)(module, loader(data))
    module.assert_adapted(2, chosen=lambda name: name.endswith("weight"))


def test_after_fit(fit) -> None:
    module = Adapting("later")
    callback = ZNormCallback()
    fit(module, batches(1), callback, GradientMonitor(), log_every_n_steps=1)
    module.adapt("later")
    module.assert_adapted(1)
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None


def test_strategy_and_patterns_are_checked_where_the_first_step_is(trainer) -> None:
    class ThirdParty(SingleDeviceStrategy):
        pass

    for callback, options, error, message in [
        (ZNormCallback(), {"strategy": ThirdParty(device=torch.device("cpu"))}, MisconfigurationException, "ThirdPar"),
        (ZNormCallback(include="net.fist.*"), {}, ValueError, r"ZNormCallback: the pattern 'net\.fist\.\*' matches no"),
    ]:
        module = Adapting("test_step")
        made = trainer(callback, inference_mode=False, **options)
        made.strategy.connect(module)
        module.trainer = made
        made.strategy.optimizers = [module.configure_optimizers()]
        with pytest.raises(error, match=message):
            made.test(module, loader(batches(1)))
        assert not module.pairs


def test_strategy_that_has_no_engine_is_named_with_the_hook() -> None:
    module = Training()
    strategy = object.__new__(DeepSpeedStrategy)  # which needs an accelerator to be made
    for lightning_module in (None, module):
        strategy._lightning_module, strategy._model = lightning_module, None
        message = r"DeepSpeedStrategy keeps gradients in its engine, and has no engine at this on_before_optimizer_step"
        with pytest.raises(RuntimeError, match=message):
            gradient_adapter(module, strategy)


def test_model_that_is_set_up_anew(fit) -> None:
    """In the middle of a training, in which no optimizer steps a parameter of before."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    class Growing(Training):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                torch.manual_seed(1)
                self.net = nn.Sequential(nn.Linear(6, 3, bias=False))
                self.trainer.strategy.model = Wrapper(self)
                self.trainer.strategy.setup_optimizers(self.trainer)
                self.weights = [weights_of(self.net)]

    module, data = Growing(), batches(2)
    fit(module, data, ZNormCallback(), max_epochs=2)
    assert_every_step(module, data)


# Several Trainers


@pytest.mark.parametrize("callback_class", [ZNormCallback, GradientMonitor])
@pytest.mark.parametrize("function", ["fit", "validate"])
def test_one_callback_in_two_trainers_at_once(fit, trainer, callback_class, function: str) -> None:
    class Nesting(Training):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            getattr(trainer(callback), function)(Adapting(), loader(batches(1)))
            return super().training_step(batch, batch_idx)

    callback = callback_class()
    with pytest.raises(
        MisconfigurationException, match=f"{callback_class.__name__} is in use by a Trainer that is still running"
    ):
        fit(Nesting(), batches(1), callback, log_every_n_steps=1)
    # Later it is free again.
    module, data = Training(), batches(2)
    fit(module, data, callback, log_every_n_steps=1)
    assert all(module.moved)


def test_refused_trainer_takes_nothing_from_the_other(fit, trainer) -> None:
    class Nesting(Training):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            with pytest.raises(MisconfigurationException, match="in use by a Trainer"):
                trainer(callback).fit(Training(), loader(batches(1)))
            return super().training_step(batch, batch_idx)

    callback, module, data = ZNormCallback(), Nesting(), batches(2)
    fit(module, data, callback)
    assert_every_step(module, data)


def test_callback_is_free_after_a_failure_of_which_it_has_not_heard(fit) -> None:
    class Failing(Callback):
        def on_train_start(self, *_) -> None:
            raise RuntimeError("first")

        def on_exception(self, *_) -> None:
            raise RuntimeError("second")

    callback, data = ZNormCallback(), batches(2)
    with pytest.raises(RuntimeError, match="second"):
        fit(Training(), data, Failing(), callback)
    module = Training()
    fit(module, data, callback)
    assert_every_step(module, data)


@pytest.mark.parametrize(
    "where",
    [
        None,
        *(
            pytest.param(hook, marks=pytest.mark.full)
            for hook in ("training_step", "on_fit_start", "configure_optimizers", "on_fit_end")
        ),
    ],
)
@pytest.mark.parametrize("callback_class", [ZNormCallback, GradientMonitor])
def test_callback_does_not_keep_the_model_alive(tmp_path, callback_class, where: str | None) -> None:
    callback = callback_class()

    def run() -> list[weakref.ref]:
        module = Adapting("on_fit_start")
        if where is not None:
            setattr(module, where, lambda *_: 1 / 0)
        made = Trainer(
            callbacks=[callback], accelerator="cpu", max_epochs=1, enable_checkpointing=False,
            default_root_dir=tmp_path, log_every_n_steps=1, **QUIET,
        )  # fmt: skip
        try:
            made.fit(module, loader(batches(1)))
        except ZeroDivisionError:
            assert where is not None
        return [weakref.ref(module), weakref.ref(made)]

    references = run()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
