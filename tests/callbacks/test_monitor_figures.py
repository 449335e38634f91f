"""The figures of GradientMonitor: what ZNorm would change, and where figures go."""

import copy
import math
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_znorm import GradientMonitor, ZNormCallback
from lightning_znorm.callbacks.monitor_history import GradientHistory
from lightning_znorm.callbacks.monitor_plots import figures_of, znorm_change
from lightning_znorm.errors import ZNormImportError
from tests.callbacks.test_gradient_monitor import true_grads
from tests.callbacks.training import LR, ManualTraining, Training, Weights, batches, loss_of, network

NAMES = ["sigma_over_steps", "sigma_by_depth", "mean_share", "znorm_change"]
QUIET = {"log_every_n_steps": 1}


def changes(grads: Weights, eps: float) -> tuple[list[float], list[float]]:
    """Cosines and relative sizes by their definitions, from the gradients and their z-scores, in float64."""
    z = [(grad - grad.mean()) / (grad.std(correction=0) + eps) for grad in grads.values()]
    norms = [(float(one.norm()), float(grad.norm())) for one, grad in zip(z, grads.values(), strict=True)]
    whole = math.hypot(*(after for after, _ in norms)) / math.hypot(*(before for _, before in norms))
    cosines = [float((one * grad).sum()) / a / b for one, grad, (a, b) in zip(z, grads.values(), norms, strict=True)]
    return cosines, [after / before / whole for after, before in norms]


@pytest.mark.parametrize("eps", [1e-10, 0.05])
@pytest.mark.parametrize("with_znorm", [False, True])
def test_changes_by_hand(fit, eps: float, with_znorm: bool) -> None:
    module, data, monitor = Training(), batches(3), GradientMonitor(eps=eps)
    fit(module, data, *([ZNormCallback()] if with_znorm else []), monitor, **QUIET)
    state = monitor.state_dict()
    assert state["names"] == [f"net.{name}" for name in module.weights[0]]
    for number, batch in enumerate(data):
        cosines, sizes = changes(true_grads(module, module.weights[number], [batch]), eps)
        assert state["cosine"][:, number].tolist() == pytest.approx(cosines, rel=1e-5)
        assert state["relative_size"][:, number].tolist() == pytest.approx(sizes, rel=1e-5)
        assert max(sizes) / min(sizes) > 1.2  # another formula would show


def test_only_those_that_take_part_make_the_whole(fit) -> None:
    module, data, monitor = Training(), batches(1), GradientMonitor(exclude="*.bias")
    fit(module, data, monitor, **QUIET)
    grads = true_grads(module, module.weights[0], data)
    del grads["first.bias"]
    rows = [monitor.state_dict()["names"].index(f"net.{name}") for name in grads]
    kept = monitor.state_dict()["relative_size"][rows, 0].tolist()
    assert kept == pytest.approx(changes(grads, 1e-10)[1], rel=1e-5)


def test_optimizers_have_a_whole_each(fit) -> None:
    def script(module: LightningModule, batch: Tensor) -> None:
        module.manual_backward(loss_of(module.net, batch))
        for optimizer in module.optimizers():
            optimizer.step()

    net, data, monitor = network(), batches(1), GradientMonitor()
    module = ManualTraining(
        script, net=net, optimizer=lambda _: [SGD(net[2].parameters(), LR), SGD(net[0].parameters(), LR)]
    )
    fit(module, data, monitor, **QUIET)
    grads = true_grads(module, module.weights[0], data)
    first = changes({name: grads[name] for name in ("first.weight", "first.bias")}, 1e-10)[1]
    assert monitor.state_dict()["relative_size"][:, 0].tolist() == pytest.approx([*first, 1.0], rel=1e-5)


def test_gradients_that_are_not_finite_or_zero(fit) -> None:
    class Odd(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(nn.Parameter(torch.ones(3)) for _ in range(5))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            factors = [[1.0, 2.0, 4.0], [math.inf, 1.0, 1.0], [0.0, 0.0, 0.0], [5.0, 5.0, 5.0], [0.1, 0.2, -0.6]]
            return sum((part * torch.tensor(each)).sum() for part, each in zip(self.parts, factors, strict=True))

        def configure_optimizers(self) -> SGD:
            return SGD(self.parameters(), 0.0)

    monitor = GradientMonitor()
    fit(Odd(), batches(1), monitor, **QUIET)
    sizes, cosines = (monitor.state_dict()[key][:, 0] for key in ("relative_size", "cosine"))
    assert sizes.isnan().tolist() == cosines.isnan().tolist() == [False, True, True, False, False]
    assert sizes[3] == cosines[3] == 0.0  # a constant gradient
    finite = {str(number): torch.tensor(each).double() for number, each in enumerate([[1, 2, 4], [0.1, 0.2, -0.6]])}
    whole = math.sqrt(3 + 3) / math.sqrt(21 + 0.41 + 75)
    norms = [math.sqrt(3) / float(each.norm()) / whole for each in finite.values()]
    assert sizes[[0, 4]].tolist() == pytest.approx(norms, rel=1e-5)
    assert all(figure.get_axes() for figure in monitor.figures().values())


class TestHistory:
    def fill(self, history: GradientHistory, steps: range) -> None:
        rows = [history.register(name, 2) for name in "ab"]
        for step in steps:
            finite = torch.tensor([True, step % 5 != 0])
            values = torch.tensor([step + 1.0, 2.0]).double()
            history.add(step, rows, values, finite, 1 / values, 2 * values)

    def test_is_bounded(self) -> None:
        history = GradientHistory(max_steps=8)
        self.fill(history, range(100))
        assert len(history.steps) <= 8
        assert history.cosine[0].tolist() == pytest.approx([1 / (step + 1) for step in history.steps])
        assert history.relative_size[0].tolist() == [2.0 * (step + 1) for step in history.steps]
        # What is not finite has no cosine, and one of its neighbours tells it.
        assert history.cosine[1].tolist() == [0.5] * len(history.steps)

    def test_resumed_history_is_the_whole_one(self) -> None:
        whole, half, rest = (GradientHistory(max_steps=8) for _ in range(3))
        self.fill(whole, range(50))
        self.fill(half, range(23))
        rest.load_state_dict(pickle.loads(pickle.dumps(half.state_dict())))
        self.fill(rest, range(23, 50))
        for key, value in whole.state_dict().items():
            other = rest.state_dict()[key]
            same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
            assert same or torch.equal(value.nan_to_num(-1), other.nan_to_num(-1)), key

    def test_checkpoint_of_an_older_release(self) -> None:
        history, twin = GradientHistory(), GradientHistory()
        self.fill(history, range(1, 3))
        state = history.state_dict()
        twin.load_state_dict({key: value for key, value in state.items() if key not in ("cosine", "relative_size")})
        assert torch.equal(twin.sigma, history.sigma)
        assert twin.cosine.isnan().all()
        assert figures_of(twin, 0.9).keys() == set(NAMES)
        self.fill(twin, range(3, 4))
        assert twin.relative_size[0].nan_to_num(-1).tolist() == [-1, -1, 8]

    def test_optimizers_of_one_step_share_a_column(self) -> None:
        history = GradientHistory()
        for name, value in (("a", 0.25), ("b", 0.5)):
            one = torch.tensor([value]).double()
            history.add(7, [history.register(name, 2)], one, torch.tensor([True]), one, 8 * one)
        assert history.cosine.tolist() == [[0.25], [0.5]]
        assert history.relative_size.tolist() == [[2.0], [4.0]]


def test_the_picture_shows_medians_and_bands_of_weights_by_depth() -> None:
    history = GradientHistory()
    rows = [history.register(name, ndim) for name, ndim in [("0.weight", 2), ("0.bias", 1), ("2.weight", 4)]]
    values = torch.arange(1.0, 12.0).double()
    for step, value in enumerate(values):
        column = torch.stack([value, 100 * value, 10 * value])
        history.add(step, rows, column, torch.ones(3, dtype=torch.bool), column / 110, column)
    direction, size = znorm_change(history).axes
    assert direction.get_lines()[0].get_ydata().tolist() == pytest.approx([6 / 110, 60 / 110])
    assert size.get_lines()[0].get_ydata().tolist() == [6.0, 60.0]
    band = size.collections[0].get_paths()[0].vertices[:, 1]
    assert sorted(set(band.tolist())) == pytest.approx([2.0, 10.0, 20.0, 100.0])  # 10 and 90 % of 1 to 11
    assert size.get_yscale() == "log"
    assert [label.get_text() for label in size.get_xticklabels()] == ["0.weight", "2.weight"]
    assert "under Adam, ZNorm changes the direction alone" in znorm_change(history).get_supxlabel()


class TestFigures:
    def test_are_returned_after_training(self, fit, tmp_path: Path) -> None:
        monitor = GradientMonitor()
        with pytest.raises(RuntimeError, match="GradientMonitor has measured nothing yet, so there are no figures"):
            monitor.figures()
        fit(Training(), batches(2), monitor, **QUIET)
        figures = monitor.figures()
        assert list(figures) == NAMES
        figures["znorm_change"].axes[0].set_title("mine")
        figures["znorm_change"].savefig(tmp_path / "own.pdf")
        assert (tmp_path / "own.pdf").stat().st_size > 1000
        assert monitor.figures()["znorm_change"].axes[0].get_title() == ""
        copies = pickle.loads(pickle.dumps(figures)), copy.deepcopy(figures)
        for made in (figures, *copies):
            assert made["mean_share"]._repr_png_().startswith(b"\x89PNG")
        copies[0]["mean_share"].clear()
        assert len(figures["mean_share"]._repr_png_()) > len(copies[0]["mean_share"]._repr_png_())

    def test_a_kept_state_has_them(self, fit) -> None:
        monitor, twin = GradientMonitor(), GradientMonitor()
        fit(Training(), batches(2), monitor, **QUIET)
        twin.load_state_dict(monitor.state_dict())
        assert list(twin.figures()) == NAMES
        assert list(copy.deepcopy(monitor).figures()) == NAMES

    def test_during_training(self, fit) -> None:
        monitor, found = GradientMonitor(), []

        class Looking(Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                found.append(len(monitor.figures()))

        fit(Training(), batches(2), monitor, Looking(), **QUIET)
        assert found == [4, 4]


class TestWhereTheyAre:
    def lines(self, said) -> list[str]:
        return [line for line in said() if "pictures" in line]

    def test_is_said_once(self, fit, said, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        fit(Training(), batches(2), GradientMonitor(prefix="a/b"), logger=logger, max_epochs=3, **QUIET)
        folder = Path(logger.log_dir) / "gradients"
        assert self.lines(said) == [
            f"GradientMonitor: the pictures of the gradients are {folder / 'a_b_*.png'}. Its method `figures()` "
            "returns them as matplotlib figures."
        ]
        assert len(list(folder.glob("a_b_*.png"))) == 4

    @pytest.mark.parametrize("error", [KeyError("as it happens"), KeyboardInterrupt()])
    def test_is_said_when_training_fails(self, fit, said, error: BaseException) -> None:
        class Failing(Training):
            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
                if batch_idx == 1:
                    raise error
                return super().training_step(batch, batch_idx)

        monitor = GradientMonitor()
        with pytest.raises((KeyError, SystemExit, KeyboardInterrupt)):
            fit(Failing(), batches(3), monitor, **QUIET)
        assert len(self.lines(said)) == 1
        assert list(monitor.figures()) == NAMES


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a stand-in for IPython has been given to show."""
    shown: list[Any] = []
    shell = types.SimpleNamespace(kernel=object())
    display = types.SimpleNamespace(display=lambda *objects: shown.extend(objects))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell, display=display))
    return shown


class TestNotebook:
    def test_shows_them_after_training(self, fit, notebook) -> None:
        fit(Training(), batches(2), GradientMonitor(), max_epochs=2, **QUIET)
        assert [type(figure).__name__ for figure in notebook] == ["Figure"] * 4

    def test_shows_them_without_a_folder(self, notebook, tmp_path, monkeypatch: pytest.MonkeyPatch, trainer) -> None:
        monkeypatch.chdir(tmp_path)
        made = trainer(GradientMonitor(), **QUIET)
        made._default_root_dir = str(tmp_path)
        made.fit(Training(), DataLoader(batches(1), batch_size=None))
        assert len(notebook) == 4
        assert not (tmp_path / "gradients").exists()

    @pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"limit_train_batches": 0}])
    def test_shows_nothing_where_nothing_is_measured(self, fit, notebook, arguments) -> None:
        fit(Training(), batches(1), GradientMonitor(), **QUIET, **arguments)
        assert notebook == []

    def test_a_terminal_shows_none(self, fit, notebook, monkeypatch: pytest.MonkeyPatch) -> None:
        for shell in (None, object()):
            monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda shell=shell: shell)
            fit(Training(), batches(1), GradientMonitor(), **QUIET)
        assert notebook == []

    def test_a_process_that_a_notebook_started_shows_none(self, fit, notebook, monkeypatch) -> None:
        monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
        fit(Training(), batches(1), GradientMonitor(), **QUIET)
        assert notebook == []

    def test_without_matplotlib_the_training_ends_well(self, fit, notebook, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monitor = GradientMonitor()
        fit(Training(), batches(2), monitor, **QUIET)
        assert notebook == []
        with pytest.raises(ZNormImportError, match=r"^GradientMonitor\.figures needs matplotlib: pip install"):
            monitor.figures()

    @pytest.mark.full
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
    def test_a_real_kernel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the cell nor the package imports pyplot, without which a notebook does not know figures."""
        nbclient = pytest.importorskip("nbclient")
        pytest.importorskip("ipykernel")
        import nbformat

        monkeypatch.chdir(tmp_path)
        cells = [
            "import torch\nfrom lightning.pytorch import LightningModule, Trainer\nfrom lightning_znorm import "
            "GradientMonitor\n"
            "class Net(LightningModule):\n"
            "    def __init__(self):\n        super().__init__()\n        self.net = torch.nn.Linear(3, 2)\n"
            "    def training_step(self, batch, _):\n        return self.net(batch).square().mean()\n"
            "    def configure_optimizers(self):\n        return torch.optim.SGD(self.parameters(), 0.1)\n"
            "monitor = GradientMonitor()\n"
            "quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False)\n"
            "Trainer(accelerator='cpu', max_epochs=1, callbacks=[monitor], log_every_n_steps=1, **quiet).fit("
            "Net(), torch.utils.data.DataLoader(torch.randn(12, 3), batch_size=4))",
            "monitor.figures()['znorm_change']",
        ]
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
        pictures = [sum("image/png" in output.get("data", {}) for output in cell["outputs"]) for cell in book["cells"]]
        assert pictures == [4, 1]
