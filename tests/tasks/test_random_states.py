import os
import random
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_znorm import ZNormCallback
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.data.augmentation import random_crop_and_flip
from lightning_znorm.tasks import ClassificationTask
from lightning_znorm.tasks.random_states import random_state, set_random_state
from tests.distributed import run_distributed
from tests.tasks.ddp_requeue import requeue
from tests.trainers import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
CPU = torch.device("cpu")


class AugmentedDigits(DigitsDataModule):
    def augment_batch(self, images):
        return random_crop_and_flip(images, padding=1)


class Stop(Callback):
    """Ends the process' training before a step."""

    def __init__(self, at: int, how: str = "exception") -> None:
        self.at = at
        self.how = how

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.at:
            if self.how == "exception":
                raise ValueError("stopped")
            os.kill(os.getpid(), signal.SIGTERM)


def task() -> ClassificationTask:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(), nn.Linear(16, 10))
    return ClassificationTask(
        network, num_classes=10, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3)
    )


def fit(
    folder, *callbacks: Callback, every: int | None = None, seed: int = 0, max_steps: int = -1, **fit
) -> LightningModule:
    """Six steps an epoch, in two epochs."""
    torch.manual_seed(seed)
    module = task()
    checkpoint = ModelCheckpoint(
        folder, save_last=True, save_top_k=-1, save_on_exception=True, every_n_train_steps=every
    )
    callbacks = (ZNormCallback(), *callbacks, checkpoint)
    run = trainer(max_epochs=2, max_steps=max_steps, enable_checkpointing=True, callbacks=list(callbacks))
    run.fit(module, datamodule=AugmentedDigits(batch_size=216), **fit)
    return module


def same(a: LightningModule, b: LightningModule) -> bool:
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def draws() -> list[object]:
    return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item(), random.gauss(0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> LightningModule:
    return fit(tmp_path_factory.mktemp("whole"))


def test_all_generators(tmp_path):
    random.gauss(0, 1)  # which draws two at a time, as NumPy does, and keeps the other
    np.random.randn()
    torch.save(random_state(CPU), tmp_path / "state")
    first = draws()
    assert draws() != first
    set_random_state(torch.load(tmp_path / "state", weights_only=True), CPU)
    assert draws() == first


class TestTask:
    @pytest.mark.parametrize(("every", "at"), [(4, 5), (4, 11), (None, 8)])
    def test_goes_on_with_its_random_numbers(self, whole, tmp_path, every, at):
        with pytest.raises(ValueError, match="stopped"):
            fit(tmp_path, Stop(at), every=every)
        (tmp_path / f"epoch={at // 6}-step={at}.ckpt").unlink(missing_ok=True)  # of the exception
        saved = {4: (at // 4 * 4), None: 6}[every]
        (path,) = tmp_path.glob(f"epoch=*-step={saved}.ckpt")
        assert same(fit(tmp_path, seed=1, ckpt_path=path), whole)

    def test_limited_by_steps(self, whole, tmp_path):
        with pytest.raises(ValueError, match="stopped"):
            fit(tmp_path, Stop(11), every=10)
        path = tmp_path / "epoch=1-step=10.ckpt"
        assert same(fit(tmp_path, seed=1, max_steps=12, ckpt_path=path), whole)

    def test_sigterm(self, whole, tmp_path):
        with pytest.raises(SIGTERMException):
            fit(tmp_path, Stop(8, "SIGTERM"), every=100)
        (path,) = tmp_path.glob("epoch=1-step=9.ckpt")  # the step is taken to its end
        assert same(fit(tmp_path, seed=1, ckpt_path=path), whole)

    def test_without_them_it_would_not(self, whole, tmp_path, monkeypatch):
        """As with a LightningModule of another kind."""
        monkeypatch.setattr(ClassificationTask, "on_load_checkpoint", lambda *_: None)
        with pytest.raises(ValueError, match="stopped"):
            fit(tmp_path, Stop(5), every=4)
        assert not same(fit(tmp_path, seed=1, ckpt_path=tmp_path / "epoch=0-step=4.ckpt"), whole)

    def test_a_checkpoint_runs_no_code(self, tmp_path):
        fit(tmp_path, every=4)
        for path in tmp_path.iterdir():
            assert get_unsafe_globals_in_checkpoint(path) == []
            assert torch.load(path)["random_states"]

    def test_a_new_training_draws_its_own(self, tmp_path):
        fit(tmp_path, every=4)
        trained = ClassificationTask.load_from_checkpoint(tmp_path / "last.ckpt", model=task().model)
        torch.manual_seed(5)
        trainer(max_steps=1, limit_val_batches=0).fit(trained, datamodule=AugmentedDigits(batch_size=216))
        state = torch.load(tmp_path / "last.ckpt")["random_states"][0]["torch"]
        assert not torch.equal(torch.get_rng_state(), state)

    def test_other_processes(self, tmp_path):
        fit(tmp_path, every=4)
        path = tmp_path / "epoch=0-step=4.ckpt"
        checkpoint = torch.load(path)
        checkpoint["random_states"] *= 2
        torch.save(checkpoint, path)
        with pytest.warns(UserWarning, match="random numbers of 2 processes, and 1 go on"):
            fit(tmp_path, ckpt_path=path)

    def test_a_process_whose_random_numbers_were_not_to_be_had(self):
        """The process that warns, the first, is the one that has its own."""
        module = task()
        module._trainer = SimpleNamespace(world_size=2, global_rank=0, strategy=None, optimizers=[])
        random.seed(1)
        module._loaded_states = [random_state(CPU), None]
        first = draws()
        with pytest.warns(UserWarning, match="random numbers of 1 processes, and 2 go on"):
            module.on_train_start()
        assert draws() == first

    @pytest.mark.parametrize("case", ["interrupted", "requeued", "neither"])
    def test_who_is_not_there_is_not_waited_for(self, monkeypatch, case):
        gathered = []
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_gather_object", lambda states, own: gathered.append(own))
        module, checkpoint = task(), {}
        module._trainer = SimpleNamespace(world_size=3, global_rank=1, interrupted=case == "interrupted")

        module.is_being_requeued = case == "requeued"
        module.on_save_checkpoint(checkpoint)
        assert len(gathered) == (case == "neither")
        assert [state is not None for state in checkpoint["random_states"]] == [False, True, False]

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
    @pytest.mark.parametrize("auto_requeue", [False, True])
    def test_whose_handler_is_watched(self, monkeypatch, auto_requeue):
        """Without Lightning's requeueing, a handler of the signal is the user's own."""
        environment = SLURMEnvironment(auto_requeue=auto_requeue, requeue_signal=signal.SIGUSR1)
        module = task()
        module._trainer = SimpleNamespace(strategy=SimpleNamespace(cluster_environment=environment))

        def handler(*_):
            pass

        former = signal.signal(signal.SIGUSR1, handler)
        try:
            module._watch_requeue_signal()
            assert (signal.getsignal(signal.SIGUSR1) is handler) == (not auto_requeue)
        finally:
            signal.signal(signal.SIGUSR1, former)

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
    @pytest.mark.parametrize(
        ("change", "moment"),
        [("as it is", "step"), ("renamed", "step"), ("wrapped", "step"), ("renamed", "sanity check")],
    )
    def test_a_signal_that_reaches_one_process(self, change, moment):
        """It saves alone, does not wait for the other, and trains on, whatever Lightning calls its handler."""
        first, other = run_distributed(requeue, change, moment)
        assert first == ([True, False], [True, True], True)
        assert other == ([], [], True)

    def test_older_checkpoints(self, tmp_path):
        fit(tmp_path, every=4)
        path = tmp_path / "epoch=0-step=4.ckpt"
        checkpoint = torch.load(path)
        del checkpoint["random_states"], checkpoint["AugmentedDigits"]
        torch.save(checkpoint, path)
        fit(tmp_path, ckpt_path=path)
