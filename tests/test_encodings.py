"""Config files are read once, in UTF-8, also from pipes; characters that a stream cannot write do not end a command."""

import io
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_znorm import cli
from lightning_znorm.cli import main
from lightning_znorm.cli.config_files import read_config
from tests.processes import run_python

DIGITS = str(Path(__file__).parents[1] / "configs/digits/resnet20.yaml")
NAME = "Größe 日本 😀"
OWN = f"""# {NAME}
model: {{class_path: own_module.OwnModule, init_args: {{fault: "{NAME}"}}}}
data: {{class_path: own_module.OwnData}}
trainer:
  max_epochs: 1
  log_every_n_steps: 1
  accelerator: cpu
  logger: {{class_path: CSVLogger, init_args: {{save_dir: "lögs", name: ""}}}}
"""

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`|You passed in a `val_dataloader`")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*args: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    assert isinstance(exit_info.value.code, str)
    assert "\n" not in exit_info.value.code
    return exit_info.value.code


def settings(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """Return the settings that `--print_config` prints."""
    with pytest.raises(SystemExit) as exit_info:
        main([*args, "--print_config"])
    out, err = capsys.readouterr()
    assert exit_info.value.code == 0, err
    content: dict[str, Any] = yaml.safe_load(out)
    return content


def written(name: str, text: str, encoding: str = "utf-8") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text.encode(encoding))
    return name


@pytest.fixture
def pipe() -> Iterator[Callable[[str], str]]:
    """Return a function that makes a pipe like a shell's ``<(...)`` and returns its name; the text must fit into it."""
    with ExitStack() as opened:

        def make(text: str) -> str:
            reading, writing = os.pipe()
            opened.callback(os.close, reading)
            with open(writing, "wb") as file:
                file.write(text.encode())
            return f"/dev/fd/{reading}"

        yield make


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="ascii"))
    return content


class TestReading:
    def test_mark_of_the_encoding(self, capsys):
        mine = written("mine.yaml", OWN, "utf-8-sig")
        assert read_config(mine).settings["model.init_args.fault"] == NAME
        assert settings(capsys, "fit", "--config", mine)["model"]["init_args"]["fault"] == NAME

    @pytest.mark.parametrize(
        ("encoding", "place"),
        [("latin-1", "line 2, byte 0xf6"), ("cp1252", "line 2, byte 0xf6"), ("utf-16", "line 1, byte 0xff")],
    )
    def test_another_encoding(self, encoding, place):
        message = refusal("fit", "--config", written("mine.yaml", "# ASCII\n# Größe\ntrainer: {}", encoding))
        assert message.startswith(f"error: mine.yaml is not text in UTF-8 ({place}")
        assert message.endswith("save it in UTF-8.")

    def test_what_was_read_is_what_is_used(self, capsys, monkeypatch):
        """If a file changes, or is removed, while the command starts, it is not read a second time."""
        mine, other = (written(name, OWN) for name in ("mine.yaml", "other.yaml"))

        def change(files: list[Any]) -> list[Any]:
            written(mine, OWN.replace("max_epochs: 1", "max_epochs: 99"))
            Path(other).unlink()
            return files

        monkeypatch.setattr(cli, "in_order", change)
        assert settings(capsys, "fit", "--config", mine, "--config", other)["trainer"]["max_epochs"] == 1
        assert "99" in Path(mine).read_text(encoding="utf-8")

    def test_files_that_files_name(self, capsys, monkeypatch):
        written("far/model.yaml", "{class_path: own_module.OwnModule, init_args: {fault: Größe}}")
        written("far/cb.yaml", "{class_path: ZNormCallback, init_args: {eps: 0.5}}")
        mine = written("far/mine.yaml", "{model: model.yaml, trainer: {callbacks+: [cb.yaml]}}")
        content = settings(capsys, "fit", "--config", mine)
        assert content["model"]["init_args"]["fault"] == "Größe"
        assert content["trainer"]["callbacks"][0]["init_args"]["eps"] == 0.5

        monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale=True: "ISO-8859-1")
        assert "model.yaml, which another config file names, is not ASCII, and is read in this system's" in refusal(
            "fit", "--config", mine
        )
        written("far/model.yaml", "{class_path: own_module.OwnModule, init_args: {fault: ASCII}}")
        assert settings(capsys, "fit", "--config", mine)["model"]["init_args"]["fault"] == "ASCII"

    def test_folder(self):
        Path("mine").mkdir()
        assert refusal("fit", "--config", "mine") == "error: mine is a folder: name a config file in it."


@pytest.mark.skipif(sys.platform == "win32", reason="pipes have no names there")
class TestPipes:
    def test_process_substitution(self, capsys, pipe):
        expected = settings(capsys, "fit", "--config", written("mine.yaml", OWN))
        assert settings(capsys, "fit", "--config", pipe(OWN)) == expected
        half = OWN.index("trainer:")
        assert settings(capsys, "fit", "--config", pipe(OWN[:half]), "--config", pipe(OWN[half:])) == expected

    def test_named_pipe(self, capsys):
        expected = settings(capsys, "fit", "--config", written("mine.yaml", OWN))
        os.mkfifo("named")
        writer = threading.Thread(target=lambda: Path("named").write_text(OWN, encoding="utf-8"))
        writer.start()
        assert settings(capsys, "fit", "--config", "named") == expected
        writer.join()

    def test_standard_input(self, capsys, standard_input):
        standard_input.write(OWN.encode())
        standard_input.seek(0)
        assert settings(capsys, "fit", "--config", "-") == settings(
            capsys, "fit", "--config", written("mine.yaml", OWN)
        )

    def test_relative_names_begin_here(self, capsys, pipe):
        written("model.yaml", "own_module.OwnModule")
        content = settings(capsys, "fit", "--config", pipe("{model: {class_path: own_module.OwnModule}}"))
        assert content["model"]["class_path"] == "own_module.OwnModule"
        written("model.yaml", "{class_path: own_module.OwnModule, init_args: {lr: 0.5}}")
        assert settings(capsys, "fit", "--config", pipe("model: model.yaml"))["model"]["init_args"]["lr"] == 0.5

    @pytest.mark.parametrize("closed", [False, True])
    def test_nothing_on_standard_input(self, closed, monkeypatch, standard_input):
        if closed:
            monkeypatch.setattr(sys, "stdin", None)
        message = "No config file -: standard input is closed." if closed else "- holds no settings: "
        assert refusal("fit", "--config", "-").startswith(f"error: {message}")

    def test_errors_name_what_was_typed(self, capsys, pipe):
        name = pipe("trainer: {max_epochs: many}")
        with pytest.raises(SystemExit):
            main(["fit", "--config", DIGITS, "--config", name])
        assert f"error: trainer.max_epochs ({name}) is many, and int or null is expected." in capsys.readouterr().err

    def test_order_is_checked(self, pipe):
        assert "is an experiment and overrides what is named before it, " in refusal(
            "fit", "--config", pipe("trainer: {max_epochs: 1}"), "--config", pipe(OWN)
        )

    def test_command_for_the_test_names_what_was_saved(self, capsys, pipe):
        main(["fit", "--config", pipe(OWN)])
        command = capsys.readouterr().out.rpartition("python -m lightning_znorm ")[2]
        assert shlex.split(command)[:3] == ["test", "--config", "lögs/version_0/config.yaml"]
        assert yaml.safe_load(Path("lögs/version_0/config.yaml").read_bytes())["model"]["init_args"]["fault"] == NAME
        with pytest.raises(SystemExit, match="No `test_step"):  # this module has no `test_step`
            main(shlex.split(command))

    def test_processes_that_would_read_it_again(self, pipe, folder):
        name = pipe(OWN)
        message = refusal("fit", "--config", name, "--trainer.devices", "2", "--trainer.strategy", "ddp")
        assert message.startswith(f"error: {name} can be read only once, and each of 2 processes reads the settings")
        assert not list(folder.iterdir())

    def test_processes_that_do_not(self, monkeypatch, pipe):
        """Processes that begin as a fork of this one, or with the settings that it passes on."""
        monkeypatch.setattr("lightning_znorm.cli.run.RunCLI._run_subcommand", lambda *_: None)
        main(["fit", "--config", pipe(OWN), "--trainer.devices", "2", "--trainer.strategy", "ddp_spawn"])

    def test_named_twice(self, standard_input):
        assert refusal("fit", "--config", "-", "-c", "-") == "error: - is named twice: name it once."

    @pytest.mark.parametrize("option", ["--config", "--methods"])
    def test_runs_of_a_study(self, option, pipe, folder):
        files = {"--config": DIGITS, "--methods": "configs/methods/znorm.yaml"} | {option: pipe(OWN)}
        message = refusal("compare", *(word for pair in files.items() for word in pair), "--output", "study")
        assert message.startswith(f"error: {files[option]} can be read only once, and each run of a study reads its ")
        assert not list(folder.iterdir())

    @pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
    def test_processes_of_a_launcher(self, variable, monkeypatch, standard_input):
        standard_input.write(OWN.encode())
        standard_input.seek(0)
        monkeypatch.setenv(variable, "2")
        message = refusal("fit", "--config", "-", "--trainer.devices", "2", "--trainer.strategy", "ddp")
        assert message.startswith("error: - can be read only once, and each of 2 processes")
        assert standard_input.tell() == 0  # another process might need it


@pytest.fixture
def as_typed(monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs a command as typed, and returns its output, on a stream of a given encoding."""

    def run(encoding: str, *args: str) -> bytes:
        out, err = io.BytesIO(), io.BytesIO()
        with monkeypatch.context() as context:
            context.setattr(sys, "argv", ["lightning_znorm", *args])
            for name, stream in (("stdout", out), ("stderr", err)):
                context.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, write_through=True))
            with pytest.raises(SystemExit, match=r"^0$") if "--print_config" in args else nullcontext():
                main()
            return out.getvalue()

    return run


class TestPrinting:
    @pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
    def test_summary_after_a_training(self, as_typed, encoding, bar):
        mine = written("日本.yaml", OWN + f"  callbacks: [{bar}, RichModelSummary]\n")
        out = as_typed(encoding, "fit", "--config", mine).decode(encoding)
        shown = [word.encode(encoding, "backslashreplace").decode(encoding) for word in ("lögs/version_0/", mine)]
        assert f"last checkpoint  {shown[0]}" in out
        assert f"test it with     python -m lightning_znorm test --config {shlex.quote(shown[1])} " in out

    @pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
    def test_name_that_is_not_utf_8(self, as_typed):
        name = os.fsdecode(b"m\xfcsli.yaml")
        Path(name).write_text(OWN, encoding="utf-8")
        assert rb"--config 'm\udcfcsli.yaml'" in as_typed("utf-8", "fit", "--config", name)

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
    def test_printed_settings_can_be_read_again(self, as_typed, capsys, encoding):
        mine = written("mine.yaml", OWN)
        printed = as_typed(encoding, "fit", "--config", mine, "--print_config")
        Path("printed.yaml").write_bytes(printed)
        assert read_config("printed.yaml").settings["model.init_args.fault"] == NAME
        assert settings(capsys, "fit", "--config", "printed.yaml") == settings(capsys, "fit", "--config", mine)

    def test_streams_of_a_program_are_its_own(self, monkeypatch):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        with monkeypatch.context() as context:
            context.setattr(sys, "stdout", out)
            main(["--version"])
        assert (out.encoding, out.errors) == ("ascii", "strict")


def of_another_century(folder, name):
    """Train in a process whose names and streams are ASCII: Python reads this encoding only when it starts."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNINGS": "ignore"}
    module = str(Path(__file__).parent)
    return run_python(
        "-c",
        f"import sys; sys.path.append({module!r}); from lightning_znorm.cli import main; main()",
        *("fit", "--config", name),
        timeout=250,
        cwd=folder,
        **locale,
    )


@pytest.mark.full
def test_system_whose_encoding_is_not_utf_8(folder):
    """The encoding is not UTF-8, as on Windows, or in an old locale."""
    mine = OWN.replace("lögs", "logs")
    written("ü.yaml", mine + "  callbacks: [RichProgressBar]\n")
    done = of_another_century(folder, "ü.yaml")
    assert done.returncode == 0, done.stdout
    assert "last checkpoint" in done.stdout
    (saved,) = folder.rglob("config.yaml")
    content = yaml.safe_load(saved.read_bytes().decode("utf-8"))
    assert content["model"]["init_args"]["fault"] == NAME


@pytest.mark.full
def test_folder_that_such_a_system_cannot_make(folder):
    written("own.yaml", OWN)
    done = of_another_century(folder, "own.yaml")
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    said = r"error: '.*l\\xf6gs.*' cannot be written in the encoding of this system \((ascii|utf-8)\): set the env"
    assert re.match(said, done.stdout.splitlines()[-1]), done.stdout
