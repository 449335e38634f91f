"""What GradientMonitor logs, draws and leaves alone."""

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import LBFGS, SGD
from torch.utils.data import DataLoader

from lightning_znorm import (
    GradientCentralizationCallback,
    GradientMonitor,
    GradientTransform,
    SINGCallback,
    ZNormCallback,
)
from lightning_znorm.callbacks import measurement, monitor_plots
from lightning_znorm.callbacks.monitor_history import GradientHistory
from lightning_znorm.callbacks.monitor_plots import by_depth, heat_map, image_of
from tests.callbacks.test_strategies import ThirdParty
from tests.callbacks.training import LR, OPTIMIZERS, ManualTraining, Training, Weights, amp, batches, loss_of, network
from tests.dtypes import DEFAULTS, default_dtype
from tests.gradients.reference import wide

pytestmark = pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")

QUIET = {"log_every_n_steps": 1}


class Collected(Callback):
    """Keeps what has been logged after each batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def true_grads(module: Training, before: Weights, window: list[Tensor]) -> Weights:
    """By hand, in float64."""
    twin = network().double()
    weights = {name: wide(weight).requires_grad_() for name, weight in before.items()}
    losses = [loss_of(lambda x: functional_call(twin, weights, (x,)), batch.double()) for batch in window]
    return dict(zip(weights, torch.autograd.grad(torch.stack(losses).mean(), list(weights.values())), strict=True))


def expected(grads: Weights) -> dict[str, float]:
    """The aggregates by their definitions, from the gradients and their z-scores."""
    sigma = torch.stack([grad.std(correction=0) for grad in grads.values()])
    z = [(grad - grad.mean()) / grad.std(correction=0) for grad in grads.values()]
    cosine = torch.stack(
        [torch.cosine_similarity(g.flatten(), y.flatten(), 0) for g, y in zip(grads.values(), z, strict=True)]
    )
    return {
        "norm": math.sqrt(sum(float(grad.square().sum()) for grad in grads.values())),
        "znorm_norm": math.sqrt(sum(float(one.square().sum()) for one in z)),
        "mean_abs_median": float(torch.stack([grad.mean().abs() for grad in grads.values()]).quantile(0.5)),
        "sigma_median": float(sigma.quantile(0.5)),
        "sigma_min": float(sigma.min()),
        "cosine_median": float(cosine.quantile(0.5)),
        "cosine_min": float(cosine.min()),
        "mean_share_median": float((1 - cosine.square()).quantile(0.5)),
        "mean_share_max": float((1 - cosine.square()).max()),
        "nonfinite": 0.0,
    }


@pytest.mark.parametrize("with_znorm", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.full)])
def test_values_and_identical_training(fit, precision: str, kind: str, accumulate: int, with_znorm: bool) -> None:
    arguments = QUIET | {"accumulate_grad_batches": accumulate}
    arguments |= {"precision": precision} if precision == "32-true" else {}
    znorm, data = [ZNormCallback()] if with_znorm else [], batches(4)
    runs = []
    for more in ([], [GradientMonitor(), collected := Collected()]):
        module = Training(optimizer=OPTIMIZERS[kind])
        made = arguments if precision == "32-true" else arguments | amp(init_scale=2.0**10)
        fit(module, data, *znorm, *more, **made)
        runs.append(module)
    for ours, theirs in zip(runs[0].weights, runs[1].weights, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rtol = 1e-5 if precision == "32-true" else 3e-2
    for start in range(0, len(data), accumulate):
        grads = true_grads(module, module.weights[start], data[start : start + accumulate])
        logged = collected.metrics[start + accumulate - 1]
        for name, value in expected(grads).items():
            assert logged[f"grad/{name}"] == pytest.approx(value, rel=rtol, abs=rtol * 1e-2), name


def test_overflow_is_shown_and_enters_no_mean(fit) -> None:
    data = batches(3)
    data[1] = data[1] * 1e30
    monitor, collected = GradientMonitor(), Collected()
    module = Training()
    fit(module, data, ZNormCallback(), monitor, collected, **QUIET, **amp(init_scale=2.0**10))
    assert module.moved == [True, False, True]
    assert [metrics["grad/nonfinite"] for metrics in collected.metrics] == [0.0, 3.0, 0.0]
    assert not math.isfinite(collected.metrics[1]["grad/norm"])
    assert math.isnan(collected.metrics[1]["grad/sigma_median"])
    first, last = collected.metrics[0], collected.metrics[2]
    assert first["grad/sigma_over_running_median"] == 1.0
    assert math.isfinite(last["grad/sigma_over_running_median"])
    sigma = monitor._history.sigma
    assert sigma[:, 1].isinf().all()
    torch.testing.assert_close(
        monitor.state_dict()["sums"] / monitor.state_dict()["weights"],
        ((0.9 * sigma[:, 0] + sigma[:, 2]) / 1.9).double(),
        rtol=1e-5,
        atol=0,
    )


def test_per_parameter(fit) -> None:
    data, collected, module = batches(1), Collected(), Training()
    fit(module, data, GradientMonitor(per_parameter=True, exclude="*.bias", prefix="g"), collected, **QUIET)
    (logged,) = collected.metrics
    grads = true_grads(module, module.weights[0], data)
    names = {name for name in logged if name.startswith("g_")}
    kinds = ["mean", "sigma", "norm", "znorm_norm", "cosine", "mean_share", "sigma_over_running"]
    assert names == {f"g_{kind}/net.{name}.weight" for kind in kinds for name in ("first", "last")}
    for name in ("first.weight", "last.weight"):
        grad = grads[name]
        assert logged[f"g_mean/net.{name}"] == pytest.approx(float(grad.mean()), rel=1e-4)
        share = float(grad.double().mean().square() / grad.double().square().mean())
        assert logged[f"g_mean_share/net.{name}"] == pytest.approx(share, rel=1e-4)
        assert logged[f"g_sigma/net.{name}"] == pytest.approx(float(grad.std(correction=0)), rel=1e-5)
        assert logged[f"g_norm/net.{name}"] == pytest.approx(float(grad.norm()), rel=1e-5)
        assert logged[f"g_znorm_norm/net.{name}"] == pytest.approx(math.sqrt(grad.numel()), rel=1e-5)


@pytest.mark.parametrize("default", [dtype for dtype in DEFAULTS if dtype != torch.float32], ids=str)
def test_torchs_default_type_changes_nothing(fit, tmp_path: Path, default: torch.dtype) -> None:
    runs = []
    for each in (torch.float32, default):
        module, data, monitor, collected = Training(), batches(1), GradientMonitor(per_parameter=True), Collected()
        module.net.last.weight.data *= 1e4  # a norm that float16 has no number for
        with default_dtype(each):
            fit(module, data, monitor, collected, **QUIET)
            assert monitor.state_dict()["sigma"].dtype == torch.float32
            twin = GradientHistory()
            assert twin.state_dict()["sigma"].dtype == torch.float32
            twin.load_state_dict(monitor.state_dict())
            assert torch.equal(twin.sigma, monitor._history.sigma)
        runs.append((collected.metrics, monitor.state_dict()["sums"].tolist()))
        assert len(list((tmp_path / "gradients").glob("*.png"))) == 4
        for picture in (tmp_path / "gradients").glob("*.png"):
            picture.unlink()
    assert runs[1] == runs[0]
    assert runs[0][0][0]["grad/norm"] > 65504


def test_share_below_the_threshold(fit) -> None:
    shares = []
    for threshold in (0.0, 1e9):
        collected = Collected()
        fit(Training(), batches(1), GradientMonitor(sigma_threshold=threshold), collected, **QUIET)
        shares.append(collected.metrics[0]["grad/share_below"])
    assert shares == [0.0, 1.0]
    with pytest.raises(ValueError, match="sigma_threshold must be finite and at least 0, got -1"):
        GradientMonitor(sigma_threshold=-1)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        GradientMonitor(eps=-1)


def test_nothing_is_measured_at_other_steps(fit) -> None:
    with patch.object(measurement, "measure_slots", wraps=measurement.measure_slots) as calls:
        fit(Training(), batches(7), GradientMonitor(), log_every_n_steps=3)
        assert calls.call_count == 2
        with pytest.warns(UserWarning, match="log_every_n_steps=0 logs no step"):
            fit(Training(), batches(2), GradientMonitor(), log_every_n_steps=0)
        assert calls.call_count == 2


class EverySecond(GradientTransform):
    """Leaves out the first of two steps."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step % 2 == 1:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)


ORDERS = {
    "behind": lambda: [GradientTransform(torch.zeros_like), GradientMonitor()],
    "before": lambda: [GradientMonitor(), GradientTransform(torch.zeros_like)],
    "behind two": lambda: [
        GradientTransform(torch.zeros_like, "*.weight"),
        GradientTransform(torch.zeros_like, "*.bias"),
        GradientMonitor(),
    ],
    "between": lambda: [
        GradientTransform(torch.zeros_like, "*.weight"),
        GradientMonitor(),
        GradientTransform(torch.zeros_like, "*.bias"),
    ],
    "behind one that does not always transform": lambda: [EverySecond(torch.zeros_like), GradientMonitor()],
}


@pytest.mark.filterwarnings("ignore:EverySecond. optimizer 0 .SGD. stepped past Lightning:UserWarning")
@pytest.mark.parametrize("order", ORDERS)
def test_shows_gradients_as_they_were_wherever_it_stands(fit, order: str) -> None:
    data, collected, module, own = batches(4), Collected(), Training(), ORDERS[order]()
    with patch.object(measurement, "measure_slots", wraps=measurement.measure_slots) as calls:
        made = fit(module, data, *own, collected, **QUIET)
    assert calls.call_count == len(data)
    assert [callback for callback in made.callbacks if callback in own] == own
    for number, logged in enumerate(collected.metrics):
        grads = true_grads(module, module.weights[number], data[number : number + 1])
        assert logged["grad/norm"] == pytest.approx(expected(grads)["norm"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:EverySecond. optimizer 0 .SGD. stepped past Lightning:UserWarning")
@pytest.mark.parametrize("order", ORDERS)
def test_the_list_of_callbacks_stays_the_same_object(fit, order: str) -> None:
    class Watching(Callback):
        def setup(self, trainer, *_, **__) -> None:
            self.before = trainer.callbacks, list(trainer.callbacks)

    watching = Watching()
    made = fit(Training(), batches(2), watching, *ORDERS[order](), **QUIET)
    assert made.callbacks is watching.before[0]
    assert made.callbacks == watching.before[1]


def test_optimizers_are_told_apart(fit) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        for optimizer in module.optimizers():
            optimizer.zero_grad()
            module.manual_backward(loss_of(module.net, batch))
            optimizer.step()

    net, collected, monitor = network(), Collected(), GradientMonitor()
    module = ManualTraining(
        script, net=net, optimizer=lambda _: [SGD(net[2].parameters(), LR), SGD(net[0].parameters(), LR)]
    )
    fit(module, batches(1), monitor, collected, **QUIET)
    (logged,) = collected.metrics
    grads = true_grads(module, module.weights[0], batches(1))
    assert logged["grad/0/norm"] == pytest.approx(float(grads["last.weight"].norm()), rel=1e-5)
    assert "grad/1/norm" in logged
    # In the model's order, in one column.
    assert monitor._history.names == ["net.first.weight", "net.first.bias", "net.last.weight"]
    assert monitor._history.sigma.shape == (3, 1)
    assert monitor._history.sigma.isfinite().all()


def stepping_both(module: ManualTraining, batch: Tensor) -> None:
    for optimizer in module.optimizers():
        optimizer.zero_grad()
        module.manual_backward(loss_of(module.net, batch))
        optimizer.step()


def test_parameter_that_two_optimizers_step(fit) -> None:
    net, data, collected, monitor = network(), batches(2), Collected(), GradientMonitor(per_parameter=True)
    # The first one's step is large, so that the second one meets another gradient of what they share.
    module = ManualTraining(
        stepping_both, net=net, optimizer=lambda _: [SGD(net[0].parameters(), 5.0), SGD(net.parameters(), LR)]
    )
    fit(module, data, monitor, collected, **QUIET)
    logged = collected.metrics[0]
    grads = true_grads(module, module.weights[0], data[:1])
    for name in ("first.weight", "first.bias"):
        sigmas = [logged[f"grad_sigma/{number}/net.{name}"] for number in (0, 1)]
        assert sigmas[0] == pytest.approx(float(grads[name].std(correction=0)), rel=1e-5)
        assert sigmas[1] != pytest.approx(sigmas[0], rel=1e-2)
        assert f"grad_sigma/net.{name}" not in logged
    assert "grad_sigma/net.last.weight" in logged  # which one optimizer steps alone
    assert logged["grad/1/sigma_over_running_median"] == 1.0  # nothing of the other optimizer is in the mean
    assert monitor._history.names == [
        "net.first.weight (optimizer 0)",
        "net.first.weight (optimizer 1)",
        "net.first.bias (optimizer 0)",
        "net.first.bias (optimizer 1)",
        "net.last.weight",
    ]
    assert monitor._history.sigma.shape == (5, 2)
    assert monitor._history.sigma[:, 0].tolist() == pytest.approx(
        [
            *(logged[f"grad_sigma/{number}/net.first.{kind}"] for kind in ("weight", "bias") for number in (0, 1)),
            logged["grad_sigma/net.last.weight"],
        ]
    )


@pytest.mark.filterwarnings("ignore:GradientMonitor. in the first 1 step, none of the 3 parameters:UserWarning")
def test_parameters_without_names_of_two_optimizers(fit) -> None:
    class Hidden(ManualTraining):
        def __init__(self) -> None:
            super().__init__(script)
            self.hidden = [torch.nn.Parameter(torch.tensor([1.0, 2.0]) * scale) for scale in (1, 10)]

        def configure_optimizers(self) -> list[SGD]:
            return [SGD([hidden], LR) for hidden in self.hidden]

    def script(module: Hidden, batch: Tensor) -> None:
        for optimizer, hidden in zip(module.optimizers(), module.hidden, strict=True):
            module.manual_backward(hidden.square().sum())
            optimizer.step()

    collected, monitor = Collected(), GradientMonitor(per_parameter=True)
    fit(Hidden(), batches(1), monitor, collected, **QUIET)
    (logged,) = collected.metrics
    sigmas = [logged[f"grad_sigma/{number}/parameter 0 of group 0"] for number in (0, 1)]
    assert sigmas == pytest.approx([1.0, 10.0])
    assert {f"parameter 0 of group 0 (optimizer {number})" for number in (0, 1)} <= set(monitor._history.names)


class Rows(Logger):
    """Takes what it is given as Lightning's own loggers are given it: by these names, and in no other way."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = version = None

    def log_hyperparams(self, *_, **__) -> None:
        pass

    def log_metrics(self, *, step: int, metrics: dict[str, float]) -> None:
        self.rows.append((step, metrics))


def test_loggers_are_called_by_names(fit) -> None:
    both = [Rows(), Rows()]
    fit(Training(), batches(2), GradientMonitor(), logger=both, **QUIET)
    for one in both:
        assert [step for step, metrics in one.rows if "grad/norm" in metrics] == [0, 1]


@pytest.mark.full
def test_one_row_a_step_where_the_closure_is_called_several_times(fit) -> None:
    rows, data, collected, monitor = Rows(), batches(3), Collected(), GradientMonitor(per_parameter=True)
    module = Training(optimizer=lambda own: LBFGS(own, lr=0.1, max_iter=4))
    fit(module, data, monitor, collected, logger=rows, **QUIET)
    assert [step for step, metrics in rows.rows if "grad/norm" in metrics] == [0, 1, 2]
    assert monitor._history.steps == [0, 1, 2]
    for number, batch in enumerate(data):  # of each the gradient of the first evaluation, before its step
        norm = expected(true_grads(module, module.weights[number], [batch]))["norm"]
        assert rows.rows[number][1]["grad/norm"] == pytest.approx(norm, rel=1e-5)
        assert collected.metrics[number]["grad/norm"] == pytest.approx(norm, rel=1e-5)


def test_one_row_a_step_where_an_optimizer_steps_several_times_in_a_batch(fit) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        for _ in range(3):
            stepping_both(module, batch)

    net, rows, data = network(), Rows(), batches(2)
    module = ManualTraining(
        script, net=net, optimizer=lambda _: [SGD(net[2].parameters(), LR), SGD(net[0].parameters(), LR)]
    )
    fit(module, data, GradientMonitor(), logger=rows, **QUIET)
    for number in (0, 1):
        own = [(step, metrics) for step, metrics in rows.rows if f"grad/{number}/norm" in metrics]
        assert [step for step, _ in own] == [0, 1]
    grads = true_grads(module, module.weights[1], data[1:])
    logged = [metrics for step, metrics in rows.rows if step == 1 and "grad/0/norm" in metrics]
    assert logged[0]["grad/0/norm"] == pytest.approx(float(grads["last.weight"].norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said_before", "message"),
    [
        (
            {},
            True,
            "measure nothing, because log_every_n_steps=50 is more than the number of this training's steps, 6: set",
        ),
        ({"accumulate_grad_batches": 3}, True, "training's steps, 2: set it to 2 or less"),
        ({"max_steps": 4}, True, "training's steps, 4: set it to 4 or less"),
        (
            {"log_every_n_steps": 0},
            True,
            "measure nothing, because log_every_n_steps=0 logs no step: set it to 1 or",
        ),
        (
            {"max_epochs": -1},
            False,
            "has measured nothing, because log_every_n_steps=50 logs none of the steps 1 to 5: set ",
        ),
    ],
    ids=["few steps", "accumulation", "max_steps", "never", "stopped"],
)
def test_nothing_measured_is_said_once(fit, warned, arguments, said_before: bool, message: str) -> None:
    counts = []

    class Stopping(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            counts.append(len(warned()))
            trainer.should_stop = trainer.max_epochs == -1 and trainer.global_step == 5

    fit(Training(), batches(3), GradientMonitor(), Stopping(), **{"max_epochs": 2} | arguments)
    (warning,) = warned()
    assert message in warning
    assert set(counts) == {int(said_before)}


@pytest.mark.parametrize(
    "arguments", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"fast_dev_run": True}, {"log_every_n_steps": 6}]
)
def test_nothing_is_said_where_nothing_is_missed(fit, warned, arguments) -> None:
    fit(Training(), batches(3), GradientMonitor(), **{"max_epochs": 2} | arguments)
    assert warned() == []


@pytest.mark.filterwarnings("ignore:GradientMonitor. optimizer 0 .SGD. stepped past Lightning:UserWarning")
def test_trial_that_measures_nothing(fit) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        module.manual_backward(loss_of(module.net, batch))
        module.optimizers(use_pl_optimizer=False).step()

    module = ManualTraining(script)
    fit(module, batches(2), GradientMonitor(), fast_dev_run=2, log_every_n_steps=0)
    assert module.moved == [True, True]


def test_resumed_steps_of_which_none_is_logged(fit, trainer, warned, tmp_path: Path) -> None:
    data = batches(3)
    made = fit(Training(), data, max_epochs=2)
    made.save_checkpoint(tmp_path / "two.ckpt")
    second = trainer(GradientMonitor(), max_epochs=3, log_every_n_steps=5)
    second.fit(Training(), DataLoader(data, batch_size=None), ckpt_path=tmp_path / "two.ckpt")
    (warning,) = warned()
    assert (
        "has measured nothing, because log_every_n_steps=5 logs none of the steps 7 to 9: set it to 3 or less"
        in warning
    )


def test_bypassed_optimizer_warns(fit) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        module.manual_backward(loss_of(module.net, batch))
        module.optimizers(use_pl_optimizer=False).step()

    with pytest.warns(UserWarning, match=r"GradientMonitor: optimizer 0 \(SGD\) stepped past .* not shown"):
        fit(ManualTraining(script), batches(1), GradientMonitor(), **QUIET)


def test_untested_strategy_is_refused(fit) -> None:
    with pytest.raises(MisconfigurationException, match="GradientMonitor has not been tested with ThirdParty"):
        fit(Training(), batches(1), GradientMonitor(), strategy=ThirdParty(device=torch.device("cpu")))


def test_resumed_run_goes_on_from_the_running_mean(fit, trainer, tmp_path: Path) -> None:
    whole, half, rest = (GradientMonitor() for _ in range(3))
    data = batches(4)
    fit(Training(), data, whole, max_epochs=2, **QUIET)
    made = fit(Training(), data, half, max_epochs=1, **QUIET)
    made.save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(rest, max_epochs=2, **QUIET)
    second.fit(Training(), DataLoader(data, batch_size=None), ckpt_path=tmp_path / "half.ckpt")
    ours, theirs = rest.state_dict(), whole.state_dict()
    assert ours["steps"] == theirs["steps"] == list(range(8))
    for key in ("sums", "weights", "sigma", "cosine", "relative_size"):
        assert torch.equal(ours[key], theirs[key])
        assert ours[key].isfinite().all()
    # A new training begins anew.
    fit(Training(), data, rest, **QUIET)
    assert rest._history.steps == list(range(4))


def test_two_monitors_need_two_prefixes(fit) -> None:
    collected = Collected()
    fit(Training(), batches(1), GradientMonitor(prefix="a"), GradientMonitor(prefix="b"), collected, **QUIET)
    assert collected.metrics[0]["a/norm"] == collected.metrics[0]["b/norm"]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradientMonitor`"):
        fit(Training(), batches(1), GradientMonitor(), GradientMonitor(), **QUIET)


class OneSided(LightningModule):
    """A linear layer whose inputs are all positive, so that the mean dominates the gradient of ``output.weight``.

    Each target of the hidden layer is as far above its output as below, so that its mean does not dominate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6, bias=False)
        self.output = nn.Linear(6, 1, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
        return self.output(1 + 0.1 * batch[:, :1].abs() * torch.ones(6)).sum() + (self.hidden(batch) * signs).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class TestDominatingMeans:
    def data(self, count: int = 6) -> list[Tensor]:
        return [torch.randn(8, 4) for _ in range(count)]

    @pytest.mark.parametrize(
        "centring",
        [ZNormCallback(), GradientCentralizationCallback(), SINGCallback(), ZNormCallback(exclude="hidden.*")],
    )
    def test_warns_once_if_a_callback_centres_them(self, fit, warned, centring) -> None:
        fit(OneSided(), self.data(), GradientMonitor(), centring, max_epochs=3, log_every_n_steps=1)
        (message,) = [line for line in warned() if "GradientMonitor" in line]
        assert "0.9 of the squared gradient of output.weight (1.00). It is subtracted there" in message
        assert 'centering="adaptive"' in message

    @pytest.mark.parametrize(
        "callbacks",
        [[], [ZNormCallback(centering="adaptive")], [ZNormCallback(exclude="output.*")]],
        ids=["none", "adaptive", "excluded"],
    )
    def test_tells_once_if_nothing_centres_them(self, fit, warned, said, callbacks) -> None:
        fit(OneSided(), self.data(), GradientMonitor(), *callbacks, max_epochs=3, log_every_n_steps=1)
        assert not [line for line in warned() if "GradientMonitor" in line]
        (message,) = [line for line in said() if "squared gradient" in line]
        assert message.endswith(
            "of output.weight (1.00). No callback is known to subtract it; ZNorm with full centring would."
        )

    @pytest.mark.parametrize("callback", [GradientCentralizationCallback(), SINGCallback()], ids=["gc", "sing"])
    def test_methods_that_centre_rows_leave_vectors_and_several_rows(self, fit, warned, said, callback) -> None:
        """The mean of the whole gradient dominates, and is none of a row."""

        class Vector(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(20))
                self.two = nn.Linear(20, 2, bias=False)

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return (self.scale + self.two.weight).sum()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=1e-3)

        fit(Vector(), self.data(), GradientMonitor(include="scale"), callback, max_epochs=1, log_every_n_steps=1)
        assert not [line for line in warned() if "GradientMonitor" in line]
        assert len([line for line in said() if "is known to subtract it" in line]) == 1

    def test_two_optimizers_of_one_parameter(self, fit, warned) -> None:
        class Both(OneSided):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: Tensor, batch_idx: int) -> None:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(super().training_step(batch, batch_idx))
                    optimizer.step()

            def configure_optimizers(self):
                return [torch.optim.SGD(self.output.parameters(), lr=1e-3) for _ in range(2)]

        fit(Both(), self.data(), GradientMonitor(include="output.*"), ZNormCallback(), log_every_n_steps=1)
        (message,) = [line for line in warned() if "GradientMonitor" in line]
        assert "of output.weight (optimizer 0) (1.00), output.weight (optimizer 1) (1.00). It is" in message

    def test_a_small_tensor_is_no_matter_of_luck(self, fit, said) -> None:
        class Pairs(LightningModule):
            """Gradients of two elements at random: the mean of one in five holds more than 0.9 of its square."""

            def __init__(self) -> None:
                super().__init__()
                self.pairs = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(50))

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return sum((pair * torch.randn(2)).sum() for pair in self.pairs)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=1e-3)

        for count in (1, 5, 20):
            fit(Pairs(), self.data(count), GradientMonitor(), max_epochs=1, log_every_n_steps=1)
        assert not [line for line in said() if "squared gradient" in line]

    def test_tells_at_the_end_of_a_short_training(self, fit, said) -> None:
        # Six elements in four measurements tell enough.
        fit(OneSided(), self.data(8), GradientMonitor(), max_epochs=1, log_every_n_steps=2)
        assert len([line for line in said() if "of output.weight" in line]) == 1

    def test_says_nothing_if_no_mean_dominates(self, fit, said) -> None:
        collected = Collected()
        fit(OneSided(), self.data(), GradientMonitor(include="hidden.*"), collected, log_every_n_steps=1, max_epochs=1)
        assert not [line for line in said() if "squared gradient" in line]
        assert max(metrics["grad/mean_share_max"] for metrics in collected.metrics) < 0.9

    def test_names_at_most_five(self, fit, said) -> None:
        class Many(OneSided):
            def __init__(self) -> None:
                super().__init__()
                self.more = nn.ParameterList(nn.Parameter(torch.zeros(4)) for _ in range(6))

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return super().training_step(batch, batch_idx) + sum(each.sum() for each in self.more)

        fit(Many(), self.data(), GradientMonitor(), max_epochs=1, log_every_n_steps=1)
        (message,) = [line for line in said() if "squared gradient" in line]
        assert " and 2 more. No callback" in message

    def test_resumed_training_goes_on_with_the_shares(self) -> None:
        history, twin = GradientHistory(), GradientHistory()
        rows = [history.register(name, 2) for name in "ab"]
        history.add_shares(rows, torch.tensor([0.5, torch.nan]).double(), torch.tensor([9.0, 9.0]))
        history.add_shares(rows[:1], torch.tensor([1.0]).double(), torch.tensor([9.0]))
        twin.load_state_dict(history.state_dict())
        twin.add_shares([twin.register("c", 1), 1], torch.tensor([0.25, 0.75]).double(), torch.tensor([17.0, 9.0]))
        assert twin.mean_share.tolist() == [0.75, 0.75, 0.25]
        assert twin.trusted_shares(16).nan_to_num(-1).tolist() == [0.75, -1, 0.25]

    def test_checkpoint_without_shares(self) -> None:
        history, twin = GradientHistory(), GradientHistory()
        row = history.register("a", 2)
        history.add(0, [row], torch.ones(1).double(), torch.tensor([True]))
        state = history.state_dict()
        old = {key: value for key, value in state.items() if "share" not in key}
        assert len(old) == len(state) - 3
        twin.load_state_dict(old)
        assert twin.mean_share.isnan().all()
        twin.add_shares([row], torch.tensor([0.5]).double(), torch.tensor([2.0]))
        assert twin.mean_share.tolist() == [0.5]

    def test_picture(self) -> None:
        history = GradientHistory()
        rows = [
            history.register(f"net.{name}", ndim) for name, ndim in [("0.weight", 2), ("0.bias", 1), ("2.weight", 4)]
        ]
        history.add_shares(rows, torch.tensor([0.25, 1.0, 0.96875]).double(), torch.tensor([9.0, 3.0, 9.0]))
        weights, vectors = monitor_plots.mean_share(history, 0.9).axes
        drawn = [axes.get_lines()[0].get_ydata().tolist() for axes in (weights, vectors)]
        assert drawn == [[0.25, 0.96875], [1.0]]
        assert [axes.get_lines()[1].get_ydata()[0] for axes in (weights, vectors)] == [0.9, 0.9]
        assert [label.get_text() for label in weights.get_xticklabels()] == ["net.0.weight", "net.2.weight"]


class TestWhereItGoes:
    def test_csv_and_png(self, fit, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        fit(Training(), batches(4), GradientMonitor(), logger=logger, log_every_n_steps=2)
        lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        assert "grad/norm" in lines[0]
        assert [line.split(",")[lines[0].split(",").index("step")] for line in lines[1:]] == ["1", "3"]
        for name in ("sigma_over_steps", "sigma_by_depth", "mean_share", "znorm_change"):
            with Image.open(Path(logger.log_dir) / "gradients" / f"grad_{name}.png") as picture:
                assert picture.width > 500

    def test_tensorboard(self, fit, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        with patch.object(logger.experiment, "add_image") as images:
            fit(Training(), batches(1), GradientMonitor(), logger=logger, **QUIET)
        assert [call.args[0] for call in images.call_args_list] == [
            "grad/sigma_over_steps",
            "grad/sigma_by_depth",
            "grad/mean_share",
            "grad/znorm_change",
        ]
        assert images.call_args.args[1].dtype == torch.uint8

    def test_training_that_fails(self, fit, tmp_path: Path) -> None:
        class Failing(Training):
            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
                if batch_idx == 2:
                    raise KeyError("as it happens")
                return super().training_step(batch, batch_idx)

        with pytest.raises(KeyError, match="as it happens"):
            fit(Failing(), batches(4), GradientMonitor(), **QUIET)
        assert len(list((tmp_path / "gradients").glob("*.png"))) == 4

    @pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"log_every_n_steps": 50}])
    def test_nothing_where_there_is_nothing_to_show(self, fit, warned, tmp_path: Path, arguments) -> None:
        fit(Training(), batches(2), GradientMonitor(), **arguments)
        assert not (tmp_path / "gradients").exists()

    def test_no_logger_and_no_folder_leave_none(self, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        arguments = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        made = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, callbacks=[GradientMonitor()], **arguments, **QUIET
        )
        made.fit(Training(), DataLoader(batches(2), batch_size=None))
        assert "grad/norm" in made.callback_metrics
        assert not list(tmp_path.iterdir())
        told = [line for line in said() if "GradientMonitor" in line]
        assert told == [
            "GradientMonitor writes no pictures, because the Trainer has neither a logger nor a default_root_dir of "
            "its own. Its method `figures()` returns them after training, and the numbers are in "
            "trainer.callback_metrics."
        ]

    @pytest.mark.parametrize("folder", [".", "runs"])
    def test_no_logger_but_a_folder_takes_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder) -> None:
        monkeypatch.chdir(tmp_path)
        arguments = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        made = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, callbacks=[GradientMonitor()], default_root_dir=folder,
            **arguments, **QUIET,
        )  # fmt: skip
        made.fit(Training(), DataLoader(batches(1), batch_size=None))
        assert len(list((tmp_path / folder / "gradients").glob("*.png"))) == 4


class TestHistory:
    def test_is_bounded_and_evenly_spaced(self) -> None:
        history = GradientHistory(max_steps=8)
        rows = [history.register(name, 2) for name in "ab"]
        for step in range(100):
            finite = torch.tensor([True, step != 77])
            history.add(10 * step, rows, torch.tensor([float(step + 1), 1.0]).double(), finite)
            assert len(history.steps) <= 8
        assert history.steps == [160 * number for number in range(7)]
        assert history.sigma[0].tolist() == [16.0 * number + 1 for number in range(7)]
        # Of the steps from 64 to 79 one was not finite.
        assert history.sigma[1].isinf().nonzero().flatten().tolist() == [4]

    def test_ratio_to_the_mean_of_those_before(self) -> None:
        history = GradientHistory()
        rows, finite = [history.register("a", 1)], torch.tensor([True])
        ratios = [
            float(history.add(step, rows, torch.tensor([value]).double(), finite))
            for step, value in enumerate([2.0, 4.0, 1.0])
        ]
        assert ratios == pytest.approx([1.0, 2.0, 1 / ((0.9 * 2 + 4) / 1.9)])

    def test_parameter_that_comes_later(self) -> None:
        history = GradientHistory()
        finite = torch.tensor([True])
        history.add(0, [history.register("a", 1)], torch.ones(1).double(), finite)
        history.add(1, [history.register("b", 1)], torch.ones(1).double(), finite)
        assert history.sigma.isnan().tolist() == [[False, True], [True, False]]
        twin = GradientHistory()
        twin.load_state_dict(history.state_dict())
        assert torch.equal(twin.sigma.isnan(), history.sigma.isnan())
        assert twin.names == ["a", "b"]


def test_heat_map_names_its_rows_and_its_axis() -> None:
    history = GradientHistory()
    rows = [history.register(f"net.{name}", ndim) for name, ndim in [("0.weight", 2), ("0.bias", 1), ("2.weight", 4)]]
    for step in range(3):
        history.add(step, rows, torch.tensor([1.0, 2.0, 3.0]).double(), torch.ones(3, dtype=torch.bool))
    weights, vectors, bar = heat_map(history).axes
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in (weights, vectors)]
    assert names == [["net.0.weight", "net.2.weight"], ["net.0.bias"]]
    assert [axes.get_title(loc="left").split(",")[0] for axes in (weights, vectors)] == ["weights", "biases and scales"]
    assert [axes.get_xlabel() for axes in (weights, vectors, bar)] == ["", "step", ""]
    depth = by_depth(history).axes[0]
    assert [label.get_text() for label in depth.get_xticklabels()] == ["net.0.weight", "net.2.weight"]


@pytest.mark.full
def test_pictures_of_special_cases() -> None:
    history = GradientHistory()
    rows = [history.register(f"layers.{number}.weight", ndim) for number, ndim in enumerate((2, 1))]
    values = {"grey": torch.zeros(2), "scale": torch.tensor([1e-3, 1e-9])}
    plain = GradientHistory()
    for name in history.names:
        plain.register(name, 2 - history.names.index(name))
    plain.add(0, rows, values["scale"].double(), torch.tensor([True, True]))
    history.add(0, rows, values["grey"].double(), torch.tensor([True, False]))
    history.add(1, rows, values["scale"].double(), torch.tensor([True, True]))

    def colours(picture: Image.Image) -> set[tuple[int, int, int]]:
        # Those of cells and bars, not the greys of a letter's edge.
        return {colour for count, colour in picture.getcolors(2**24) if count > 500}

    vermilion, grey = (213, 94, 0), (191, 191, 191)
    assert {vermilion, grey} <= colours(image_of(heat_map(history)))
    assert not {vermilion, grey} & colours(image_of(heat_map(plain)))
    for one in (history, plain):
        assert image_of(by_depth(one)).width == image_of(heat_map(one)).width
