"""Help: a short page that comes at once and is true, and all flags in plain words."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from lightning_znorm.cli import main
from lightning_znorm.cli.classes import CLASSES, import_classes
from lightning_znorm.cli.components import Parser, flags_of
from lightning_znorm.cli.config_files import read_config, shipped_configs
from lightning_znorm.cli.help import FLAGS, SENTENCES, page
from lightning_znorm.cli.help_format import TITLES, in_order, named_classes, plain
from lightning_znorm.cli.run import RunCLI
from tests.processes import run_python

DIGITS = "configs/digits/resnet20.yaml"
ZNORM = "configs/methods/znorm.yaml"
LIGHTNING = [
    ("trainer.callbacks", "ModelCheckpoint"),
    ("trainer.callbacks", "EarlyStopping"),
    ("trainer.logger", "CSVLogger"),
    ("trainer.strategy", "DDPStrategy"),
    ("model.init_args.optimizer", "Adam"),
]
PUBLIC = [(key, name) for key, (_, names) in CLASSES.items() for name in names]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([*args])
    assert exit_info.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    """The real parsers, by their commands."""

    class Parsers(RunCLI):
        def parse_arguments(self, parser, args):
            found.update(parser.commands())
            raise SystemExit

    found: dict[str, Parser] = {}
    with pytest.raises(SystemExit):
        Parsers([], [])
    return found


def groups(text: str) -> dict[str, str]:
    """Return the groups of a help by their titles."""
    parts = re.split(r"\n\n(?=\S)", text)
    return {title: rest for title, _, rest in (part.partition(":\n") for part in parts)}


def assert_plain(text: str) -> None:
    assert not re.search(r":\w+:`|``|`_(?!\w)", text)
    assert not re.search(r"^\s*See `?[\w.~]+`?\.|\bSee `?[A-Z]\w+[a-z][A-Z]\w*`?\.", text), "a help that says: see X."


class TestShortPage:
    @pytest.mark.parametrize("command", SENTENCES)
    def test_flags_and_defaults_are_the_parser_s(self, command, parsers):
        parser = parsers[command]
        flags = {name: action for action in flags_of(parser) for name in action.option_strings}
        defaults = parser.get_defaults(skip_validation=True)
        for flag in (flag for flag in FLAGS if command in flag.commands):
            assert flag.name in flags
            takes_value = flags[flag.name].dest != "print_config"
            assert bool(flag.value) == takes_value
            if flag.default is not None:
                assert defaults[flag.name.removeprefix("--")] == flag.default

    @pytest.mark.parametrize("command", SENTENCES)
    def test_every_flag_that_it_names_exists(self, command, parsers):
        known = {name for action in flags_of(parsers[command]) for name in action.option_strings}
        named = re.findall(r"^  (?:-c, )?(--[\w.+]+)", page(command, "lightning-znorm", []), flags=re.MULTILINE)
        assert len(named) > 10
        assert {*named} <= known

    def test_only_fit_resumes(self):
        assert "--trainer.max_epochs" in page("fit", "x", [])
        assert "--trainer.max_epochs" not in page("test", "x", [])
        assert "resume" not in page("test", "x", [])

    def test_precision_without_the_flag(self):
        from lightning.pytorch import Trainer

        assert Trainer(logger=False, accelerator="cpu", barebones=True).precision == "32-true"
        assert "32-true unless it is set" in page("fit", "x", [])

    @pytest.mark.parametrize("config", [name for name in shipped_configs() if "/methods/" not in name])
    def test_settings_are_flags(self, config, parsers):
        """Each setting stands there as the flag that sets it, with its value."""
        lines = page("fit", "x", [read_config(config)]).splitlines()
        shown = [
            line.strip()
            for line in lines[lines.index(f"settings of {config}, as flags; a flag of your own overrides a file:") :]
        ]
        for key, value in read_config(config).settings.items():
            if not key.startswith("trainer.callbacks"):
                assert any(line.startswith(f"--{key.removesuffix('.class_path')} ") for line in shown), (key, value)

    @pytest.mark.full
    def test_settings_as_flags_give_the_same_settings(self, capsys):
        """The flags that the page shows, in place of the files, are the same experiment."""
        import shlex

        lines = page("fit", "x", [read_config(DIGITS), read_config(ZNORM)]).splitlines()
        begin = next(number for number, line in enumerate(lines) if line.startswith("settings of"))
        flags = shlex.split(" ".join(lines[begin + 1 : lines.index("", begin)]))
        by_flags = printed(capsys, "fit", *flags, "--print_config").replace("callbacks+", "callbacks")
        by_files = printed(capsys, "fit", "--config", DIGITS, "--config", ZNORM, "--print_config")
        assert "lr: 0.001" in by_flags
        left_out = r"\n +monitor: .*|\n +mode: .*|\n +filename: .*|\n +auto_insert_metric_name: .*"  # of a callback
        assert re.sub(left_out, "", by_flags) == re.sub(left_out, "", by_files)

    def test_classes_are_those_of_the_package(self):
        for module, names in CLASSES.values():
            assert [*names] == sorted(importlib.import_module(module).__all__)

    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_it_comes_without_torch(self, flag):
        args = ["fit", "--config", DIGITS, "--config", ZNORM, flag]
        program = f"""
import sys
from lightning_znorm.cli import main
try: main({args})
finally: print([name for name in ("torch", "lightning", "jsonargparse", "numpy") if name in sys.modules])"""
        done = run_python("-c", program, timeout=200)
        assert done.returncode == 0, done.stdout
        assert done.stdout.endswith("[]\n")
        assert "  --model ClassificationTask\n" in done.stdout
        assert "  --trainer.callbacks+ ZNormCallback\n" in done.stdout

    def test_wrong_file(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "--config", "configs/digits/resnet21.yaml", "--help"])
        assert "did you mean configs/digits/resnet20.yaml" in str(exit_info.value.code)


class TestAllFlags:
    @pytest.mark.parametrize("command", SENTENCES)
    def test_sections_in_order(self, command, capsys):
        text = printed(capsys, command, "--help_all")
        assert [*groups(text)][2:] == ["options", *(TITLES[key] for key in ("model", "data", command, "trainer"))]
        assert text.startswith(f"usage: python -m lightning_znorm {command} ")
        assert "--trainer.max_epochs" in text
        # The Trainer's own flags come before those that this package declares.
        assert text.index("--trainer.max_epochs") < text.index("--trainer.limit_train_batches")

    @pytest.mark.parametrize("command", SENTENCES)
    def test_in_plain_words(self, command, capsys):
        text = printed(capsys, command, "--help_all")
        assert_plain(" ".join(text.split()))
        for boast in (
            "<class",
            "main advantage",
            "standardizes the training",
            "Runs the full optimization",
            "is one batch",
        ):
            assert boast not in text

    def test_public_classes_alone(self):
        """In a process of its own, whose classes are not those of other tests."""
        program = "from lightning_znorm.cli import main; main(['fit', '--help_all'])"
        done = run_python("-W", "ignore", "-c", program, timeout=200)
        text = done.stdout.replace("\n", "").replace(" ", "")
        for key, (module, names) in CLASSES.items():
            del key
            for name in names:
                assert f"{module}.{name}" in text
        for hidden in (
            "SavesRandomStates",
            "tasks.base",
            "data.base",
            "PatientDataModule",
            "components.",
            "DummyLogger",
        ):
            assert hidden not in text

    def test_every_flag_has_a_text(self, parsers):
        for parser in parsers.values():
            for action in flags_of(parser):
                assert action.help is not None
                assert action.help is argparse.SUPPRESS or len(action.help) > 8, action.option_strings

    def test_help_all_is_no_setting(self, capsys):
        assert "help" not in printed(capsys, "fit", "--config", DIGITS, "--print_config")


class TestClasses:
    @pytest.mark.parametrize(("key", "name"), [*PUBLIC, *LIGHTNING], ids=lambda word: word)
    def test_help_of_a_class(self, key, name, capsys):
        is_nested = key == "model.init_args.optimizer"
        args = ["--model.help", "ClassificationTask", "--model.optimizer.help"] if is_nested else [f"--{key}.help"]
        text = printed(capsys, "fit", *args, name)
        assert re.match(rf"Arguments of [\w.]+\.{name}, as flags", text)
        assert "torch.nn.Module" not in text
        assert "torch.nn.modules" not in text
        assert len(text.splitlines()) < 350
        assert_plain(" ".join(text.split()))

    @pytest.mark.parametrize(("key", "name"), PUBLIC, ids=lambda word: word)
    def test_each_argument_has_a_text(self, key, name):
        parser = Parser(exit_on_error=False)
        parser.add_class_arguments(getattr(importlib.import_module(CLASSES[key][0]), name), key, fail_untyped=False)
        arguments = [flag for flag in flags_of(parser) if flag.option_strings[0].startswith(f"--{key}.")]
        assert arguments or name in ("LastCheckpoint", "ScoreWriter")
        for argument in arguments:
            assert isinstance(argument.help, str), argument.option_strings
            assert len(argument.help) > 8, argument.option_strings
            assert_plain(plain(argument.help))


class TestText:
    @pytest.mark.parametrize(
        ("written", "read"),
        [
            ("``None``", "`None`"),
            ("a :class:`~datetime.timedelta` or :func:`torch.no_grad`", "a timedelta or torch.no_grad"),
            (":py:class:`dict`", "dict"),
            (":paramref:`~lightning.pytorch.trainer.trainer.Trainer.logger`", "logger"),
            (":doc:`the guide <guide/index>`", "guide/index"),
            ("the `notes <https://pytorch.org/x.html#id3>`_.", "the notes (https://pytorch.org/x.html#id3)."),
            ("`torch.compile` stays", "`torch.compile` stays"),
            ("`AdamW`_ and ``_mask``, `x_`", "AdamW and `_mask`, `x_`"),
        ],
    )
    def test_plain(self, written, read):
        assert plain(written) == read

    def test_named_classes(self):
        import_classes()
        listed = ", known subclasses: lightning.LightningModule, lightning_znorm.tasks.ClassificationTask, "
        listed += "lightning_znorm.tasks.base.Task, my_module.MyModule"
        expected = ", known subclasses: lightning_znorm.tasks.ClassificationTask, my_module.MyModule"
        assert named_classes(listed) == expected
        assert named_classes("") == ""
        assert named_classes(", known subclasses: lightning.Callback") == ""
        many = ", known subclasses: " + ", ".join(f"torch.nn.Layer{number}" for number in range(60))
        assert named_classes(many) == ""

    def test_in_order(self):
        text = "usage: x\n\nTrain.\n\noptions:\n  -h\n\ntrainer: b:\n  --t\n\nmodel: a:\n  --m\n"
        assert in_order(text) == "usage: x\n\nTrain.\n\noptions:\n  -h\n\nmodel: a:\n  --m\n\ntrainer: b:\n  --t\n"


class TestImportedClasses:
    @pytest.mark.parametrize("name", ["data.yaml", "data.conf"])
    def test_named_in_another_file(self, name, tmp_path):
        """A file may name a file that names the class. In a process of its own, where no test has imported it."""
        (tmp_path / name).write_text("class_path: DigitsDataModule\n")
        (tmp_path / "exp.yaml").write_text(
            f"data: {name}\n"
            "model: {class_path: ClassificationTask, init_args: {model: resnet20, num_classes: 10}}\n"
        )
        program = "from lightning_znorm.cli import main; main(['fit', '--config', 'exp.yaml', '--print_config'])"
        done = run_python("-W", "ignore", "-c", program, timeout=200, cwd=tmp_path)
        assert "lightning_znorm.data.DigitsDataModule" in done.stdout

    @pytest.mark.parametrize(("name", "kind"), [("DiceScore", "Metric"), ("PatientDiceScore", "Metric")])
    def test_bare_names_in_a_users_module(self, name, kind, tmp_path):
        """Names of every room are known, also where no task of ours has imported them."""
        (tmp_path / "own.py").write_text(
            "from lightning.pytorch import LightningModule\nfrom torchmetrics import Metric\n\n\n"
            f"class Own(LightningModule):\n    def __init__(self, metric: {kind}):\n        super().__init__()\n"
        )
        (tmp_path / "exp.yaml").write_text(f"model: {{class_path: own.Own, init_args: {{metric: {name}}}}}\n")
        program = "from lightning_znorm.cli import main; main(['fit', '--config', 'exp.yaml', '--print_config'])"
        done = run_python("-W", "ignore", "-c", program, timeout=200, cwd=tmp_path)
        assert f"class_path: lightning_znorm.metrics.{name}" in done.stdout

    def test_misspelt(self):
        """The nearest name is suggested, also in a new process."""
        args = ["fit", "--data", "DigitsDataModul", "--model", "ClassificationTask"]
        program = f"from lightning_znorm.cli import main; main({args})"
        done = run_python("-W", "ignore", "-c", program, timeout=200)
        assert "did you mean DigitsDataModule?" in done.stdout


def test_values_are_written_as_yaml_reads_them(capsys, tmp_path):
    given = {"model": {"class_path": "own.Own", "init_args": {"names": ["a, b", "", "null", None, True]}}}
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump({**given, "x-anchor": {"a": 1}}))
    out = printed(capsys, "fit", "--config", str(tmp_path / "exp.yaml"), "--help")
    flags = dict(shlex.split(line) for line in out.splitlines() if line.startswith("  --model.init_args."))
    read = {flag.rpartition(".")[2]: yaml.safe_load(value) for flag, value in flags.items()}
    assert read["names"] == given["model"]["init_args"]["names"]
    assert "x-anchor" not in out


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--config", DIGITS, "--help"], ["--version"]])
def test_a_reader_may_stop(arguments):
    """As with `| head -1`: whoever reads the help has gone."""
    program = f"import sys; sys.argv = ['x', *{arguments}]; from lightning_znorm.cli import main; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, timeout=200)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["fit", "--bogus", "3"], ["fit", "--trainer.max_epochs", "many"]])
def test_refusals_name_the_program(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "run: python -m lightning_znorm fit --help" in capsys.readouterr().err
