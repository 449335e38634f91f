"""`LastCheckpoint`: complete, of every finished epoch, where Lightning and the command line look for it."""

import copy
import gc
import logging
import pickle
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import pytorch_lightning
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_znorm import LastCheckpoint
from lightning_znorm.cli.checkpoints import last_checkpoint
from tests.callbacks.last_checkpoint_training import Falling, again, fit, refused, resumed, train
from tests.distributed import run_distributed
from tests.fsdp import needs_fsdp2_on_cpu
from tests.own_module import OwnLogger

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers|The `?srun`? command"),
    pytest.mark.filterwarnings("ignore:Trainer already configured with model summary|The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed|.*could not find the monitored key"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
STEPS = 4  # of an epoch


class Died(BaseException):
    """Ends training as a killed process does."""


class Raises(Callback):
    """Raises in a hook of an epoch."""

    def __init__(self, hook: str, epoch: int, error: BaseException) -> None:
        def raises(trainer: Any, *args: Any) -> None:
            if trainer.current_epoch == epoch and not (hook.endswith("batch_end") and args[-1] == 0):
                raise error

        setattr(self, hook, raises)


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def place(path: Path) -> tuple[int, int]:
    """Return epoch and step of a checkpoint."""
    content = saved(path)
    return content["epoch"], content["global_step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_not_only_of_improving_epochs(tmp_path: Path) -> None:
    lightnings = ModelCheckpoint(tmp_path / "theirs", monitor="other", mode="max", save_last=True)
    train(tmp_path, lightnings)
    assert place(tmp_path / "theirs/last.ckpt") == (0, STEPS)  # what this callback is for
    assert place(tmp_path / "last.ckpt") == (2, 3 * STEPS)
    assert place(tmp_path / "best.ckpt") == (0, STEPS)
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", "theirs"]


@pytest.mark.parametrize(
    ("options", "extra", "expected"),
    [
        ({"max_steps": 6, "max_epochs": -1}, (), (1, 6)),  # in the middle of the second epoch
        ({"max_epochs": 9}, (EarlyStopping("score", mode="max", patience=2),), (2, 3 * STEPS)),
        ({"check_val_every_n_epoch": 2}, (), (2, 3 * STEPS)),  # the last epoch is not validated
        ({"val_check_interval": 2}, (), (2, 3 * STEPS)),
        ({"limit_val_batches": 0}, (), (2, 3 * STEPS)),
        ({"accumulate_grad_batches": 3}, (), (2, 6)),
    ],
    ids=["max_steps", "early stopping", "some validated", "validated twice", "not validated", "accumulated"],
)
def test_however_epochs_end(
    tmp_path: Path, options: dict[str, Any], extra: tuple[Callback, ...], expected: tuple[int, int]
) -> None:
    trainer = train(tmp_path, *extra, **options)
    assert place(tmp_path / "last.ckpt") == expected
    assert trainer.global_step == expected[1]


@pytest.mark.parametrize(
    ("hook", "error", "expected"),
    [
        ("on_train_batch_end", Died(), (0, STEPS)),
        ("on_train_batch_end", KeyboardInterrupt(), (0, STEPS)),
        ("on_validation_end", RuntimeError("broken"), (0, STEPS)),
        ("on_train_epoch_end", RuntimeError("broken"), (0, STEPS)),  # the epoch's metrics are not in the logs yet
        ("on_train_end", RuntimeError("broken"), (2, 3 * STEPS)),
    ],
)
def test_interrupted(tmp_path: Path, hook: str, error: BaseException, expected: tuple[int, int]) -> None:
    epoch = 3 if hook == "on_train_end" else 1
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
        train(tmp_path, Raises(hook, epoch, error), num_sanity_val_steps=0)
    assert place(tmp_path / "last.ckpt") == expected
    # And on from there.
    assert train(tmp_path, ckpt_path="last").global_step == 3 * STEPS
    assert place(tmp_path / "last.ckpt") == (2, 3 * STEPS)
    assert names(tmp_path) == ["best.ckpt", "last.ckpt"]


def test_told_to_end_between_two_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a SIGTERM, Lightning raises when the epoch's metrics are in the logs."""

    class Told(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer._signal_connector.received_sigterm = trainer.current_epoch == 1

    with pytest.raises(SIGTERMException):
        train(tmp_path, Told())
    assert place(tmp_path / "last.ckpt") == (1, 2 * STEPS)


def test_nothing_of_a_try(tmp_path: Path) -> None:
    train(tmp_path, fast_dev_run=True)
    assert names(tmp_path) == []


def test_holds_what_other_callbacks_keep(tmp_path: Path) -> None:
    """The state is of the same epoch, although `train` lists this callback before the `ModelCheckpoint`."""
    train(tmp_path, limit_val_batches=1, max_epochs=1)
    (state,) = (value for key, value in saved(tmp_path / "last.ckpt")["callbacks"].items())
    assert float(state["best_model_score"]) == 1


@pytest.mark.parametrize(
    "logger",
    [
        lambda path: CSVLogger(path),
        lambda path: CSVLogger(path, name="name", version="mine"),
        lambda path: TensorBoardLogger(path),
        lambda path: OwnLogger("x5i32th9", f"{path}/remote"),  # as W&B's
        lambda path: OwnLogger(3, f"{path}/remote"),
        lambda path: OwnLogger("x5i32th9", save_dir=None),
        lambda path: OwnLogger(None, f"{path}/remote", name=None),
        lambda path: False,
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_the_folder_of_lightnings_checkpoints(
    trainer: Callable[..., Any], tmp_path: Path, logger: Callable[[Path], Logger | bool]
) -> None:
    best, last = ModelCheckpoint(monitor="score", mode="max"), LastCheckpoint()
    data = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)
    options = {"logger": logger(tmp_path), "enable_checkpointing": True, "log_every_n_steps": 1}
    trainer(last, best, **options, max_epochs=2).fit(Falling(), data, data)
    assert Path(last.last_model_path).parent == Path(str(best.dirpath))
    assert place(Path(last.last_model_path)) == (1, 2 * STEPS)
    # Lightning finds it, also where there is no other checkpoint callback.
    again = trainer(LastCheckpoint(), **options, max_epochs=3)
    again.fit(Falling(), data, data, ckpt_path="last")
    assert Path(again.ckpt_path) == Path(last.last_model_path)
    assert place(Path(last.last_model_path)) == (2, 3 * STEPS)


class TestFolder:
    def test_of_a_model_checkpoint_that_names_one(self, tmp_path: Path) -> None:
        train(tmp_path / "named")
        assert names(tmp_path) == ["named"]
        named = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "named")}}
        settings = {"callbacks": [{"class_path": "lightning_znorm.LastCheckpoint", "init_args": {}}, named]}
        beside_logs = tmp_path / "lightning_logs/version_0/checkpoints"  # of another experiment, and newer
        beside_logs.mkdir(parents=True)
        (beside_logs / "last.ckpt").touch()
        settings["default_root_dir"] = str(tmp_path)
        assert last_checkpoint(settings) == tmp_path / "named/last.ckpt"

    def test_of_its_own(self, trainer: Callable[..., Any], tmp_path: Path) -> None:
        data = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)
        last = LastCheckpoint(tmp_path / "mine")
        trainer(last, enable_checkpointing=True).fit(Falling(), data, data)
        assert names(tmp_path / "mine") == ["last.ckpt"]
        settings = {"class_path": "lightning_znorm.LastCheckpoint", "init_args": {"dirpath": str(tmp_path / "mine")}}
        assert last_checkpoint({"callbacks": settings}) == tmp_path / "mine/last.ckpt"

    def test_that_is_not_local(self, tmp_path: Path, trainer: Callable[..., Any]) -> None:
        files = fsspec.filesystem("memory")
        data = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)
        trainer(LastCheckpoint("memory://remote"), enable_checkpointing=True, max_epochs=3).fit(Falling(), data, data)
        assert files.ls("/remote", detail=False) == ["/remote/last.ckpt"]
        with files.open("/remote/last.ckpt") as file:
            assert torch.load(file, weights_only=True)["epoch"] == 2

    def test_another_training_is_kept(self, tmp_path: Path) -> None:
        train(tmp_path)
        train(tmp_path, max_epochs=1)
        train(tmp_path, max_epochs=2, ckpt_path=str(tmp_path / "last-v1.ckpt"))
        assert place(tmp_path / "last.ckpt") == (2, 3 * STEPS)
        assert place(tmp_path / "last-v1.ckpt") == (1, 2 * STEPS)
        train(tmp_path, max_epochs=2, ckpt_path=str(tmp_path / "best.ckpt"))
        assert place(tmp_path / "last.ckpt") == (2, 3 * STEPS)
        assert names(tmp_path) == ["best.ckpt", "last-v1.ckpt", "last-v2.ckpt", "last.ckpt"]

    def test_two_for_one_folder_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="more than one stateful callback of type `LastCheckpoint`"):
            train(tmp_path, LastCheckpoint())
        train(tmp_path, LastCheckpoint(tmp_path / "other"))
        assert place(tmp_path / "other/last.ckpt") == place(tmp_path / "last.ckpt") == (2, 3 * STEPS)

    @pytest.mark.parametrize(
        "callbacks",
        [
            lambda path: (LastCheckpoint(path), LastCheckpoint(f"{path}/")),
            lambda path: (LastCheckpoint(), ModelCheckpoint(path), LastCheckpoint(path)),
            lambda path: (LastCheckpoint(path), LastCheckpoint(), ModelCheckpoint(path)),
            lambda path: (LastCheckpoint(path), LastCheckpoint(linked(path))),
            lambda path: (LastCheckpoint("memory://two"), LastCheckpoint("memory://two/")),
        ],
        ids=["slash", "default", "default last", "link", "not local"],
    )
    def test_two_whose_folders_turn_out_to_be_one_are_refused(
        self, tmp_path: Path, callbacks: Callable[[Path], tuple[Callback, ...]]
    ) -> None:
        first_step = FirstStep()
        with pytest.raises(MisconfigurationException, match=r"^Two LastCheckpoint callbacks .* different dirpaths\.$"):
            fit(*callbacks(tmp_path / "one"), first_step)
        assert not first_step.seen


class FirstStep(Callback):
    """Records whether there is a step."""

    seen = False

    def on_train_batch_start(self, *args: Any) -> None:
        self.seen = True


def linked(folder: Path) -> Path:
    folder.mkdir()
    link = folder.with_name("link")
    link.symlink_to(folder)
    return link


class OtherName(ModelCheckpoint):
    CHECKPOINT_NAME_LAST = "{epoch}-last"


class TestBesideAnotherThatWritesTheSameFile:
    @pytest.mark.parametrize("save_last", [True, "link"])
    @pytest.mark.parametrize("default", [True, False])
    @pytest.mark.parametrize("order", [1, -1])
    def test_is_refused(self, tmp_path: Path, save_last: Any, default: bool, order: int) -> None:
        folder = None if default else tmp_path / "one"
        other = ModelCheckpoint(folder, every_n_train_steps=1, save_last=save_last)
        callbacks = [LastCheckpoint(folder), other][::order]
        first_step = FirstStep()
        message = rf"^ModelCheckpoint\(save_last={save_last!r}\) .* take save_last out of it\.$"
        with pytest.raises(MisconfigurationException, match=message):
            fit(*callbacks, first_step, default_root_dir=tmp_path)
        assert not first_step.seen

    def test_is_refused_where_its_folder_is_known_late(self, tmp_path: Path) -> None:
        class Late(ModelCheckpoint):
            def on_fit_start(self, *args: Any) -> None:
                self.dirpath = str(tmp_path / "one")

        with pytest.raises(MisconfigurationException, match=r"^Late\(save_last=True\) "):
            fit(LastCheckpoint(tmp_path / "one"), Late(tmp_path / "two", save_last=True))

    def test_is_refused_where_it_is_not_local(self) -> None:
        with pytest.raises(MisconfigurationException, match=r"^ModelCheckpoint\(save_last=True\) "):
            fit(LastCheckpoint("memory://both"), ModelCheckpoint("memory://both/", save_last=True))

    def test_is_refused_where_that_is_the_name_of_its_best(self, tmp_path: Path) -> None:
        message = r"^ModelCheckpoint\(filename='last'\) .* give it another filename\.$"
        with pytest.raises(MisconfigurationException, match=message):
            train(tmp_path, ModelCheckpoint(tmp_path, filename="last", monitor="other"))

    def test_a_number_is_no_clash_without_versions(self, tmp_path: Path) -> None:
        numbered = ModelCheckpoint(tmp_path, filename="last-v1", monitor="other")
        with pytest.raises(MisconfigurationException, match=r"writes last-v1\.ckpt, and so may LastCheckpoint in"):
            fit(LastCheckpoint(tmp_path), numbered)
        fit(LastCheckpoint(tmp_path, enable_version_counter=False), numbered)
        assert names(tmp_path) == ["last-v1.ckpt", "last.ckpt"]

    def test_is_refused_in_a_fast_dev_run_too(self, tmp_path: Path) -> None:
        """Such a run should find mistakes, and Lightning's callback writes its last.ckpt in it."""
        with pytest.raises(MisconfigurationException, match="take save_last out of it"):
            fit(LastCheckpoint(tmp_path), ModelCheckpoint(tmp_path, save_last=True), fast_dev_run=True)
        fit(LastCheckpoint(tmp_path), fast_dev_run=True)
        assert names(tmp_path) == []

    def test_other_names_are_legal(self, tmp_path: Path) -> None:
        instance = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=0, save_last=True)
        instance.CHECKPOINT_NAME_LAST = "newest"
        extension = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=0, save_last=True)
        extension.FILE_EXTENSION = ".pt"
        nothing = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=2, save_top_k=0)
        subclass = OtherName(tmp_path, monitor="other", mode="max", save_last=True, filename="lasting")
        train(tmp_path, subclass, instance, extension, nothing)
        assert place(tmp_path / "last.ckpt") == (2, 3 * STEPS)
        expected = ["best.ckpt", "epoch=0-last.ckpt", "last.ckpt", "last.pt", "lasting.ckpt", "newest.ckpt"]
        assert names(tmp_path) == expected


class TestReused:
    def test_by_another_trainer_elsewhere(self, tmp_path: Path) -> None:
        last = LastCheckpoint()
        fit(last, default_root_dir=tmp_path / "first")
        fit(last, default_root_dir=tmp_path / "second", max_epochs=1)
        assert place(tmp_path / "first/checkpoints/last.ckpt") == (2, 3 * STEPS)
        assert place(tmp_path / "second/checkpoints/last.ckpt") == (0, STEPS)
        assert Path(last.last_model_path) == tmp_path / "second/checkpoints/last.ckpt"

    @pytest.mark.parametrize("given", [True, False])
    def test_by_another_trainer_in_the_same_folder(self, tmp_path: Path, given: bool) -> None:
        last = LastCheckpoint(tmp_path / "checkpoints" if given else None)
        fit(last, default_root_dir=tmp_path)
        fit(last, default_root_dir=tmp_path, max_epochs=1)
        assert place(tmp_path / "checkpoints/last.ckpt") == (2, 3 * STEPS)
        assert place(tmp_path / "checkpoints/last-v1.ckpt") == (0, STEPS)
        fit(last, default_root_dir=tmp_path, max_epochs=2, ckpt_path=str(tmp_path / "checkpoints/last-v1.ckpt"))
        assert place(tmp_path / "checkpoints/last-v1.ckpt") == (1, 2 * STEPS)
        assert names(tmp_path / "checkpoints") == ["last-v1.ckpt", "last.ckpt"]

    def test_beside_a_reused_checkpoint_of_lightning(self, tmp_path: Path) -> None:
        """A reused `ModelCheckpoint` stays in its first folder."""
        last, best = LastCheckpoint(), ModelCheckpoint(filename="best", save_top_k=0)
        fit(last, best, default_root_dir=tmp_path / "first")
        fit(last, best, default_root_dir=tmp_path / "second", max_epochs=1)
        assert place(tmp_path / "first/checkpoints/last.ckpt") == (2, 3 * STEPS)
        assert place(tmp_path / "first/checkpoints/last-v1.ckpt") == (0, STEPS)

    @pytest.mark.parametrize("between", ["nothing", "a test", "a test of another trainer"])
    def test_by_the_same_trainer(self, tmp_path: Path, between: str) -> None:
        last = LastCheckpoint()
        trainer = fit(last, default_root_dir=tmp_path, max_epochs=1)
        if between != "nothing":
            data = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)
            others = fit(default_root_dir=tmp_path / "other", max_epochs=0, enable_checkpointing=False)
            others.callbacks.append(last)
            (trainer if between == "a test" else others).validate(Falling(), data, verbose=False)
        trainer.fit_loop.max_epochs = 3
        again(trainer)
        assert place(tmp_path / "checkpoints/last.ckpt") == (2, 3 * STEPS)
        assert names(tmp_path / "checkpoints") == ["last.ckpt"]

    def test_keeps_no_trainer_alive(self, tmp_path: Path) -> None:
        last = LastCheckpoint()
        trainer = weakref.ref(fit(last, default_root_dir=tmp_path, max_epochs=1))
        del last.log, last.log_dict  # by which Lightning ties every callback to the module
        gc.collect()
        assert trainer() is None

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda last: pickle.loads(pickle.dumps(last))])
    def test_can_be_copied(self, tmp_path: Path, duplicate: Callable[[LastCheckpoint], LastCheckpoint]) -> None:
        last = LastCheckpoint()
        trainer = fit(last, default_root_dir=tmp_path)
        fit(duplicate(last), default_root_dir=tmp_path / "second", max_epochs=1)
        assert place(tmp_path / "checkpoints/last.ckpt") == (2, 3 * STEPS)
        assert place(tmp_path / "second/checkpoints/last.ckpt") == (0, STEPS)
        assert trainer.current_epoch == 3


class Fails(Callback):
    """Fails in the given hooks."""

    def __init__(self, *hooks: str) -> None:
        self.hooks = hooks

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.fail("setup")

    def on_exception(self, *args: Any) -> None:
        self.fail("on_exception")

    def fail(self, hook: str) -> None:
        if hook in self.hooks:
            raise RuntimeError(hook)


class BreaksAfterSaving(LastCheckpoint):
    """Fails in epoch 1, before that epoch's metrics are in the logs."""

    breaks = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.breaks and trainer.current_epoch == 1:
            raise RuntimeError("broken")


class TestAfterAnotherFailedInOnException:
    """Another callback raised first, so this one did not hear of the exception."""

    @pytest.fixture
    def fails(self) -> Fails:
        return Fails("on_exception")

    @pytest.fixture
    def last(self, tmp_path: Path, fails: Fails) -> LastCheckpoint:
        last = BreaksAfterSaving()
        with pytest.raises(RuntimeError, match="on_exception"):
            fit(fails, last, default_root_dir=tmp_path)
        assert place(tmp_path / "checkpoints/last.ckpt") == (0, STEPS)
        last.breaks = False
        return last

    def test_the_next_training_resumes(self, tmp_path: Path, last: LastCheckpoint) -> None:
        assert fit(last, default_root_dir=tmp_path, ckpt_path="last").global_step == 3 * STEPS
        assert place(tmp_path / "checkpoints/last.ckpt") == (2, 3 * STEPS)
        assert names(tmp_path / "checkpoints") == ["last.ckpt"]

    def test_the_next_training_is_elsewhere(self, tmp_path: Path, last: LastCheckpoint) -> None:
        fit(last, default_root_dir=tmp_path / "second")
        assert place(tmp_path / "checkpoints/last.ckpt") == (0, STEPS)
        assert names(tmp_path / "second/checkpoints") == ["last.ckpt"]

    def test_the_next_training_does_not_start(self, tmp_path: Path, last: LastCheckpoint) -> None:
        with pytest.raises(RuntimeError, match="setup"):
            fit(Fails("setup"), last, default_root_dir=tmp_path)
        with pytest.raises(RuntimeError, match="sanity"):
            fit(last, Raises("on_sanity_check_start", 0, RuntimeError("sanity")), default_root_dir=tmp_path)
        assert place(tmp_path / "checkpoints/last.ckpt") == (0, STEPS)


def test_under_the_other_package_name(tmp_path: Path) -> None:
    made = pytorch_lightning.Trainer(accelerator="cpu", callbacks=[LastCheckpoint()], default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"LastCheckpoint is a callback of lightning\.pytorch"):
        LastCheckpoint().setup(made, None, "fit")


class SlowIO(TorchCheckpointIO):
    """Writes slowly."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.2)
        super().save_checkpoint(*args, **kwargs)


class WrapperIO(CheckpointIO):
    """Wraps another plugin."""

    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        self.checkpoint_io = checkpoint_io

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoint_io.save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoint_io.remove_checkpoint(*args, **kwargs)


class TestWrittenByAThread:
    """Plugins that write after `Trainer.save_checkpoint` has returned."""

    @pytest.mark.parametrize(
        "plugin",
        [
            pytest.param(lambda: AsyncCheckpointIO(SlowIO()), id="bare"),
            pytest.param(lambda: AsyncCheckpointIO(WrapperIO(SlowIO())), id="wraps", marks=pytest.mark.full),
            pytest.param(lambda: WrapperIO(AsyncCheckpointIO(SlowIO())), id="wrapped", marks=pytest.mark.full),
            pytest.param(lambda: AsyncCheckpointIO(AsyncCheckpointIO(SlowIO())), id="both", marks=pytest.mark.full),
        ],
    )
    def test_is_waited_for(self, tmp_path: Path, plugin: Callable[[], CheckpointIO]) -> None:
        seen = []

        class Reads(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if trainer.current_epoch and not batch_idx:
                    seen.append(place(tmp_path / "last.ckpt"))

        train(tmp_path, Reads(), plugins=[plugin()], max_epochs=2)
        assert train(tmp_path, Reads(), plugins=[plugin()], ckpt_path="last").global_step == 3 * STEPS
        assert seen == [(0, STEPS), (1, 2 * STEPS)]
        assert place(tmp_path / "last.ckpt") == (2, 3 * STEPS)
        assert names(tmp_path) == ["best.ckpt", "last.ckpt"]

    def test_with_the_plugin_as_it_is(self, tmp_path: Path) -> None:
        fit(LastCheckpoint(tmp_path), plugins=[AsyncCheckpointIO()])
        assert place(tmp_path / "last.ckpt") == (2, 3 * STEPS)

    def test_where_the_thread_fails(self, tmp_path: Path) -> None:
        class FailsIO(TorchCheckpointIO):
            def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                time.sleep(0.2)
                raise OSError("the disk is full")

        with pytest.raises(OSError, match="the disk is full"):
            fit(LastCheckpoint(tmp_path), plugins=[AsyncCheckpointIO(FailsIO())])

    def test_where_nobody_knows_when(self, tmp_path: Path) -> None:
        class LaterIO(TorchCheckpointIO):
            def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                pass

        path = tmp_path / ".last.ckpt.new"
        with pytest.raises(RuntimeError, match=rf"^LaterIO had not written {path} when "):
            fit(LastCheckpoint(tmp_path), plugins=[LaterIO()])


class FolderIO(TorchCheckpointIO):
    """Saves checkpoints as folders, as sharded strategies do."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if Path(path).name.startswith(".last"):
            Path(path).mkdir(parents=True)
            super().save_checkpoint(checkpoint, Path(path) / "shard", storage_options)
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_checkpoint(Path(path) / "shard", *args, **kwargs)


@pytest.mark.parametrize("step", range(12))
def test_dies_while_a_folder_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """After each step of the replacement, the last checkpoint that is found is complete."""
    seen = []

    def dies_at(name: str, owner: Any) -> Any:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if (tmp_path / "last.ckpt").exists() or seen:  # from the second checkpoint on
                seen.append(name)
            if len(seen) == step + 1:
                if name == "rmtree":
                    (Path(args[0]) / "shard").unlink()  # half of it is deleted
                raise Died
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name, owner in (("rename", Path), ("replace", Path), ("rmtree", shutil)):
        dies_at(name, owner)
    settings = {"callbacks": [{"class_path": "LastCheckpoint", "init_args": {"dirpath": str(tmp_path)}}]}
    try:
        train(tmp_path, plugins=[FolderIO()])
    except Died:
        pass
    else:
        assert step >= 8  # four steps for each of two replacements
    monkeypatch.undo()
    found = last_checkpoint(settings)
    assert found is not None
    assert place(found / "shard")[0] in (0, 1, 2)
    trainer = train(tmp_path, plugins=[FolderIO()], ckpt_path=str(found), max_epochs=4)
    assert trainer.global_step == 4 * STEPS
    found = last_checkpoint(settings)
    assert found is not None
    assert place(found / "shard") == (3, 4 * STEPS)
    assert len(names(tmp_path)) == 2 + (found.name != "last.ckpt"), names(tmp_path)


def test_a_folder_in_place_of_a_file_and_back(tmp_path: Path) -> None:
    train(tmp_path, max_epochs=1)
    train(tmp_path, max_epochs=2, ckpt_path="last", plugins=[_ReadsBoth()])
    assert place(tmp_path / "last.ckpt/shard") == (1, 2 * STEPS)
    train(tmp_path, ckpt_path="last", plugins=[_ReadsFolders()])
    assert place(tmp_path / "last.ckpt") == (2, 3 * STEPS)
    assert names(tmp_path) == ["best.ckpt", "last.ckpt"]


class _ReadsBoth(FolderIO):
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        return TorchCheckpointIO.load_checkpoint(self, path, *args, **kwargs)


class _ReadsFolders(TorchCheckpointIO):
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_checkpoint(Path(path) / "shard", *args, **kwargs)


@pytest.mark.parametrize("name", ["ddp", "alone", pytest.param("fsdp2", marks=needs_fsdp2_on_cpu)])
def test_of_several_processes(tmp_path: Path, name: str) -> None:
    files = ["last.ckpt"] if name == "alone" else ["best.ckpt", "last.ckpt"]
    for first, second in run_distributed(resumed, tmp_path, name):
        steps = STEPS if name == "fsdp2" else STEPS // 2  # DDP shares the batches
        assert (first["resumed"], first["epoch"], first["files"]) == ("", 3, files)
        assert (second["resumed"], second["epoch"], second["files"]) == ("last.ckpt", 4, files)
        assert [first["is_folder"], second["is_folder"]] == [name == "fsdp2"] * 2
        assert second["step"] * 3 == first["step"] * 4
        assert first["step"] in (3 * steps, 3 * STEPS // 2)


def test_of_several_processes_each_is_refused(tmp_path: Path) -> None:
    for message in run_distributed(refused, tmp_path):
        assert "take save_last out of it" in message


def test_without_versions_a_former_one_is_replaced(tmp_path: Path) -> None:
    for epochs in (3, 2):
        train(tmp_path, LastCheckpoint(tmp_path / "own", enable_version_counter=False), max_epochs=epochs)
        assert place(tmp_path / "own/last.ckpt") == (epochs - 1, epochs * STEPS)
        assert names(tmp_path / "own") == ["last.ckpt"]


def test_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning logs a line for each checkpoint that is saved without a value of ``weights_only``."""
    # Its logger hands nothing up to the root by itself.
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    train(tmp_path)
    assert not [line for line in caplog.messages if "weights_only" in line]
