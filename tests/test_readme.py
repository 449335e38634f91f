"""Every code block of the README runs, and its links lead somewhere."""

import shlex

import pytest

from lightning_znorm import ZNormCallback
from lightning_znorm.cli import main
from tests.documents import OURS, REPOSITORY, broken_links, code_blocks, commands, run_command

README = REPOSITORY / "README.md"


def test_every_language_is_run_here() -> None:
    assert {language for language, _ in code_blocks(README)} == {"bash", "python"}


def test_python() -> None:
    ((_, code),) = code_blocks(README, "python")
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert any(isinstance(callback, ZNormCallback) for callback in names["trainer"].callbacks)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("command", [command for command in commands(README) if OURS.match(command)])
def test_command(command: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(command, monkeypatch)


@pytest.mark.full  # the same as above, but the study tries its methods in processes of their own
def test_compare(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = (command for command in commands(README) if " compare " in command)
    monkeypatch.chdir(tmp_path)
    main([*shlex.split(OURS.sub("", command)), "--dry-run", "--trainer.accelerator", "cpu"])


def test_the_other_commands_install_and_test() -> None:
    # .ci/run runs the first three, in a fresh environment.
    assert [command for command in commands(README) if not OURS.match(command)] == [
        "python -m pip install .",
        "python -m pip install '.[test]'",
        "python -m pytest",
        "python -m pip install --no-deps .",
    ]


def test_ci_runs_both_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n<!-- ci: run -->\n```bash\npython -m pip install ") == text.count("<!-- ci: run -->") == 2


def test_links() -> None:
    assert broken_links(README) == []


def test_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 140
