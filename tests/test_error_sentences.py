"""A mistake in the settings or in a user's own class ends in one line with the true reason."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  # otherwise it would log to the stderr of a test, which is closed later
import pytest
import yaml

from lightning_znorm.cli import main
from lightning_znorm.cli.config_files import read_config
from lightning_znorm.cli.jsonargparse_messages import read_fault
from lightning_znorm.cli.parse_errors import explained

DIGITS = Path(__file__).parents[1] / "configs/digits/resnet20.yaml"
OPTIMIZER, SCHEDULER, CALLBACKS = "model/init_args/optimizer", "model/init_args/lr_scheduler", "trainer/callbacks+"
OWN = {"model": {"class_path": "faulty.Net"}, "data": {"class_path": "faulty.Data"}}
FORM = "the name of a class is expected, such as my_module.MyClass."
LINES = "and `key: value` lines are expected there."

MODULES = {
    "no_syntax": """
        from lightning.pytorch import LightningModule

        class Net(LightningModule):
            def __init__(self)
                super().__init__()
        """,
    "needs_another": """
        import a_package_that_is_not_installed
        """,
    "inner": """
        from torch.nn import Lineaer
        """,
    "outer": """
        import inner
        """,
    "raises": """
        raise RuntimeError("no licence here")
        """,
    "faulty": """
        import torch
        from lightning.pytorch import Callback, LightningDataModule, LightningModule
        from torch import nn

        def build(fault):
            if fault == "value":
                raise ValueError("width must be even")
            if fault == "key":
                return {}["nothing"]
            if fault == "torch":
                return nn.Linear("a", 3)
            if fault == "attribute":
                return nn.Linear(3, 3).wieght
            if fault == "recursion":
                return build(fault)
            if fault == "caused":
                try:
                    return {}["nothing"]
                except KeyError as error:
                    raise ValueError("width is missing") from error
            return nn.Linear(3, 1)

        class Net(LightningModule):
            def __init__(self, width: int = 3, fault: str = "") -> None:
                super().__init__()
                self.layer = build(fault)

        class Needs(LightningModule):
            def __init__(self, depth: int) -> None:
                super().__init__()

        class Data(LightningDataModule):
            def __init__(self, size: int = 2) -> None:
                super().__init__()

        class Stop(Callback):
            def __init__(self, every: int = 1) -> None:
                if every < 1:
                    raise ValueError("every must be positive")

        class Plain:
            pass

        class LightningModuleOfAnother:
            pass

        LightningModuleOfAnother.__name__ = "LightningModule"

        class Other(LightningModuleOfAnother):
            pass

        class Network(nn.Module):
            def __init__(self, fault: str) -> None:
                super().__init__()
                build(fault)

        def function() -> int:
            return 1

        an_object = 3.5
        """,
}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Modules of a user, with the mistakes that users make."""
    folder = tmp_path_factory.mktemp("modules")
    for name, text in MODULES.items():
        lines = text.strip("\n").splitlines()
        (folder / f"{name}.py").write_text("\n".join(line[8:] for line in lines) + "\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line_of(text: str, module: str = "faulty") -> int:
    """Return the number of the line of a module that holds a text."""
    (number,) = [i for i, line in enumerate(MODULES[module].strip("\n").splitlines(), 1) if text in line]
    return number


def digits(path: str, value: Any) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(DIGITS.read_text(encoding="utf-8"))
    return changed(content, path, value)


def own(path: str, value: Any) -> dict[str, Any]:
    return changed({key: dict(value) for key, value in OWN.items()}, path, value)


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split("/")
    node = content
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return content


def refused(capsys: pytest.CaptureFixture[str], content: dict[str, Any], *args: str) -> tuple[str, str]:
    """Return the sentence, and all output before it."""
    Path("mistaken.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return ended(capsys, "fit", "--config", "mistaken.yaml", *args)


def ended(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    code = exit_info.value.code
    out, err = capsys.readouterr()
    if isinstance(code, str):  # Python prints it, and exits with 1
        err += f"{code}\n"
    else:
        assert code == 2
    *before, said = err.splitlines()
    assert out == ""
    assert said.startswith("error: ")
    assert not any("error: " in line for line in before)
    assert "Traceback" not in said
    return said.removeprefix("error: "), "\n".join(before)


# The content of the file, and the sentence; `@` stands for the file.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    # Modules that cannot be imported.
    "syntax error": (
        own("model/class_path", "no_syntax.Net"),
        "model @ is no_syntax.Net, and no_syntax cannot be imported: SyntaxError: ... (no_syntax.py, line 4).",
    ),
    "syntax error in a callback": (
        digits(CALLBACKS, [{"class_path": "faulty.Stop"}, {"class_path": "no_syntax.Net"}]),
        "trainer.callbacks @ is no_syntax.Net, and no_syntax cannot be imported: SyntaxError: ...",
    ),
    "syntax error in a callback by name": (
        digits(CALLBACKS, "no_syntax.Net"),
        "trainer.callbacks @ is no_syntax.Net, and no_syntax cannot be imported: SyntaxError: ...",
    ),
    "syntax error in an optimizer": (
        digits(OPTIMIZER, {"class_path": "no_syntax.Net"}),
        "model.optimizer @ is no_syntax.Net, and no_syntax cannot be imported: SyntaxError: ...",
    ),
    "syntax error in a network": (
        digits("model/init_args/model", {"class_path": "no_syntax.Net"}),
        "model.model @ is no_syntax.Net, and no_syntax cannot be imported: SyntaxError: ...",
    ),
    "package that is missing": (
        own("model/class_path", "needs_another.Net"),
        "model @ is needs_another.Net, and needs_another cannot be imported: ModuleNotFoundError: No module named "
        "'a_package_that_is_not_installed' (...needs_another.py, line 1).",
    ),
    "import that fails further in": (
        own("model/class_path", "outer.Net"),
        "model @ is outer.Net, and outer cannot be imported: ImportError: cannot import name 'Lineaer' from 'torch.nn' "
        "... (...inner.py, line 1).",
    ),
    "module that raises": (
        own("data/class_path", "raises.Data"),
        "data @ is raises.Data, and raises cannot be imported: RuntimeError: no licence here (...raises.py, line 1).",
    ),
    "module that does not exist": (
        own("model/class_path", "faulti.Net"),
        "model @ cannot be made: No module named 'faulti': did you mean faulty?",
    ),
    "module in a package that does not exist": (
        own("model/class_path", "lightning_znorm.taks.ClassificationTask"),
        "model @ cannot be made: module 'lightning_znorm' has no attribute 'taks': did you mean tasks?",
    ),
    # Names that do not exist.
    "class that does not exist": (
        own("model/class_path", "faulty.Nett"),
        "model @ cannot be made: module 'faulty' has no attribute 'Nett': did you mean Net?",
    ),
    "module that is none": (
        own("model/class_path", "faulty.sub.Net"),
        "model @ cannot be made: module 'faulty' has no attribute 'sub'.",
    ),
    "misspelt callback": (
        digits(CALLBACKS, [{"class_path": "ZNormCalback"}]),
        "trainer.callbacks @ cannot be made: there is no class ZNormCalback here: did you mean ZNormCallback?",
    ),
    "misspelt callback by name": (
        digits(CALLBACKS, ["ZNormCalback"]),
        "trainer.callbacks @ cannot be made: there is no class ZNormCalback here: did you mean ZNormCallback?",
    ),
    "misspelt callback in a package": (
        digits(CALLBACKS, [{"class_path": "lightning.pytorch.callbacks.EarlyStoping"}]),
        "trainer.callbacks @ cannot be made: module 'lightning.pytorch.callbacks' has no attribute 'EarlyStoping': did "
        "you mean EarlyStopping?",
    ),
    "misspelt optimizer": (
        digits(OPTIMIZER, {"class_path": "Adamm"}),
        "model.optimizer @ cannot be made: there is no class Adamm here: did you mean Adam?",
    ),
    "misspelt optimizer in a package": (
        digits(OPTIMIZER, "torch.optim.Adamm"),
        "model.optimizer @ cannot be made: module 'torch.optim' has no attribute 'Adamm': did you mean Adam?",
    ),
    "misspelt scheduler": (
        digits(SCHEDULER, {"class_path": "torch.optim.lr_scheduler.StepLRR", "init_args": {"step_size": 1}}),
        "model.lr_scheduler @ cannot be made: module 'torch.optim.lr_scheduler' has no attribute 'StepLRR': did you "
        "mean StepLR?",
    ),
    "misspelt network": (
        digits("model/init_args/model", {"class_path": "torch.nn.Linearr"}),
        "model.model @ cannot be made: module 'torch.nn' has no attribute 'Linearr': did you mean Linear?",
    ),
    "misspelt logger": (
        digits("trainer/logger", {"class_path": "CSVLoger"}),
        "trainer.logger @ cannot be made: there is no class CSVLoger here: did you mean CSVLogger?",
    ),
    "beginning of a logger": (
        digits("trainer/logger", "csv"),
        "trainer.logger @ cannot be made: there is no class csv here: did you mean CSVLogger?",
    ),
    "misspelt strategy": (
        digits("trainer/strategy", {"class_path": "DDPStrategyy"}),
        "trainer.strategy @ cannot be made: there is no class DDPStrategyy here: did you mean DDPStrategy?",
    ),
    "misspelt plugin": (
        digits("trainer/plugins", [{"class_path": "lightning.pytorch.plugins.MixedPrecisionn"}]),
        "trainer.plugins @ cannot be made: module 'lightning.pytorch.plugins' has no attribute 'MixedPrecisionn': did "
        "you mean MixedPrecision?",
    ),
    "misspelt profiler": (
        digits("trainer/profiler", {"class_path": "SimpleProfilerr"}),
        "trainer.profiler @ cannot be made: there is no class SimpleProfilerr here: did you mean SimpleProfiler?",
    ),
    "name like no other": (
        digits("trainer/plugins", "xyzzy"),
        "trainer.plugins @ cannot be made: there is no class xyzzy here, and others are named with their module, as in "
        "torch.optim.Adam.",
    ),
    # Names of a wrong kind of object.
    "class of no base": (
        own("model/class_path", "faulty.Plain"),
        "model @ is faulty.Plain, a class that is no LightningModule.",
    ),
    "data as a model": (
        own("model/class_path", "faulty.Data"),
        "model @ is faulty.Data, a class that is no LightningModule.",
    ),
    "network as a model": (own("model", "torch.nn.Linear"), "model @ is torch.nn.Linear, a class that is no Lightn"),
    "model as data": (
        own("data/class_path", "faulty.Net"),
        "data @ is faulty.Net, a class that is no LightningDataModule.",
    ),
    "model as a callback": (
        digits(CALLBACKS, [{"class_path": "faulty.Net"}]),
        "trainer.callbacks @ is faulty.Net, a class that is no Callback.",
    ),
    "callback as a logger": (
        digits("trainer/logger", "faulty.Stop"),
        "trainer.logger @ is faulty.Stop, a class that is no Logger.",
    ),
    "scheduler as an optimizer": (
        digits(OPTIMIZER, {"class_path": "torch.optim.lr_scheduler.ConstantLR"}),
        "model.optimizer @ is torch.optim.lr_scheduler.ConstantLR, a class that is no Optimizer.",
    ),
    "optimizer as a scheduler": (
        digits(SCHEDULER, {"class_path": "torch.optim.Adam"}),
        "model.lr_scheduler @ is torch.optim.Adam, a class that is no LRScheduler or ReduceLROnPlateau.",
    ),
    "class as a network": (
        digits("model/init_args/model", {"class_path": "faulty.Plain"}),
        "model.model @ is faulty.Plain, a class that is no Module.",
    ),
    "namesake of the base": (
        own("model/class_path", "faulty.Other"),
        "model @ is faulty.Other, which derives from faulty.LightningModule, not from the LightningModule that is exp",
    ),
    "function": (
        own("model/class_path", "faulty.function"),
        "model @ is faulty.function, a function that is not annotated to return a LightningModule.",
    ),
    "module": (own("model/class_path", "os.path"), "model @ is os.path, a module, and no LightningModule."),
    "object": (
        own("model/class_path", "faulty.an_object"),
        "model @ is faulty.an_object, of type float, and no LightningModule.",
    ),
    # Arguments of classes.
    "argument that there is none of": (
        own("model/init_args", {"widht": 3}),
        "there is no setting model.widht, of faulty.Net @: did you mean width?",
    ),
    "argument of another type": (
        own("model/init_args", {"width": "wide"}),
        "model.width @ is wide, and int is expected.",
    ),
    "argument that is missing": (
        own("model", {"class_path": "faulty.Needs"}),
        "model @ lacks depth, which faulty.Needs requires.",
    ),
    "argument of a callback": (
        digits(CALLBACKS, [{"class_path": "faulty.Stop", "init_args": {"evry": 1}}]),
        "there is no setting trainer.callbacks.evry, of faulty.Stop @: did you mean every?",
    ),
    "argument of a callback of another type": (
        digits(CALLBACKS, [{"class_path": "faulty.Stop", "init_args": {"every": "x"}}]),
        "trainer.callbacks.every @ is x, and int is expected.",
    ),
    "argument of an optimizer": (
        digits(OPTIMIZER, {"class_path": "torch.optim.SGD", "init_args": {"momentun": 1}}),
        "there is no setting model.optimizer.momentun, of torch.optim.SGD @: did you mean momentum?",
    ),
    "argument of an optimizer of another type": (
        digits(OPTIMIZER, {"class_path": "torch.optim.Adam", "init_args": {"lr": "fast"}}),
        "model.optimizer.lr @ is fast, and float is expected.",
    ),
    "argument of a scheduler": (
        digits(SCHEDULER, {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"stepsize": 1}}),
        "there is no setting model.lr_scheduler.stepsize, of torch.optim.lr_scheduler.StepLR @: did you mean st",
    ),
    "argument of a scheduler of another type": (
        digits(SCHEDULER, {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": "x"}}),
        "model.lr_scheduler.step_size @ is x, and int is expected.",
    ),
    "argument of a scheduler that is missing": (
        digits(SCHEDULER, {"class_path": "torch.optim.lr_scheduler.StepLR"}),
        "model.lr_scheduler @ lacks step_size, which torch.optim.lr_scheduler.StepLR requires.",
    ),
    "argument of a logger": (
        digits("trainer/logger", {"class_path": "CSVLogger", "init_args": {"savedir": "x"}}),
        "there is no setting trainer.logger.savedir, of lightning.pytorch.loggers.CSVLogger @: did you mean save_dir?",
    ),
    "argument of a logger that is missing": (
        digits("trainer/logger", {"class_path": "CSVLogger"}),
        "trainer.logger @ lacks save_dir, which lightning.pytorch.loggers.CSVLogger requires.",
    ),
    "argument of a strategy": (
        digits("trainer/strategy", {"class_path": "DDPStrategy", "init_args": {"acelerator": "cpu"}}),
        "there is no setting trainer.strategy.acelerator, of lightning.pytorch.strategies.DDPStrategy @: did you mean ",
    ),
    "argument of a plugin": (
        digits(
            "trainer/plugins",
            [{"class_path": "lightning.pytorch.plugins.MixedPrecision", "init_args": {"precison": 3}}],
        ),
        "there is no setting trainer.plugins.precison, of lightning.pytorch.plugins.MixedPrecision @: did you mean pr",
    ),
    "argument of a network": (
        digits("model/init_args/model", {"class_path": "torch.nn.Linear", "init_args": {"in_featurs": 1}}),
        "there is no setting model.model.in_featurs, of torch.nn.Linear @: did you mean in_features?",
    ),
    "argument of a network that is missing": (
        digits("model/init_args/model", {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1}}),
        "model.model @ lacks out_features, which torch.nn.Linear requires.",
    ),
    "argument of a task that is null": (
        digits("model/init_args/model", None),
        "model.model @ is null, and lightning_znorm.tasks.ClassificationTask requires it.",
    ),
    "argument of the Trainer": (
        digits("trainer/max_epoch", 3),
        "there is no setting trainer.max_epoch @: did you mean max_epochs?",
    ),
    # Values of another form.
    "class that is a number": (own("model/class_path", 3), f"model.class_path @ is 3, and {FORM}"),
    "class that is nothing": (own("model/class_path", None), f"model.class_path @ is None, and {FORM}"),
    "class that is a list": (
        own("model/class_path", ["faulty.Net"]),
        f"model.class_path @ is ['faulty.Net'], and {FORM}",
    ),
    "class of no letters": (own("model/class_path", ""), f"model.class_path @ is '', and {FORM}"),
    "class of two words": (own("model/class_path", "faulty. Net"), f"model.class_path @ is 'faulty. Net', and {FORM}"),
    "class of a callback that is a number": (
        digits(CALLBACKS, [{"class_path": 3}]),
        f"trainer.callbacks.class_path @ is 3, and {FORM}",
    ),
    "arguments in a list": (own("model/init_args", [1]), f"model.init_args @ is [1], {LINES}"),
    "arguments that are a word": (own("model/init_args", "x"), f"model.init_args @ is 'x', {LINES}"),
    "misspelt init_args": (
        own("model/init_arg", {"width": 3}),
        "there is no setting model.init_arg @: class_path and init_args are expected.",
    ),
    "misspelt class_path of a callback": (
        digits(CALLBACKS, [{"clas_path": "ZNormCallback"}]),
        "there is no setting trainer.callbacks.clas_path @: class_path and init_args are expected.",
    ),
    "model in a list": (
        own("model", [1]),
        "model @ is [1], and a LightningModule (class_path and init_args) or null is expected.",
    ),
    "no model": ({"data": OWN["data"]}, "model is required: name its class in a file (`model: {class_path: ...}`) or"),
    "callback that is nothing": (
        digits(CALLBACKS, [None]),
        "trainer.callbacks @ holds None, and a Callback (class_path and init_args) is expected.",
    ),
    "optimizer that is a number": (
        digits(OPTIMIZER, 3),
        "model.optimizer @ is 3, and a class or a function (class_path and init_args) is expected.",
    ),
    "strategy that is a number": (
        digits("trainer/strategy", 3),
        "trainer.strategy @ is 3, and str or a Strategy (class_path and init_args) is expected.",
    ),
    "word in place of another": (
        digits("model/init_args/lr_scheduler_interval", "batch"),
        "model.lr_scheduler_interval @ is batch, and one of 'epoch', 'step' is expected.",
    ),
    "word in place of yes or no": (
        digits("trainer/enable_progress_bar", "perhaps"),
        "trainer.enable_progress_bar @ is perhaps, and bool or null is expected.",
    ),
    "list in place of a time": (
        digits("trainer/max_time", [3]),
        "trainer.max_time @ is [3], and str or timedelta or dict or null is expected.",
    ),
    "mapping in place of a number": (
        digits("trainer/max_epochs", {}),
        "trainer.max_epochs @ is {}, and int or null is expected.",
    ),
    "number in place of a mapping": (
        digits("model/init_args/model_kwargs", 3),
        "model.model_kwargs @ is 3, and dict or null is expected.",
    ),
}


def test_network_as_an_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    """A network can be called, so the oldest jsonargparse takes it for a function that makes an optimizer."""
    said, _ = refused(capsys, digits(OPTIMIZER, {"class_path": "torch.nn.Linear"}))
    assert said in (
        "model.optimizer (mistaken.yaml) is torch.nn.Linear, a class that is no Optimizer.",
        "model.optimizer (mistaken.yaml) lacks in_features, out_features, which torch.nn.Linear requires.",
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = SETTINGS[name]
    said, before = refused(capsys, content)
    pattern = re.escape(expected.replace("@", "(mistaken.yaml)")).replace(re.escape("..."), ".*")
    assert re.match(pattern, said), said
    assert "Traceback" not in before
    assert len(before.splitlines()) < 5
    assert "NestedArg" not in said
    if "or null is expected" not in expected:
        assert "null is expected" not in said


# The flags after a file, and the sentence.
FLAGS = {
    "--model.init_args.in_chan 3": "there is no setting model.in_chan, of lightning_znorm.tasks.ClassificationTa",
    "--model.optimizer.lrr 3": "there is no setting model.optimizer.lrr, of torch.optim.Adam: did you mean lr?",
    "--model.optimizer.init_args.lr fast": "model.optimizer.lr is fast, and float is expected.",
    "--model.optimizer Adamm": "model.optimizer cannot be made: there is no class Adamm here: did you mean Adam?",
    "--model.optimizer torch.optim.Adamm": "model.optimizer cannot be made: module 'torch.optim' has no attribute ",
    "--model no_syntax.Net": "model is no_syntax.Net, and no_syntax cannot be imported: SyntaxError: ",
    "--model.class_path no_syntax.Net": "model is no_syntax.Net, and no_syntax cannot be imported: SyntaxError: ",
    "--trainer.callbacks+ ZNormCalback": "trainer.callbacks cannot be made: there is no class ZNormCalback here",
    "--trainer.callbacks+=no_such.Stop": "trainer.callbacks cannot be made: No module named 'no_such'",
    "--trainer.callbacks+=ZNormCallback --trainer.callbacks.epss 3": "there is no setting trainer.callbacks.epss, of "
    "lightning_znorm.ZNormCallback: did you mean eps?",
    "--trainer.callbacks+=ZNormCallback --trainer.callbacks.eps x": "trainer.callbacks.eps is x, and float is expecte",
    "--trainer.logger.save_dri x": "there is no setting trainer.logger.save_dri, of lightning.pytorch.loggers.CSVLogg",
    "--trainer.logger faulty.Plain": "trainer.logger is faulty.Plain, a class that is no Logger.",
    "--trainer.logger ModelCheckpoint": "trainer.logger is lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoi",
    "--model.optimizer DigitsDataModule": "model.optimizer is lightning_znorm.data.digits.DigitsDataModule, a class",
    "--trainer.max_epochs many": "trainer.max_epochs is many, and int or null is expected.",
    "--data.batchsize 3": "there is no setting data.batchsize, of lightning_znorm.data.DigitsDataModule: did you mean",
    "--model.num_classes null": "model.num_classes is null, and lightning_znorm.tasks.ClassificationTask requires it.",
    "--trainer 3": "trainer: Unable to load config '3'",
    "--trainer.max_epoch 3": "unrecognized arguments: --trainer.max_epoch 3: did you mean --trainer.max_epochs?",
    "--trainer.max_epoch=3": "unrecognized arguments: --trainer.max_epoch=3: did you mean --trainer.max_epochs?",
    "--ckpt_pat x": "unrecognized arguments: --ckpt_pat x: did you mean --ckpt_path?",
    "--confg x.yaml": "unrecognized arguments: --confg x.yaml: did you mean --config?",
    "--print_confg": "unrecognized arguments: --print_confg: did you mean --print_config?",
    "--seed 3": "unrecognized arguments: --seed 3: did you mean --seed_everything?",
    "--trainer.max_epochs": "argument --trainer.max_epochs: expected one argument",
    "--config": "argument -c/--config: expected one argument",
    "test": "unrecognized arguments: test",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence does not name a file, even if the file has the same setting."""
    said, _ = ended(capsys, "fit", "--config", str(DIGITS), *shlex.split(flags))
    assert said.startswith(FLAGS[flags])
    assert ".yaml" not in said.removeprefix(FLAGS[flags])
    if "or null is expected" not in FLAGS[flags]:
        assert "null is expected" not in said


def test_flag_and_file_with_the_same_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("trainer: {max_epochs: many}")
    assert ended(capsys, "fit", "--config", str(DIGITS), "--config", "mine.yaml")[0].startswith(
        "trainer.max_epochs (mine.yaml) is many"
    )


def test_file_that_a_file_names(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.yaml").write_text("{class_path: faulty.Net, init_args: {width: wide}}")
    said, _ = refused(capsys, {"model": "model.yaml"})
    assert said == "model.width (model.yaml of mistaken.yaml) is wide, and int is expected."


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("fitt --config x", "there is no command fitt: did you mean fit?"),
        ("Fit", "there is no command Fit: did you mean fit?"),
        ("comparee --methods a", "there is no command comparee: did you mean compare?"),
        ("cmpare", "there is no command cmpare: did you mean compare?"),
        ("xyzzy", "there is no command xyzzy: it is fit, validate, test, predict or compare."),
        ("--config x", "name a command first: fit, validate, test, predict or compare."),
        ("--trainer.max_epochs 3", "name a command first: fit, validate, test, predict or compare."),
        ("--trainer.max_epochs 3 fit --config x", "the command comes first: fit --trainer.max_epochs 3 --config x"),
        ("--versoin", "there is no option --versoin: did you mean --version?"),
    ],
)
def test_commands(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    sentence, usage = ended(capsys, *shlex.split(typed))
    assert sentence == said
    assert "{fit,validate,test,predict,compare}" in usage


def test_compare_after_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("lightning_znorm.compare.command.main", lambda args, program: given.append(args))
    main(shlex.split("-c a.yaml --config=b.yaml compare --methods c.yaml d.yaml --output e"))
    main(shlex.split("compare --methods c.yaml d.yaml -c a.yaml --output e --config b.yaml"))
    (first, second) = given
    assert first == second == shlex.split("--config a.yaml --config b.yaml --methods c.yaml d.yaml --output e")


# The fault, its error, and the texts of the lines that lead to it.
CONSTRUCTORS = {
    "value": ("ValueError: width must be even", ["build(fault)\n", '"width must be even"']),
    "key": ("KeyError: 'nothing'", []),
    "torch": ("TypeError: empty(): argument 'size'", ["build(fault)\n", 'nn.Linear("a", 3)']),
    "attribute": ("AttributeError: 'Linear' object has no attribute 'wieght'", ["build(fault)\n", ".wieght"]),
    "recursion": ("RecursionError: maximum recursion depth exceeded", []),
    "caused": ("ValueError: width is missing", ["KeyError: 'nothing'", "was the direct cause", "width is missing"]),
}


@pytest.mark.parametrize("fault", CONSTRUCTORS)
def test_constructor_that_raises(fault: str, modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence has the error, and its line in the user's own code, and no frames of jsonargparse."""
    error, lines = CONSTRUCTORS[fault]
    said, before = refused(capsys, own("model/init_args", {"fault": fault}))
    assert said.startswith(f"model (mistaken.yaml) cannot be made: faulty.Net raises {error}")
    assert re.search(rf"\({re.escape(str(modules / 'faulty.py'))}, line \d+\)\.$", said)
    assert f'File "{modules / "faulty.py"}", line {line_of("self.layer = build")}, in __init__' in before
    for line in lines:
        assert line.strip() in before
    for frame in re.findall(r'File "(.+)", line', before):
        assert frame == str(modules / "faulty.py")
    assert len(before.splitlines()) < 25


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            digits(CALLBACKS, ["faulty.Stop", {"class_path": "faulty.Stop", "init_args": {"every": 0}}]),
            "trainer.callbacks (mistaken.yaml) cannot be made: faulty.Stop raises ValueError: every must be positive (",
        ),
        (
            digits("model/init_args/model", {"class_path": "faulty.Network", "init_args": {"fault": "value"}}),
            "model.model (mistaken.yaml) cannot be made: faulty.Network raises ValueError: width must be even (",
        ),
        (
            digits("model/init_args/model", {"class_path": "torch.nn.Conv2d", "init_args": {"in_channels": 3,
                   "out_channels": 4, "kernel_size": 1, "groups": 2}}),
            "model.model (mistaken.yaml) cannot be made: torch.nn.Conv2d raises ValueError: in_channels must be",
        ),
        # For these, Lightning's own sentences.
        (digits(CALLBACKS, [{"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -3}}]), "Invalid value"),
        (digits("trainer/accelerator", "abacus"), "You selected an invalid accelerator name"),
        (digits("model/init_args/num_classes", 0), "num_classes must be at least 1, got 0."),
    ],
    ids=["callback", "network", "torch", "Lightning", "Trainer", "package"],
)  # fmt: skip
def test_other_constructors(content: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    said, before = refused(capsys, content)
    assert said.startswith(expected)
    assert "jsonargparse" not in before


def test_optimizer_that_raises_once_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    """An optimizer needs the parameters, so it is made when training begins."""
    flags = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]
    said, before = refused(
        capsys, digits(OPTIMIZER, {"class_path": "torch.optim.Adam", "init_args": {"lr": -1}}), *flags
    )
    expected = (
        "model.optimizer (mistaken.yaml) cannot be made: torch.optim.Adam raises ValueError: Invalid learning rate"
    )
    assert said.startswith(expected)
    assert "Traceback" not in before


def test_bug_of_this_package_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_znorm.tasks.classification.TargetCheck", None)
    with pytest.raises(TypeError, match=r"^'NoneType' object is not callable$"):
        main(["fit", "--config", str(DIGITS)])


def test_message_of_another_kind() -> None:
    """The whole message of jsonargparse is printed."""
    Path("mine.yaml").write_text("trainer: {max_epochs: 3}")
    files = [read_config("mine.yaml")]
    assert explained("Something\n  quite else", files) == "Something quite else"
    message = 'Parser key "trainer.max_epochs":\n  A reason that nobody foresaw. Got value: 3'
    assert explained(message, files) == "trainer.max_epochs (mine.yaml) is 3: A reason that nobody foresaw."


def test_text_of_several_lines_in_a_message() -> None:
    """A value is printed as it is, whatever it contains."""
    value = "a\nErrors:\n  - b\nGiven value type: c\nGiven value: d"
    union = (
        "Subtypes: [int, None]\nErrors:\n  - Expected a <class 'int'>\n  - Expected a <class 'NoneType'>\n"
        f"Given value type: <class 'str'>\nGiven value: {value}"
    )
    text = "Does not validate against any of the Union subtypes\n" + union
    fault = read_fault('Parser key "n":\n' + "\n".join(f"  {line}" for line in text.splitlines()))
    assert (fault.keys, fault.kinds, fault.value) == (("n",), ("int", "null"), value)
