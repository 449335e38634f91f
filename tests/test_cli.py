"""The command line as users call it: through `main`, from a folder that is not the repository."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import numpy as np
import own_module
import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

import lightning_znorm
from lightning_znorm.cli import main
from lightning_znorm.cli.checkpoints import last_checkpoint
from lightning_znorm.cli.components import CommandTrainer
from lightning_znorm.cli.config_files import dotted, in_order, read_config, shipped_configs
from lightning_znorm.cli.error_sentences import sentence
from lightning_znorm.compare.forks import autograd_works_in_copies
from lightning_znorm.tasks import ClassificationTask
from tests.medical import write_lgg
from tests.processes import run_forked, run_python, start_autograd

DIGITS = "configs/digits/resnet20.yaml"
ZNORM = "configs/methods/znorm.yaml"
CLIP = "configs/methods/clip.yaml"
CENTRALIZATION = "configs/methods/gc.yaml"
WEIGHT_DECAY = "configs/methods/wd-1e-3.yaml"
METHODS = [name for name in shipped_configs() if name.startswith("configs/methods/")]
# Two optimizer steps, and one validation batch.
SHORT = shlex.split(
    "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.accelerator cpu"
    " --trainer.log_every_n_steps 1"
)
OWN = ["--model", "own_module.OwnModule", "--data", "own_module.OwnData"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`|You passed in a `val_dataloader`"),
]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def configs(*names: str) -> list[str]:
    return [arg for name in names for arg in ("--config", name)]


def refusal(*args: str) -> str:
    """Return the sentence that refuses a command."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    assert isinstance(exit_info.value.code, str)
    assert exit_info.value.code.startswith("error: ")
    return exit_info.value.code


def resolved(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    """Return the settings that `--print_config` prints."""
    with pytest.raises(SystemExit) as exit_info:
        main([*args, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "stage", ["train", *(pytest.param(stage, marks=pytest.mark.full) for stage in ("val", "test", "predict"))]
)
def test_one_batch_is_not_every_batch(capsys, stage):
    """Other imports may make typing reorder Lightning's Union[int, float], and then 1 is read as 1.0."""

    def elsewhere(share: float | int | None = None) -> None: ...

    get_type_hints(elsewhere)
    annotation = CommandTrainer.__init__.__annotations__[f"limit_{stage}_batches"]
    assert annotation.__args__ == (int, float, NoneType)
    for text, limit in (("1", 1), ("2", 2), ("1.0", 1.0), ("0.5", 0.5)):
        config = resolved(capsys, "fit", *configs(DIGITS), f"--trainer.limit_{stage}_batches", text)
        got = config["trainer"][f"limit_{stage}_batches"]
        assert (got, type(got)) == (limit, type(limit))


def callbacks(config: dict) -> list[str]:
    return [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]


def moves(capsys: pytest.CaptureFixture[str], *names: str) -> str:
    """What a command says on stderr of the order of its files."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *configs(*names), "--print_config"])
    return capsys.readouterr().err


class TestHelp:
    def test_version(self, capsys):
        main(["--version"])
        assert capsys.readouterr().out == f"lightning-znorm {lightning_znorm.__version__}\n"

    @pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
    def test_help_names_commands_and_files(self, args, capsys):
        main(args)
        out = capsys.readouterr().out
        for word in ("fit", "validate", "test", "predict", "--version", DIGITS, *METHODS):
            assert word in out

    def test_commands_in_help_are_right(self, capsys):
        main(["--help"])
        commands = re.findall(r"python -m lightning_znorm (fit --config .*)", capsys.readouterr().out)
        assert len(commands) == 2
        for command in commands:
            resolved(capsys, *command.split())

    def test_help_of_a_command(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "--help"])
        assert exit_info.value.code == 0
        assert "--trainer.max_epochs" in capsys.readouterr().out

    @pytest.mark.parametrize("args", ["['--version']", "['--help']", "['fitt']", f"['fit', '--config', '{ZNORM}x']"])
    def test_without_torch(self, args):
        lines = ("import sys", "from lightning_znorm.cli import main", f"try: main({args})")
        program = "\n".join((*lines, "finally: print('torch' in sys.modules)"))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stdout.endswith("False\n")

    def test_as_a_program(self):
        done = subprocess.run(
            [sys.executable, "-m", "lightning_znorm", "--version"], capture_output=True, text=True, timeout=60
        )
        assert done.stdout == f"lightning-znorm {lightning_znorm.__version__}\n"

    def test_unknown_command(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            main(["fitt", "--config", DIGITS])
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.endswith("error: there is no command fitt: did you mean fit?\n")


class TestFindingConfigs:
    def test_shipped(self):
        assert read_config(DIGITS).path.is_file()
        assert read_config(f"./{DIGITS}").path == read_config(DIGITS).path

    def test_on_disk_first(self):
        write(ZNORM, "trainer: {max_epochs: 1}")
        assert read_config(ZNORM).settings == {"trainer.max_epochs": 1}

    def test_neither(self):
        assert f"did you mean {ZNORM} or " in refusal("fit", *configs(DIGITS, "configs/methods/znrom.yaml"))
        assert "--help lists" in refusal("fit", "--config", "x")

    @pytest.mark.parametrize("text", ["# nothing", "- a list", "a string"])
    def test_no_settings(self, text):
        assert "mine.yaml holds no settings" in refusal("fit", "--config", write("mine.yaml", text))

    def test_no_yaml(self):
        assert "mine.yaml is not valid YAML" in refusal("fit", "--config", write("mine.yaml", "a: [1"))

    @pytest.mark.parametrize(
        "args",
        [
            ["fit", "--config", DIGITS, "--config", WEIGHT_DECAY],
            ["fit", f"--config={DIGITS}", "-c", WEIGHT_DECAY],
            ["--config", DIGITS, "fit", f"--config={WEIGHT_DECAY}"],
            ["-c", DIGITS, "-c", WEIGHT_DECAY, "fit"],
        ],
    )
    def test_every_way_of_naming(self, args, capsys):
        reference = resolved(capsys, "fit", *configs(DIGITS, WEIGHT_DECAY))
        assert reference["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.AdamW"
        assert resolved(capsys, *args) == reference

    def test_flags_win_wherever_they_stand(self, capsys):
        flags = shlex.split("--trainer.max_epochs 3 --model.init_args.optimizer.init_args.lr 0.5")
        before = resolved(capsys, "fit", *flags, *configs(DIGITS))
        assert before["trainer"]["max_epochs"] == 3
        assert before["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
        assert before == resolved(capsys, "fit", *configs(DIGITS), *flags)


class TestNoMethodIsLost:
    @pytest.mark.parametrize("method", METHODS)
    def test_both_orders(self, method, capsys):
        """A method goes behind an experiment, wherever it is named, and one line says so."""
        assert resolved(capsys, "fit", *configs(DIGITS, method)) == resolved(capsys, "fit", *configs(method, DIGITS))
        assert moves(capsys, method, DIGITS) == f"{method} is applied after {DIGITS}, because methods go last.\n"
        assert moves(capsys, DIGITS, method) == ""

    def test_the_order_of_many(self, capsys):
        mine = write("my settings.yaml", "trainer: {max_epochs: 1}")
        said = f"{ZNORM} and {CENTRALIZATION} are applied after {DIGITS}, because methods go last.\n"
        assert moves(capsys, ZNORM, CENTRALIZATION, DIGITS, mine, CLIP) == said
        ordered = in_order([read_config(name) for name in (ZNORM, CENTRALIZATION, DIGITS, mine, CLIP)])
        assert [file.name for file in ordered] == [DIGITS, ZNORM, CENTRALIZATION, mine, CLIP]
        config = resolved(capsys, "fit", *configs(ZNORM, DIGITS, mine, CLIP))
        assert (config["trainer"]["max_epochs"], config["trainer"]["gradient_clip_val"]) == (1, 0.1)
        assert callbacks(config)[-1] == "ZNormCallback"

    def test_the_right_order_of_many(self):
        """A file that is no method is not moved: whether an experiment is to override it, only the user knows."""
        mine = write("my settings.yaml", "trainer: {max_epochs: 1}")
        message = refusal("fit", *configs(mine, DIGITS, ZNORM))
        assert message.endswith(f"--config {DIGITS} --config 'my settings.yaml' --config {ZNORM}")

    def test_method_that_names_a_model(self, capsys):
        """It is a method all the same, because of its folder."""
        big = write("methods/big.yaml", "model: {class_path: ClassificationTask, init_args: {model: resnet56}}")
        assert moves(capsys, big, DIGITS) == f"{big} is applied after {DIGITS}, because methods go last.\n"
        ordered = in_order([read_config(name) for name in (DIGITS, ZNORM, big)])
        assert [file.name for file in ordered] == [DIGITS, ZNORM, big]

    def test_the_order_among_experiments_stays(self, capsys):
        whole = yaml.safe_load(read_config(DIGITS).path.read_text())
        fewer = write("fewer.yaml", yaml.safe_dump({**whole, "trainer": {"max_epochs": 7}}))
        assert resolved(capsys, "fit", *configs(DIGITS, ZNORM, fewer))["trainer"]["max_epochs"] == 7
        assert moves(capsys, DIGITS, ZNORM, fewer) == f"{ZNORM} is applied after {fewer}, because methods go last.\n"
        config = resolved(capsys, "fit", *configs(fewer, ZNORM, DIGITS))
        assert config["trainer"]["max_epochs"] == whole["trainer"]["max_epochs"]

    def test_an_override_is_refused_in_any_order(self):
        """A method that is moved goes behind the experiment, and a file behind that may override it."""
        mine = write("mine.yaml", "trainer: {callbacks: [LearningRateMonitor]}")
        for order in (ZNORM, DIGITS, mine), (DIGITS, ZNORM, mine):
            assert f"so undoes {ZNORM}" in refusal("fit", *configs(*order))

    @pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
    def test_one_process_of_many_speaks(self, variable, capsys, monkeypatch):
        monkeypatch.setenv(variable, "1")
        assert moves(capsys, ZNORM, DIGITS) == ""

    @pytest.mark.parametrize(
        "text", ["data: OwnData", "data: {class_path: OwnData}", "model: OwnModule", "model.class_path: OwnModule"]
    )
    def test_what_an_experiment_is(self, text):
        files = [read_config(name) for name in (ZNORM, write("mine.yaml", text))]
        assert [file.name for file in in_order(files)] == ["mine.yaml", ZNORM]

    @pytest.mark.parametrize(
        "text", ["data: {init_args: {batch_size: 8}}", "model: {init_args: {optimizer: {init_args: {lr: 0.1}}}}"]
    )
    def test_what_no_experiment_is(self, text, capsys):
        mine = write("mine.yaml", text)
        assert resolved(capsys, "fit", *configs(DIGITS, WEIGHT_DECAY, mine)) == resolved(
            capsys, "fit", *configs(DIGITS, mine, WEIGHT_DECAY)
        )

    @pytest.mark.parametrize(
        ("method", "text", "key"),
        [
            (ZNORM, "trainer: {callbacks: [LearningRateMonitor]}", "trainer.callbacks"),
            (ZNORM, "trainer: {callbacks: {class_path: LearningRateMonitor}}", "trainer.callbacks"),
            (ZNORM, "trainer.callbacks: [LearningRateMonitor]", "trainer.callbacks"),
            (CLIP, "trainer: {gradient_clip_val: 1}", "trainer.gradient_clip_val"),
            (WEIGHT_DECAY, "model: {init_args: {optimizer: Adam}}", "model.init_args.optimizer"),
            (
                WEIGHT_DECAY,
                "model: {init_args: {optimizer: {class_path: Adam}}}",
                "model.init_args.optimizer.class_path",
            ),
        ],
    )
    def test_file_that_undoes_a_method(self, method, text, key):
        message = refusal("fit", *configs(DIGITS, method, write("mine.yaml", text)))
        assert f"mine.yaml sets {key} and so undoes {method}" in message
        assert ("`callbacks+:`" if method == ZNORM else f"--{key}") in message

    def test_method_of_ones_own(self):
        method = write("methods/adamw.yaml", "model: {init_args: {optimizer: torch.optim.AdamW}}")
        mine = write("mine.yaml", "model: {init_args: {optimizer: {class_path: Adam}}}")
        assert f"undoes {method}" in refusal("fit", *configs(DIGITS, method, mine))

    def test_file_that_repeats_a_method(self, capsys):
        mine = write("mine.yaml", "trainer: {gradient_clip_val: 0.1}")
        assert resolved(capsys, "fit", *configs(DIGITS, CLIP, mine)) == resolved(capsys, "fit", *configs(DIGITS, CLIP))

    def test_experiment_in_two_files(self, capsys):
        whole = yaml.safe_load(read_config(DIGITS).path.read_text())
        data = write("data.yaml", yaml.safe_dump({"data": whole.pop("data")}))
        rest = write("rest.yaml", yaml.safe_dump(whole))
        assert resolved(capsys, "fit", *configs(rest, data, ZNORM)) == resolved(capsys, "fit", *configs(DIGITS, ZNORM))

    def test_optimizer_beside_the_model(self, capsys):
        mine = write("mine.yaml", "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}")
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", *configs(DIGITS, WEIGHT_DECAY, mine), *SHORT])
        assert exit_info.value.code == 2
        assert "optimizer" in capsys.readouterr().err

    def test_methods_that_exclude_each_other(self):
        both = [WEIGHT_DECAY, "configs/methods/wd-1e-4.yaml"]
        for order in (both, both[::-1]):
            assert refusal("fit", *configs(DIGITS, *order)).endswith("name one of the two.")

    def test_methods_that_go_together(self, capsys):
        orders = [resolved(capsys, "fit", *configs(DIGITS, *order)) for order in ((ZNORM, CLIP), (CLIP, ZNORM))]
        assert orders[0] == orders[1]
        assert orders[0]["trainer"]["gradient_clip_val"] == 0.1
        assert callbacks(orders[0])[-1] == "ZNormCallback"

    @pytest.mark.full
    def test_file_that_appends(self, capsys):
        mine = write("mine.yaml", "trainer: {callbacks+: [{class_path: LearningRateMonitor}]}")
        names = callbacks(resolved(capsys, "fit", *configs(DIGITS, ZNORM, mine)))
        assert names == ["ModelCheckpoint", "LastCheckpoint", "RichProgressBar", "ZNormCallback", "LearningRateMonitor"]

    @pytest.mark.parametrize(
        "flag", ["--trainer.callbacks=LearningRateMonitor", "--trainer.callbacks=null", "--trainer.callbacks=[]"]
    )
    def test_flag_that_replaces_callbacks(self, flag):
        message = refusal("fit", *configs(DIGITS, ZNORM), flag)
        assert message.startswith(f"error: ZNormCallback of {ZNORM} is lost")
        assert "--trainer.callbacks+=" in message

    @pytest.mark.parametrize("form", ["{{class_path: {}}}", "[{{class_path: {}}}]", "[{}]", "{}"])
    def test_method_in_a_file_of_any_name(self, form):
        callback = form.format("lightning_znorm.GradientCentralizationCallback")
        mine = write("mine.yaml", f"trainer: {{callbacks: {callback}}}")
        later = write("later.yaml", "trainer: {callbacks: [{class_path: LearningRateMonitor}]}")
        assert "GradientCentralizationCallback of mine.yaml is lost" in refusal("fit", *configs(DIGITS, mine, later))

    def test_flag_that_appends(self, capsys):
        flags = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
        config = resolved(capsys, "fit", *configs(DIGITS, ZNORM), *flags)
        assert callbacks(config)[-2:] == ["ZNormCallback", "EarlyStopping"]
        assert config["trainer"]["callbacks"][-1]["init_args"]["monitor"] == "val/loss"

    def test_twice(self):
        assert "named twice" in refusal("fit", *configs(DIGITS, ZNORM, f"./{ZNORM}"))
        assert "named twice" in refusal("fit", *configs(ZNORM, DIGITS, ZNORM))
        assert "twice among the callbacks" in refusal(
            "fit", *configs(DIGITS, ZNORM), "--trainer.callbacks+=ZNormCallback"
        )

    @pytest.mark.full
    def test_twice_for_different_parameters(self, capsys):
        callback = "{{class_path: ZNormCallback, init_args: {{include: '{}'}}}}"
        both = ", ".join(map(callback.format, ("*conv*", "*fc*")))
        mine = write("mine.yaml", f"trainer: {{callbacks+: [{both}]}}")
        config = resolved(capsys, "fit", *configs(DIGITS, mine), *SHORT)
        assert callbacks(config)[-2:] == ["ZNormCallback", "ZNormCallback"]
        main(["fit", *configs(DIGITS, mine), *SHORT])
        assert "val/accuracy" in capsys.readouterr().out

    def test_flag_overrides_a_method(self, capsys):
        config = resolved(capsys, "fit", *configs(DIGITS, CLIP), "--trainer.gradient_clip_val", "0.5")
        assert config["trainer"]["gradient_clip_val"] == 0.5


class TestRun:
    def test_fit_test_predict(self, capsys):
        main(["fit", *configs(DIGITS, ZNORM), *SHORT, "--trainer.max_epochs", "2"])
        run = Path("logs/digits-resnet20/version_0")
        out = capsys.readouterr().out
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
        accuracies = [float(row[rows[0].index("val/accuracy")] or "nan") for row in rows[1:]]
        accuracies = [accuracy for accuracy in accuracies if accuracy == accuracy]
        assert f"val/accuracy     final {accuracies[-1]:.4f}   best {max(accuracies):.4f}\n" in out
        assert f"best checkpoint  {run}/checkpoints/best.ckpt\n" in out

        checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
        task = ClassificationTask.load_from_checkpoint(run / "checkpoints/best.ckpt")
        assert torch.equal(task.state_dict()["model.fc.weight"], checkpoint["state_dict"]["model.fc.weight"])

        command = re.search("test it with     python -m lightning_znorm (.*)\n", out)
        assert command
        main(shlex.split(command[1]))
        assert "test/accuracy" in capsys.readouterr().out

        main(["predict", *configs(DIGITS, ZNORM), "--ckpt_path", f"{run}/checkpoints/best.ckpt"])
        saved = re.search(r"predictions      shape \(360, 10\), for torch.load: (.*)\n", capsys.readouterr().out)
        assert saved
        predictions = torch.load(saved[1], weights_only=True)
        assert predictions.shape == (360, 10)
        assert torch.allclose(predictions.sum(1), torch.ones(360))

    @pytest.mark.full
    def test_best_of_a_resumed_run(self, capsys):
        """Lightning forgets the best score when the folder changes: the output says since when it is the best."""
        main(["fit", *configs(DIGITS), *SHORT])
        capsys.readouterr()
        main(["fit", *configs(DIGITS), *SHORT, "--ckpt_path", "last", "--trainer.max_epochs", "2"])
        run = "logs/digits-resnet20/version_"
        since = f"(of the epochs after {run}0/checkpoints/last.ckpt)"
        out = capsys.readouterr().out
        assert f"best checkpoint  {run}1/checkpoints/best.ckpt {since}\n" in out
        assert re.search(rf"val/accuracy     final .*   best 0\.\d+ {re.escape(since)}\n", out)

    @pytest.mark.full
    def test_checkpoint_that_no_metric_chose(self, capsys):
        """Lightning calls the last checkpoint its best one."""
        write("mine.yaml", "trainer: {callbacks: []}")
        main(["fit", *configs(DIGITS, "mine.yaml"), *SHORT])
        out = capsys.readouterr().out
        assert re.search(r"last checkpoint  logs/digits-resnet20/version_0/checkpoints/epoch=0-step=\d+.ckpt\n", out)
        assert "best" not in out
        write("mine.yaml", "trainer: {callbacks: [LastCheckpoint]}")
        main(["fit", *configs(DIGITS, "mine.yaml"), *SHORT])
        out = capsys.readouterr().out
        assert "last checkpoint  logs/digits-resnet20/version_1/checkpoints/last.ckpt\n" in out
        assert "--ckpt_path logs/digits-resnet20/version_1/checkpoints/last.ckpt\n" in out

    @pytest.mark.full
    def test_last_checkpoint_of_improving_epochs_alone(self, recwarn):
        message = "writes the last checkpoint only in epochs that are among the best"
        checkpoint = "{class_path: ModelCheckpoint, init_args: {monitor: val/loss, save_last: true}}"
        write("mine.yaml", f"trainer: {{callbacks: [{checkpoint}]}}")
        with pytest.warns(UserWarning, match=message):
            main(["fit", *configs(DIGITS, "mine.yaml"), *SHORT])
        own = "{class_path: LastCheckpoint, init_args: {dirpath: own}}"
        for callbacks in (f"[{checkpoint}, {own}]", f"[{checkpoint[:-2]}, save_top_k: -1}}}}]"):
            write("mine.yaml", f"trainer: {{callbacks: {callbacks}}}")
            main(["fit", *configs(DIGITS, "mine.yaml"), *SHORT])  # a warning is an error

    @pytest.mark.full
    def test_same_command_again(self):
        command = ["fit", *configs(DIGITS), *SHORT]
        main(command)
        main(command)
        runs = sorted(Path("logs/digits-resnet20").iterdir())
        assert [run.name for run in runs] == ["version_0", "version_1"]
        saved = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
        assert saved[0] == saved[1]
        weights = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in runs]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    @pytest.mark.full
    @pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
    @pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
    def test_same_command_into_the_same_folder(self):
        for epochs in ("1", "2"):
            version = ["--trainer.logger.init_args.version", "mine", "--trainer.max_epochs", epochs]
            main(["fit", *configs(DIGITS), *SHORT, *version])
        saved = yaml.safe_load(Path("logs/digits-resnet20/mine/config.yaml").read_text())
        assert saved["trainer"]["max_epochs"] == 2

    @pytest.mark.full
    def test_loggers_that_keep_the_files_of_all_runs_in_one_folder(self):
        logger = ["--trainer.logger", "own_module.OwnLogger", "--trainer.logger.version"]  # keeps the file's name
        main(["fit", *configs(DIGITS), *SHORT, *logger, "one"])
        main(["fit", *configs(DIGITS), *SHORT, *logger, "two", "--trainer.max_epochs", "2"])
        for version, epochs in (("one", 1), ("two", 2)):
            run = Path("logs/digits-resnet20") / version
            assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == epochs
            assert (run / "checkpoints/best.ckpt").is_file()

    @pytest.mark.full
    def test_saved_config_runs(self):
        main(["fit", *configs(DIGITS, ZNORM), *SHORT])
        saved = "logs/digits-resnet20/version_0/config.yaml"
        main(["fit", *configs(saved)])
        assert Path(saved.replace("_0", "_1")).read_text() == Path(saved).read_text()

    @pytest.mark.full
    @pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
    def test_without_logger(self):
        write("config.yaml", "trainer: {logger: false}")
        for _ in range(2):
            main(["fit", *configs(DIGITS, "config.yaml"), *SHORT])
        assert Path("config.yaml").read_text() == "trainer: {logger: false}"
        assert len(list(Path("checkpoints").glob("best*.ckpt"))) == 2

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning:google")
    def test_tensorboard(self):
        main(["fit", *configs(DIGITS), *SHORT, "--trainer.logger", "TensorBoardLogger"])
        assert list(Path("logs/digits-resnet20/version_0").glob("events.out.tfevents.*"))

    def test_evaluating_what_was_never_trained(self):
        with pytest.warns(UserWarning, match="test without --ckpt_path uses the weights that the model starts with"):
            main(["test", *configs(DIGITS), "--trainer.limit_test_batches", "1"])

    def test_validate(self, capsys):
        main(["fit", *configs(DIGITS), *SHORT])
        checkpoint = "logs/digits-resnet20/version_0/checkpoints/last.ckpt"
        main(["validate", *configs(DIGITS), "--ckpt_path", checkpoint])
        assert "val/accuracy" in capsys.readouterr().out

    @pytest.mark.full
    def test_resuming(self, capsys):
        main(["fit", *configs(DIGITS, ZNORM), *SHORT])
        checkpoint = "logs/digits-resnet20/version_0/checkpoints/last.ckpt"
        resume = [f"--ckpt_path={checkpoint}", "--trainer.max_epochs", "2"]
        capsys.readouterr()
        main(["fit", *configs(DIGITS, ZNORM), *SHORT, *resume])
        resumed = torch.load(checkpoint.replace("_0", "_1"), weights_only=True)
        assert (resumed["epoch"], resumed["global_step"]) == (1, 4)
        ending = "--trainer.max_epochs 2 --ckpt_path logs/digits-resnet20/version_1/checkpoints/best.ckpt\n"
        out = capsys.readouterr().out
        assert out.endswith(ending)
        assert out.count("--ckpt_path") == 1

        message = refusal("fit", *configs(DIGITS, WEIGHT_DECAY), *SHORT, *resume)
        assert "optimizer.class_path torch.optim.Adam, " in message
        assert "torch.optim.AdamW would be lost" in message
        flags = ["--model.init_args.optimizer.init_args.lr", "0.5"]
        assert "optimizer.init_args.lr 0.001" in refusal("fit", *configs(DIGITS, ZNORM), *SHORT, *resume, *flags)

    def test_resuming_from_the_last(self, capsys):
        command = ["fit", *configs(DIGITS, ZNORM), *SHORT, "--ckpt_path", "last"]
        with pytest.warns(UserWarning, match="there is no last checkpoint available"):
            main(command)  # the first run of a job that restarts after every stop
        assert capsys.readouterr().out.count("--ckpt_path") == 1  # only in the command that tests the best checkpoint
        for run in (1, 2):
            main([*command, "--trainer.max_epochs", str(run + 1)])
            resumed = torch.load(f"logs/digits-resnet20/version_{run}/checkpoints/last.ckpt", weights_only=True)
            assert (resumed["epoch"], resumed["global_step"]) == (run, 2 * run + 2)
        main([*command[:-2], "--trainer.max_epochs", "3"])
        whole = torch.load("logs/digits-resnet20/version_3/checkpoints/last.ckpt", weights_only=True)
        assert all(torch.equal(tensor, whole["state_dict"][name]) for name, tensor in resumed["state_dict"].items())

        flags = ["--model.init_args.optimizer.init_args.lr", "0.5"]
        message = refusal(*command, *flags, "--trainer.max_epochs", "4")
        assert (
            "version_3/checkpoints/last.ckpt was trained with model.init_args.optimizer.init_args.lr 0.001" in message
        )

    @pytest.mark.full
    def test_resuming_with_other_data(self):
        main(["fit", *configs(DIGITS), *SHORT])
        flags = ["--ckpt_path", "last", "--trainer.max_epochs", "2", "--data.init_args.seed", "1"]
        with pytest.warns(UserWarning, match=r"data.init_args.seed was 0 when .*last.ckpt was trained, and is 1 from"):
            main(["fit", *configs(DIGITS), *SHORT, *flags])

    @pytest.mark.full
    @pytest.mark.filterwarnings("ignore:.* is NaN. all")
    def test_evaluating_with_other_settings(self):
        experiment = configs("lgg.yaml")
        write(
            "lgg.yaml",
            """
            model:
              class_path: SegmentationTask
              init_args:
                model: {class_path: torch.nn.Conv2d, init_args: {in_channels: 3, out_channels: 1, kernel_size: 1}}
            data: {class_path: LGGDataModule, init_args: {root: data, batch_size: 4}}
            trainer: {accelerator: cpu, max_epochs: 1, log_every_n_steps: 1, logger: false}
            """,
        )
        write_lgg(Path("data"), patients=4)
        main(["fit", *experiment])
        checkpoint = next(Path("checkpoints").iterdir())
        flags = ["--ckpt_path", str(checkpoint), "--model.init_args.ignore_index", "7"]
        with pytest.warns(UserWarning, match=r"model.init_args.ignore_index is None, as .* was trained, and not 7"):
            main(["test", *experiment, *flags])


def wandb(**init_args: str) -> dict[str, Any]:
    defaults = {"name": None, "save_dir": ".", "version": None, "id": None, "project": None}
    class_path = "lightning.pytorch.loggers.WandbLogger"
    return {"logger": {"class_path": class_path, "init_args": {**defaults, **init_args}}}


class TestLastCheckpoint:
    """The folders in which `--ckpt_path last` searches."""

    @pytest.mark.parametrize(
        ("trainer", "where"),
        [
            ({}, "lightning_logs/version_3/checkpoints"),
            ({"logger": True, "default_root_dir": "mine"}, "mine/lightning_logs/version_0/checkpoints"),
            ({"logger": False}, "checkpoints"),
            ({"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "a", "name": "b"}}}, "a/b/x/checkpoints"),
            ({"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "a", "name": ""}}}, "a/x/checkpoints"),
            ({"logger": {"class_path": "CSVLogger", "init_args": {"version": "x"}}}, "lightning_logs/x/checkpoints"),
            ({"logger": [{"init_args": {"version": 7}}, {}]}, "lightning_logs/version_7/checkpoints"),
            ({"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "here"}}]}, "here"),
            (wandb(), "lightning_logs/x5i32th9/checkpoints"),
            (wandb(name="a title", project="mine", save_dir="a"), "a/mine/x5i32th9/checkpoints"),
            (wandb(id="version_7"), "lightning_logs/version_7/checkpoints"),
        ],
    )
    def test_folders(self, trainer, where):
        write(f"{where}/last.ckpt", "")
        write("elsewhere/version_0/checkpoints/last.ckpt", "")
        if where in ("lightning_logs/x/checkpoints", "lightning_logs/version_7/checkpoints"):  # a named run
            write("lightning_logs/version_9/checkpoints/last.ckpt", "")
        assert last_checkpoint(trainer) == Path(where, "last.ckpt")

    def test_project_of_the_environment(self, monkeypatch):
        monkeypatch.setenv("WANDB_PROJECT", "theirs")
        path = write("theirs/x5i32th9/checkpoints/last.ckpt", "")
        assert last_checkpoint(wandb()) == Path(path)

    def test_none(self):
        assert last_checkpoint({}) is None

    @pytest.mark.parametrize("where", ["here", "lightning_logs/version_0/checkpoints"])
    def test_of_two_callbacks_one_names_a_folder(self, where):
        named = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "here"}}
        write(f"{where}/last.ckpt", "")
        assert last_checkpoint({"callbacks": [{"class_path": "ModelCheckpoint"}, named]}) == Path(where, "last.ckpt")

    def test_the_newest(self):
        for age, run in enumerate((2, 10, 1)):
            path = write(f"lightning_logs/version_{run}/checkpoints/last.ckpt", "")
            os.utime(path, (age, age))
        assert last_checkpoint({}) == Path("lightning_logs/version_1/checkpoints/last.ckpt")


class TestOwnModule:
    def test_with_znorm(self, monkeypatch):
        seen = []
        step = torch.optim.SGD.step
        monkeypatch.setattr(
            torch.optim.SGD,
            "step",
            lambda self, closure=None: (
                step(self, closure),
                seen.append(self.param_groups[0]["params"][0].grad.clone()),
            ),
        )
        main(["fit", *configs(ZNORM), *OWN, *SHORT, "--trainer.logger", "false"])
        assert len(seen) == 2
        for gradient in seen:
            assert gradient.mean().item() == pytest.approx(0, abs=1e-6)
            assert gradient.std(correction=0).item() == pytest.approx(1, abs=1e-5)

    def test_a_try_names_no_checkpoint(self, capsys):
        main(["fit", *OWN, "--trainer.callbacks+", "LastCheckpoint", "--trainer.fast_dev_run", "true"])
        assert "checkpoint  " not in capsys.readouterr().out

    def test_nothing_trained(self):
        with pytest.warns(UserWarning, match="^fit ended without a step of the optimizer: nothing was trained"):
            main(["fit", *OWN, *SHORT, "--trainer.limit_train_batches", "0", "--trainer.logger", "false"])

    def test_steps_past_lightning_are_not_taken_for_nothing(self, monkeypatch, recwarn):
        def training_step(self, batch):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.layer(batch[0]).mean().backward()
            optimizer.step()

        monkeypatch.setattr(own_module.OwnModule, "automatic_optimization", False)
        monkeypatch.setattr(own_module.OwnModule, "training_step", training_step)
        main(["fit", *OWN, *SHORT, "--trainer.logger", "false"])
        assert not [warning for warning in recwarn if "without a step" in str(warning.message)]

    def test_hyperparameters_that_no_command_loads(self, monkeypatch):
        made = own_module.OwnModule.__init__

        def init(self, *args, **kwargs):
            made(self, *args, **kwargs)
            self.save_hyperparameters({"width": np.int64(3), "lr": 0.1, "shape": np.zeros(2)})

        monkeypatch.setattr(own_module.OwnModule, "__init__", init)
        with pytest.warns(UserWarning, match=r"^OwnModule saves hyperparameters that .* \(width, shape\)\. `test`"):
            main(["fit", *OWN, *SHORT, "--trainer.logger", "false"])

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda saved: saved["state_dict"].update({"layer.weight": torch.zeros(2, 3)}),
                "does not fit the model: size mismatch for layer.weight: copying a param with shape",
            ),
            (
                lambda saved: saved["state_dict"].clear(),
                'does not fit the model: Missing key(s) in state_dict: "layer.weight", "layer.bias".',
            ),
            (
                lambda saved: saved["optimizer_states"][0]["param_groups"].append({"params": []}),
                "does not fit the optimizer: loaded state dict has a different number of parameter groups.",
            ),
            (
                lambda saved: saved.pop("optimizer_states"),
                "holds only the model, without the state of the training: fit cannot go on from it.",
            ),
            (
                lambda saved: saved.pop("lr_schedulers"),
                "holds only the model, without the state of the training: fit cannot go on from it.",
            ),
        ],
    )
    def test_checkpoint_that_does_not_fit(self, change, said):
        main(["fit", *OWN, *SHORT, "--trainer.callbacks+", "LastCheckpoint", "--trainer.logger", "false"])
        Path("checkpoints").rename("begun")
        saved = torch.load("begun/last.ckpt")
        change(saved)
        torch.save(saved, "changed.ckpt")
        longer = ["--trainer.max_epochs", "2", "--ckpt_path", "changed.ckpt"]
        message = refusal("fit", *OWN, *SHORT, *longer, "--trainer.logger", "false")
        assert message.startswith(f"error: changed.ckpt {said}")

    @pytest.mark.parametrize("resumes", [False, True])
    def test_weights_that_the_user_s_own_code_loads_are_no_matter_of_the_checkpoint(self, monkeypatch, resumes):
        main(["fit", *OWN, *SHORT, "--trainer.callbacks+", "LastCheckpoint", "--trainer.logger", "false"])
        Path("checkpoints").rename("begun")
        args = ["--ckpt_path", "begun/last.ckpt", "--trainer.max_epochs", "2"] if resumes else []
        monkeypatch.setattr(own_module.OwnModule, "setup", own_module.load_weights_of_another)
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for Linear"):
            main(["fit", *OWN, *SHORT, *args, "--trainer.logger", "false"])

    def test_predictions_that_are_no_tensors(self, capsys):
        with pytest.warns(UserWarning, match="without --ckpt_path"):
            main(["predict", *OWN, "--trainer.logger", "false"])
        assert "predictions      2 batches, for torch.load: predictions.pt\n" in capsys.readouterr().out
        saved = torch.load("predictions.pt", weights_only=True)
        assert [batch["y"].shape for batch in saved] == [(8, 1), (8, 1)]

    def test_predictions_of_one_number_a_batch(self, capsys, monkeypatch):
        monkeypatch.setattr(own_module.OwnModule, "predict_step", lambda self, batch: self.layer(batch[0]).mean())
        with pytest.warns(UserWarning, match="without --ckpt_path"):
            main(["predict", *OWN, "--trainer.logger", "false"])
        assert "predictions      2 batches, for" in capsys.readouterr().out
        assert [batch.shape for batch in torch.load("predictions.pt")] == [(), ()]

    def test_predictions_of_several_loaders(self, capsys, monkeypatch):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return self.layer(batch[0]) if dataloader_idx == 0 else {"y": self.layer(batch[0])}

        loader = own_module.OwnData.predict_dataloader
        monkeypatch.setattr(own_module.OwnData, "predict_dataloader", lambda self: [loader(self), loader(self)])
        monkeypatch.setattr(own_module.OwnModule, "predict_step", predict_step)
        with pytest.warns(UserWarning, match="without --ckpt_path"):
            main(["predict", *OWN, "--trainer.logger", "false"])
        assert "predictions      2 loaders: shape (16, 1), 2 batches, for" in capsys.readouterr().out
        first, second = torch.load("predictions.pt")
        assert first.shape == (16, 1)
        assert [batch["y"].shape for batch in second] == [(8, 1), (8, 1)]

    def test_predictions_that_cannot_be_saved(self, monkeypatch):
        monkeypatch.setattr(own_module.OwnModule, "predict_step", lambda self, batch: lambda: 1)
        with pytest.warns(UserWarning, match="without --ckpt_path"):
            said = refusal("predict", *OWN, "--trainer.logger", "false")
        assert said.startswith("error: the predictions cannot be saved: ")
        assert said.endswith(" Let predict_step return tensors, numbers, texts, or lists and dicts of these.")
        assert not Path("predictions.pt").exists()

    def test_predictions_overwrite_nothing(self):
        write("predictions.pt", "a letter")
        with pytest.warns(UserWarning, match="without --ckpt_path"):
            assert "predictions.pt is there already" in refusal("predict", *OWN, "--trainer.logger", "false")
        assert Path("predictions.pt").read_text() == "a letter"

    def test_predictions_overwrite_nothing_in_a_named_run(self):
        path = write("logs/lightning_logs/mine/predictions.pt", "a letter")
        logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
        with pytest.warns(UserWarning, match="without --ckpt_path"):
            message = refusal("predict", *OWN, *logger, "--trainer.logger.version", "mine")
        assert f"{path} is there already" in message
        assert Path(path).read_text() == "a letter"

    def test_no_predictions_kept(self, capsys):
        with pytest.warns(UserWarning, match="without --ckpt_path"):
            main(["predict", *OWN, "--trainer.logger", "false", "--return_predictions", "false"])
        assert "predictions" not in capsys.readouterr().out
        assert not Path("predictions.pt").exists()


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([*configs(DIGITS), "--model.init_args.model", "resnet2000"], "No network is called 'resnet2000'"),
            (configs("configs/cifar10/resnet56.yaml"), "No CIFAR-10 at "),
            ([*configs(DIGITS), "--model.init_args.num_classes", "11"], "DigitsDataModule has 10 classes"),
            ([*configs(DIGITS), "--data.init_args.val_fraction", "3"], "val_fraction"),
            ([*configs(DIGITS), "--ckpt_path", "none.ckpt"], "Checkpoint file not found: none.ckpt"),
            ([*configs(DIGITS), "--trainer.strategy", "none"], "You selected an invalid strategy name"),
        ],
    )
    def test_one_sentence(self, args, message):
        assert refusal("fit", *args).startswith(f"error: {message}")

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            (
                {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
                r"torchrun has started 2 processes \(WORLD_SIZE\), but the Trainer works with 1, so that each would "
                r"train by itself .*--trainer\.num_nodes 2 --trainer\.devices 1,",
            ),
            ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, r"--trainer\.num_nodes 2 --trainer\.devices 8,"),
            (
                {"SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS_PER_NODE": "2"},
                r"srun has started 6 processes \(SLURM_STEP_NUM_TASKS\).*--trainer\.num_nodes 3 --trainer\.devices 2,",
            ),
        ],
    )
    @pytest.mark.parametrize("command", ["fit", "test"])
    def test_processes_that_would_be_on_their_own(self, command, environment, message, monkeypatch, folder):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert re.search(message, refusal(command, *configs(DIGITS, ZNORM), *SHORT))
        assert not list(folder.iterdir())

    @pytest.mark.parametrize(
        "environment",
        [
            {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            # A batch script without srun, such as an evaluation, sees how many tasks the job could start.
            {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
            | {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
        ],
        ids=["torchrun", "SLURM"],
    )
    def test_process_that_is_alone(self, environment, monkeypatch):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        main(["fit", *configs(DIGITS, ZNORM), *SHORT])

    def test_status_and_output(self, tmp_path):
        assert run_forked(["fit", *configs("configs/cifar10/resnet56.yaml")], tmp_path / "log") == 1
        said = (tmp_path / "log").read_text()
        assert said.splitlines()[-1].startswith("error: No CIFAR-10 at ")
        assert "Traceback" not in said

    def test_after_a_test_with_a_pretended_gpu(self, tmp_path):
        """Tests run commands in forks of their process, in which autograd does not work after that."""
        arguments = ["fit", *configs(DIGITS, ZNORM), "--trainer.fast_dev_run", "1"]
        program = f"""
from pathlib import Path
from tests.processes import run_forked, start_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    pass
start_autograd()
print("ended with", run_forked({arguments!r}, Path("log")))
"""
        process = run_python("-W", "ignore", "-c", program, timeout=120, cwd=tmp_path)
        assert "ended with 0" in process.stdout, process.stdout
        assert "val/accuracy" in (tmp_path / "log").read_text()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_before_a_test_with_a_pretended_gpu(self):
        with FakeTensorMode():
            pass
        start_autograd()  # again: it has been called for all tests
        assert autograd_works_in_copies()

    @pytest.mark.full
    def test_status_and_stderr(self):
        finished = run_python("-m", "lightning_znorm", "fit", *configs("configs/cifar10/resnet56.yaml"), timeout=120)
        assert finished.returncode == 1
        assert finished.stdout.splitlines()[-1].startswith("error: No CIFAR-10 at ")
        assert "Traceback" not in finished.stdout

    def test_unknown_setting(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", *configs(DIGITS), "--trainer.maxepochs", "2"])
        assert exit_info.value.code == 2
        err = capsys.readouterr().err
        assert "unrecognized arguments: --trainer.maxepochs" in err
        assert len(err.splitlines()) < 5

    @pytest.mark.parametrize("fault", ["raises", "misuses Lightning"])
    def test_bugs_of_the_user_keep_their_traceback(self, fault):
        with pytest.raises(ValueError, match="a mistake of the user's own") as error:
            main(["fit", *OWN, *SHORT, "--model.fault", fault, "--trainer.logger", "false"])
        assert Path(own_module.__file__) in [step.path for step in error.traceback]

    def test_own_raise_statements_only(self):
        def caught(function, *args):
            try:
                function(*args)
            except Exception as error:
                error.__traceback__ = error.__traceback__.tb_next  # as if raised in main, without this function
                return error

        missing = caught(read_config, "none.yaml")
        assert sentence(missing) == str(missing)
        assert sentence(caught(dotted, None)) is None  # AttributeError: a bug, if it came up


def test_monitor_on_the_command_line(folder):
    main(["fit", *configs(DIGITS, ZNORM), *SHORT, "--trainer.callbacks+", "GradientMonitor"])
    (logs,) = folder.glob("logs/*/version_0")
    assert "grad/sigma_over_running_median" in (logs / "metrics.csv").read_text().splitlines()[0]
    assert len(list((logs / "gradients").glob("*.png"))) == 4
