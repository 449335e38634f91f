"""What a run records, in a Trainer of this process."""

import copy
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from study_module import NoisyGradients, ScriptedModule, StudyData, StudyModule

from lightning_znorm import GradientMonitor, LastCheckpoint, ZNormCallback
from lightning_znorm.callbacks.measurement import GradientMeter
from lightning_znorm.callbacks.steps import Step
from lightning_znorm.compare.checkpoints import MONITORED, BestCheckpoint, read_checkpoint
from lightning_znorm.compare.files import DamagedError
from lightning_znorm.compare.recorder import Recorder, _described_schedule, _fingerprint
from lightning_znorm.compare.results import read_fit, read_run
from lightning_znorm.compare.study import Run
from lightning_znorm.gradients.adapters.plain import PlainAdapter

MONITOR = ("val/accuracy", "max")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The `?srun`? command|.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key"),
]


class Died(BaseException):
    """As a process dies: no hook is told."""


class Spy(Callback):
    """Computes, in float64 and on its own, the norm of the gradients that backward passes leave."""

    def __init__(self, dies_at: int = -1) -> None:
        self.norms: list[float] = []
        self.dies_at = dies_at

    def on_after_backward(self, trainer, pl_module) -> None:
        squares = [parameter.grad.double().square().sum() for parameter in pl_module.parameters()]
        self.norms.append(math.sqrt(sum(squares).item()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.dies_at:
            raise Died


def train(
    folder: Path,
    *callbacks: Callback,
    seed: int = 3,
    resume: bool = False,
    module: StudyModule | None = None,
    data: StudyData | None = None,
    **options,
) -> Run:
    run = Run("method", seed, folder)
    torch.manual_seed(seed)
    first = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    after = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    checkpoints = [
        BestCheckpoint(str(run.best.parent), *MONITOR),
        LastCheckpoint(str(run.last.parent), enable_version_counter=False),
    ]
    trainer = Trainer(
        logger=CSVLogger(run.logs, name=""),
        callbacks=[Recorder(str(folder), seed), *first, *checkpoints, *after],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 4, "log_every_n_steps": 2, **options},
    )
    trainer.fit(
        module or StudyModule(), data or StudyData(), ckpt_path=run.last if resume else None, weights_only=False
    )
    return run


def evaluate(run: Run, checkpoint: Path | None, module: StudyModule | None = None, typed: dict | None = None) -> dict:
    """Test a checkpoint of a run, in a Trainer of its own; return what it wrote down."""
    trainer = Trainer(
        logger=False,
        callbacks=[
            Recorder(str(run.folder), 3),
            BestCheckpoint(str(run.best.parent), *MONITOR),
            LastCheckpoint(str(run.last.parent), enable_version_counter=False),
        ],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    for name, value in (typed or {}).items():
        setattr(trainer, name, value)
    trainer.test(module or StudyModule(), StudyData(), ckpt_path=checkpoint, verbose=False, weights_only=False)
    return json.loads(run.test_file.read_text())


def logged(run: Run, metric: str) -> list[float]:
    return [measurement.value for measurement in read_run(run) if measurement.metric == metric]


def weights(run: Run) -> dict:
    return torch.load(run.last, weights_only=False)["state_dict"]


def batches(run: Run, epoch: int) -> list:
    (path,) = run.logs.rglob(f"batches-{epoch}.json")
    return json.loads(path.read_text())


class DiesAfterSaving(Checkpoint):
    """Dies as soon as an epoch's last checkpoint is there. (Checkpoint: so that it comes after those that save.)"""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.look()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.look()

    def look(self) -> None:
        if self.run.last.exists():
            raise Died


@pytest.mark.parametrize("method", [(), (ZNormCallback(),)], ids=["plain", "znorm"])
def test_gradient_norm_is_that_before_the_method(method, tmp_path):
    spy = Spy()
    run = train(tmp_path, spy, *method, gradient_clip_val=0.01)
    # Six steps in an epoch, of which every second is logged.
    expected = [sum(spy.norms[first + 1 : first + 6 : 2]) / 3 for first in range(0, 24, 6)]
    assert logged(run, "compare/gradient_norm") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_gradient_norm_in_any_precision(dtype):
    weights = [torch.nn.Parameter(torch.zeros(300, 300, dtype=dtype)), torch.nn.Parameter(torch.zeros(7, dtype=dtype))]
    for weight in weights:
        weight.grad = torch.full_like(weight, 300.0)
    optimizer, adapter = torch.optim.SGD(weights), PlainAdapter(torch.nn.ParameterList(weights))
    trainer = SimpleNamespace(
        optimizers=[optimizer],
        fast_dev_run=False,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=5)),
        _logger_connector=SimpleNamespace(should_update_logs=True),
    )
    step = Step(
        trainer,
        optimizer,
        adapter,
        lambda: list(adapter.slots_of(optimizer)),
        grad_scaler=None,
        is_repeat=False,
        is_training=True,
    )
    measurement = GradientMeter().measure(step)
    assert measurement.logged_step == 5
    assert measurement.norm == pytest.approx(300 * (300 * 300 + 7) ** 0.5, rel=1e-6)


class SparseModule(StudyModule):
    """Has gradients that cannot be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(3, 1, sparse=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.embedding(torch.tensor([1])).sum()


def test_a_curve_that_cannot_be_measured_is_said_to_be_missing(tmp_path):
    with pytest.warns(UserWarning, match="curve of gradient norms ends here.*embedding.weight is sparse") as caught:
        run = train(tmp_path, module=SparseModule())
    assert len([one for one in caught if "curve of gradient norms" in str(one.message)]) == 1
    assert logged(run, "compare/gradient_norm") == []
    assert logged(run, "compare/train_seconds") != []


class OtherStrategy(SingleDeviceStrategy):
    """Derives from a strategy that leaves gradients whole."""


class ShardingStrategy(FSDPStrategy):
    """Might do anything with shards."""


class UnknownStrategy:
    """Does not derive from a strategy of Lightning."""


def test_curve_under_a_strategy_that_derives_from_a_plain_one(tmp_path):
    run = train(tmp_path, strategy=OtherStrategy(torch.device("cpu")))
    assert logged(run, "compare/gradient_norm") != []


@pytest.mark.parametrize("strategy", [ShardingStrategy, UnknownStrategy])
def test_no_curve_under_a_strategy_that_nobody_trusts(strategy, tmp_path):
    module = StudyModule()
    trainer = SimpleNamespace(strategy=object.__new__(strategy), callbacks=[ZNormCallback()])
    with pytest.warns(UserWarning, match=f"no curve .*{strategy.__name__} is not .*add GradientMonitor"):
        assert Recorder(str(tmp_path), 0)._find_adapter(trainer, module) is None


def test_unknown_strategy_that_is_trusted(tmp_path):
    module = StudyModule()
    trusting = GradientMonitor(allow_untested_strategy=True)
    trainer = SimpleNamespace(strategy=UnknownStrategy(), callbacks=[trusting])
    adapter = Recorder(str(tmp_path), 0)._find_adapter(trainer, module)
    assert [slot.names for slot in adapter.slots()] == [(name,) for name, _ in module.named_parameters()]


@pytest.mark.parametrize("dies", [False, True])
def test_recorder_does_not_keep_the_model(dies, tmp_path, monkeypatch):
    """Nor a copy of it, in the middle of a training."""

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            copies.append(copy.deepcopy(recorder))
            assert recorder._adapter is not None
            if dies and trainer.global_step == 2:
                raise ValueError("dies")

    monkeypatch.chdir(tmp_path)  # the module writes where the Trainer does
    recorder, copies = Recorder(str(tmp_path), 0), []
    module = StudyModule()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[recorder, Looks()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match="dies") if dies else nullcontext():
        trainer.fit(module, StudyData())
    assert recorder._adapter is None
    assert all(each._adapter is None for each in copies)


def test_times(tmp_path, monkeypatch):
    """By a clock that a training batch moves by a second, loading a batch by 10 and validation by 1000."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr("lightning_znorm.compare.recorder.time", clock)

    class TimedData(StudyData):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            now[0] += 10 if self.trainer.training else 0
            return batch

    class Timed(StudyModule):
        def training_step(self, batch, batch_idx):
            now[0] += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            now[0] += 1000
            super().validation_step(batch, batch_idx)

    run = train(tmp_path, module=Timed(), data=TimedData(), max_epochs=3, val_check_interval=0.5)
    # Six batches, and the loading of all but the first of each half: the clock rests from validation to the next batch.
    epoch = 6 * 1 + 4 * 10
    assert logged(run, "compare/step_seconds") == pytest.approx([epoch / 6] * 3)
    assert logged(run, "compare/train_seconds") == [epoch, 2 * epoch, 3 * epoch]
    assert json.loads(run.fit_file.read_text())["seconds"] == 3 * epoch
    assert json.loads(run.progress_file.read_text())["share"] == 1


def test_death_and_resumption_change_nothing(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Died):
        train(tmp_path / "died", Spy(dies_at=15))  # in the middle of the third epoch
    died = Run("method", 3, tmp_path / "died")
    assert not died.fit_file.exists()
    train(tmp_path / "died", resume=True)
    for metric in ("train/loss", "val/loss", "val/accuracy", "compare/gradient_norm"):
        assert logged(died, metric) == logged(whole, metric)
        assert len(logged(died, metric)) == 4
    assert all(torch.equal(weights(whole)[name], weights(died)[name]) for name in weights(whole))
    best = [torch.load(run.best, weights_only=False) for run in (whole, died)]
    assert best[0]["epoch"] == best[1]["epoch"]
    assert len(logged(died, "compare/train_seconds")) == 4
    assert logged(died, "compare/train_seconds") == sorted(logged(died, "compare/train_seconds"))
    for epoch in (0, 1, 2, 3):
        assert batches(died, epoch) == batches(whole, epoch)
    assert len({json.loads(run.fit_file.read_text())["weights"] for run in (whole, died)}) == 1


def test_what_was_logged_is_counted(tmp_path):
    """So that a log that is damaged later is not taken for a whole one, also of several attempts."""
    whole = train(tmp_path / "whole")
    with pytest.raises(Died):
        train(tmp_path / "died", Spy(dies_at=15))  # in the middle of the third epoch
    for run in (whole, train(tmp_path / "died", resume=True)):
        fit = read_fit(run)
        assert fit["logged_epochs"] == [0, 1, 2, 3]
        # Each epoch: a loss in training, a loss and an accuracy in validation, two times, and a norm every other batch.
        assert fit["logged_numbers"] == 4 * (5 + 3)
        assert read_checkpoint(run.last)["callbacks"]["Recorder"]["logged_epochs"] == [0, 1, 2, 3]
        read_run(run)
        (first, *_) = sorted(run.logs.rglob("metrics.csv"))
        first.write_bytes(b"".join(first.read_bytes().splitlines(keepends=True)[:-1]))
        if run == whole:
            with pytest.raises(DamagedError):
                read_run(run)
        else:
            read_run(run)  # what died with the first attempt was done again


def test_epoch_without_a_batch(tmp_path):
    """It has a time all the same, which tells that its log is there."""

    class Sometimes:
        epoch = -1

        def __iter__(self):
            self.epoch += 1
            yield from [] if self.epoch == 1 else batches

    data = StudyData()
    data.setup("fit")
    batches = list(data.train_dataloader())
    data.train_dataloader = Sometimes
    run = train(tmp_path, data=data, max_epochs=3)
    assert read_fit(run)["epochs"] == 3
    assert len(logged(run, "compare/train_seconds")) == len(read_fit(run)["logged_epochs"])


def test_no_metric_is_missing_after_a_resumption(tmp_path):
    """Lightning logs an epoch's training metrics after `ModelCheckpoint` has saved: whoever dies between loses them."""
    run = Run("method", 3, tmp_path)
    with pytest.raises(Died):
        train(tmp_path, DiesAfterSaving(run))
    train(tmp_path, resume=True)
    for metric in ("train/loss", "val/loss", "compare/train_seconds"):
        assert len(logged(run, metric)) == 4


def test_resuming_a_run_that_was_only_not_said_to_have_ended(tmp_path):
    run = train(tmp_path)
    names = json.loads(run.fit_file.read_text())["logged"]
    before, weights_before = logged(run, "train/loss"), weights(run)
    run.fit_file.unlink()
    train(tmp_path, resume=True)
    assert json.loads(run.fit_file.read_text())["logged"] == names == ["train/loss", "val/accuracy", "val/loss"]
    assert logged(run, "train/loss") == before
    assert all(torch.equal(weights_before[name], weights(run)[name]) for name in weights_before)


def test_best_checkpoint_survives_an_interruption(tmp_path):
    """A worse epoch after an interruption must not become the best one, as it does when `ModelCheckpoint` forgets."""
    run = Run("method", 3, tmp_path)
    with pytest.raises(Died):
        train(tmp_path, Spy(dies_at=15))
    first = torch.load(run.best, weights_only=False)["callbacks"]
    score = next(state["best_model_score"] for key, state in first.items() if key.startswith("BestCheckpoint"))
    train(tmp_path, resume=True)
    accuracies = logged(run, "val/accuracy")
    best = torch.load(run.best, weights_only=False)
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert max(accuracies) >= float(score)


def test_last_checkpoint_is_of_the_last_epoch(tmp_path):
    """Lightning's own `save_last` keeps an older one where the monitored metric does not improve."""
    with pytest.raises(Died):
        train(tmp_path, Spy(dies_at=33), max_epochs=6)  # in the sixth epoch
    run = Run("method", 3, tmp_path)
    accuracies = logged(run, "val/accuracy")
    assert accuracies.index(max(accuracies)) < 4
    last = torch.load(run.last, weights_only=False)
    assert (last["epoch"], last["global_step"]) == (4, 30)
    assert sorted(path.name for path in run.last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


class Scripted(ScriptedModule):
    """Logs its scores under the name that is monitored; in the midst of an epoch, a better one."""

    def validation_step(self, batch, batch_idx) -> None:
        is_end = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.log("val/accuracy", self.score() + (0 if is_end else 5))


@pytest.mark.parametrize(
    ("scores", "options", "epoch", "value"),
    [
        ([0.3, 0.9, 0.5, 0.4], {}, 1, 0.9),
        ([0.3, 0.9, 0.5, 0.9], {}, 1, 0.9),  # of equals the first
        ([math.nan, 0.2, math.nan, 0.4], {}, 3, 0.4),
        ([math.nan] * 4, {}, 0, math.nan),  # diverged; not the infinite score that Lightning makes of it
        ([math.inf, 0.2, 0.3, 0.4], {}, 0, math.inf),
        ([0.9, 0.3, 0.8, 0.4], {"check_val_every_n_epoch": 2}, 3, 0.4),
        ([0.9, 0.3, 0.8], {"check_val_every_n_epoch": 2, "max_epochs": 3}, 1, 0.3),  # ends with one not validated
        ([0.3, 0.9, 0.5, 0.4], {"val_check_interval": 0.5}, 1, 0.9),
    ],
)
def test_tested_checkpoint_is_written_down(scores, options, epoch, value, tmp_path):
    run = train(tmp_path, module=Scripted(scores), num_sanity_val_steps=0, **options)
    tested = evaluate(run, run.best, Scripted(scores))
    expected = {"path": "checkpoints/best.ckpt", "epoch": epoch, "monitor": "val/accuracy"}
    assert tested["checkpoint"] == {**expected, "value": pytest.approx(value, nan_ok=True)}
    assert tested["metrics"]["test/score"] == epoch + 1
    with pytest.warns(UserWarning, match=r"is not changed, because this test differs from the study's: last\.ckpt"):
        assert evaluate(run, run.last, Scripted(scores))["checkpoint"]["epoch"] == epoch


def test_a_checkpoint_of_an_older_version_is_read_too(tmp_path):
    run = train(tmp_path)
    checkpoint = torch.load(run.best, weights_only=False)
    value = checkpoint.pop(MONITORED)["value"]
    torch.save(checkpoint, run.best)
    assert evaluate(run, run.best)["checkpoint"] == {
        "path": "checkpoints/best.ckpt",
        "epoch": checkpoint["epoch"],
        "monitor": "val/accuracy",
        "value": value,
    }


def test_of_other_settings_is_not_written_down(tmp_path):
    run = train(tmp_path, max_epochs=1)
    evaluate(run, run.best)
    before = run.test_file.read_text()
    typed = {"config_files": [run.config, tmp_path / "more.yaml"], "flags": ["--trainer.limit_test_batches", "1"]}
    said = "this test differs from the study's: --config .*more.yaml --trainer.limit_test_batches 1"
    with pytest.warns(UserWarning, match=f"test.json is not changed, because {said}"):
        evaluate(run, run.last, typed=typed)
    with pytest.warns(UserWarning, match=r"this test differs from the study's: no checkpoint"):
        evaluate(run, None)
    assert run.test_file.read_text() == before


def test_a_metric_that_no_epoch_ends_with(tmp_path):
    message = "There is no best checkpoint to test: val/accuracy was not logged by the end of any of 2 epochs"
    with pytest.raises(MisconfigurationException, match=message):
        train(tmp_path, max_epochs=2, check_val_every_n_epoch=3)
    run = Run("method", 3, tmp_path)
    assert not run.fit_file.exists()  # the test does not begin
    assert torch.load(run.last, weights_only=False)["epoch"] == 1


def test_steps_that_lightning_does_not_see(tmp_path):
    """Of them it saves no best checkpoint."""

    class Unseen(StudyModule):
        automatic_optimization = False

        def training_step(self, batch, batch_idx) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.raises(MisconfigurationException, match="Lightning has seen no optimizer step"):
        train(tmp_path, module=Unseen())


def test_a_training_begun_again_leaves_no_old_test(tmp_path):
    run = train(tmp_path)
    evaluate(run, run.best)
    with pytest.raises(Died):
        train(tmp_path, Spy(dies_at=27), resume=True, max_epochs=6)
    assert not run.fit_file.exists()
    assert not run.test_file.exists()


class Grouped(StudyModule):
    """With two optimizers, one of them of two groups, and a schedule that starts low."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx) -> None:
        self.batches.append(batch_idx)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        first, _, _, last = self.network
        groups = [{"params": [first.weight]}, {"params": [first.bias], "weight_decay": 0.1}]
        sgd = torch.optim.SGD(groups, lr=torch.tensor(0.5), momentum=0.9)
        warm_up = torch.optim.lr_scheduler.LinearLR(sgd, 0.1)
        return [sgd, torch.optim.Adam(last.parameters(), lr=0.01)], [warm_up]


def test_optimizers_are_written_down(tmp_path):
    (text,) = json.loads(train(tmp_path / "one").fit_file.read_text())["optimizers"]
    assert text.startswith("SGD(lr=0.05, momentum=0.9, dampening=0, weight_decay=0")
    first, second = json.loads(train(tmp_path / "two", module=Grouped()).fit_file.read_text())["optimizers"]
    common = "lr=0.5, momentum=0.9, dampening=0, weight_decay=0"
    assert re.fullmatch(rf"SGD\({common}(, .*)?; {common}.1(, .*)?\)", first)
    assert second.startswith("Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08, weight_decay=0")


def test_schedulers_are_written_down(tmp_path):
    def schedules(name: str, **options) -> list[str]:
        return json.loads(train(tmp_path / name, **options).fit_file.read_text())["schedulers"]

    assert schedules("one") == ["ExponentialLR(gamma=0.7) every epoch"]
    (warm_up,) = schedules("two", module=Grouped())
    assert re.fullmatch(r"LinearLR\(start_factor=0\.1, end_factor=1\.0, total_iters=5\) every epoch", warm_up)


def test_a_schedule_of_several_parts():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    parts = [
        torch.optim.lr_scheduler.StepLR(optimizer, 2),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0),
    ]
    whole = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])
    assert _described_schedule(LRSchedulerConfig(whole, interval="step", frequency=2)) == (
        "SequentialLR(StepLR(step_size=2, gamma=0.1), LambdaLR()) every 2 steps"
    )


def test_optimizers_that_the_user_has_wrapped(tmp_path):
    """Lightning hands the optimizers inside of them to its hooks."""

    class Wrapped(StudyModule):
        automatic_optimization = False

        def training_step(self, batch, batch_idx) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            first, *_, last = self.network
            return [LightningOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1)) for layer in (first, last)]

    run = train(tmp_path, module=Wrapped(), max_epochs=1)
    for number in (0, 1):
        assert len(logged(run, f"compare/gradient_norm-{number}")) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float64])
def test_weights_of_any_type_are_named(dtype):
    modules = [
        torch.nn.ParameterList([torch.full((2, 3), value, dtype=dtype), torch.tensor(1.0)]) for value in (1, 1, 2)
    ]
    names = [_fingerprint(module) for module in modules]
    assert names[0] == names[1] != names[2]


def test_method_that_draws_random_numbers(tmp_path):
    plain, noisy = train(tmp_path / "plain"), train(tmp_path / "noisy", NoisyGradients())
    assert any(not torch.equal(weights(plain)[name], weights(noisy)[name]) for name in weights(plain))
    starts = [json.loads(run.fit_file.read_text())["weights"] for run in (plain, noisy)]
    assert starts[0] == starts[1]
    orders = [batches(plain, epoch) for epoch in range(4)]
    assert orders == [batches(noisy, epoch) for epoch in range(4)]
    assert len({json.dumps(order) for order in orders}) == 4  # each epoch has an order of its own
    other = train(tmp_path / "other", seed=4)
    assert batches(other, 0) != orders[0]
    assert json.loads(other.fit_file.read_text())["weights"] != starts[0]


def test_a_finished_run_is_known_by_its_file(tmp_path):
    run = train(tmp_path)
    fit = json.loads(run.fit_file.read_text())
    assert fit["epochs"] == 4
    assert fit["parameters"] == 146
    assert fit["device"].startswith("1 x cpu")
    assert set(fit["versions"]) == {"python", "lightning-znorm", "torch", "lightning", "torchmetrics"}
    assert not run.test_file.exists()
