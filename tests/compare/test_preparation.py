"""What is shown before the first run, while methods are read and tried."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pretended import Pretended
from rich.console import Console

from lightning_znorm.compare import progress
from lightning_znorm.compare.plan import STEPS, resolve_all
from lightning_znorm.compare.processes import Processes
from lightning_znorm.compare.progress import Preparation
from lightning_znorm.compare.study import Study


@pytest.fixture
def at(monkeypatch):
    """Sets the clock."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


def test_a_line_for_each_event(at):
    text = io.StringIO()
    with Preparation(Console(file=text, width=20), 2) as shown:
        for name, step, seconds in [
            ("one", "reading", 0),
            ("two", "reading", 0),
            ("two", "read", 3),
            ("one", "read", 4),
            ("one", "trying", 4),
            ("one", "tried", 90),
            ("two", "trying", 90),
            ("two", "tried", 95),
        ]:
            at(seconds)
            shown.tell(name, step)
    assert text.getvalue().splitlines() == [
        "one: its settings are read",
        "two: its settings are read",
        "two: its settings were read in 0:00:03 (1 of 2)",
        "one: its settings were read in 0:00:04 (2 of 2)",
        "one: is tried on one batch",
        "one: was tried in 0:01:26 (1 tried)",
        "two: is tried on one batch",
        "two: was tried in 0:00:05 (2 tried)",
    ]


def test_a_line_that_moves(at):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with Preparation(console, 2) as shown:
        assert str(shown._line()) == "0:00:00  reading settings, 0 of 2 are read"
        shown.tell("one", "reading")
        at(7)
        assert str(shown._line()) == "0:00:07  reading settings, 0 of 2 are read: one 0:00:07"
        shown.tell("one", "read")
        shown.tell("two", "reading")
        at(9)
        assert str(shown._line()) == "0:00:09  reading settings, 1 of 2 are read: two 0:00:02"
        shown.tell("two", "read")
        shown.tell("two", "trying")
        at(12)
        assert str(shown._line()) == "0:00:12  trying new methods on one batch, 0 tried: two 0:00:03"
        shown.tell("two", "tried")
        assert str(shown._line()) == "0:00:12  trying new methods on one batch, 1 tried"
        shown._live.refresh()
        assert "trying new methods" in console.file.getvalue()


def test_a_name_is_no_markup(at):
    text = io.StringIO()
    with Preparation(Console(file=text, width=200), 1) as shown:
        shown.tell("[red]\x1b[2J", "reading")
    (line,) = text.getvalue().splitlines()
    assert line.startswith("[red]")
    assert "\x1b" not in line


def test_of_a_study(tmp_path, monkeypatch, capsys):
    study = Pretended(tmp_path, monkeypatch)
    study.run()
    lines = [re.sub(r"\d:\d\d:\d\d", "0", line) for line in capsys.readouterr().out.splitlines()]
    said = [line for line in lines if line.startswith(("baseline: ", "znorm: "))]
    assert [line for line in said if line.startswith("znorm")] == [
        "znorm: its settings are read",
        next(line for line in said if line.startswith("znorm: its settings were read in 0 (")),
        "znorm: is tried on one batch",
        next(line for line in said if line.startswith("znorm: was tried in 0 (")),
    ]
    assert len(said) == 8
    study.run()  # nothing is tried again
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("baseline: ", "znorm: "))]
    assert len(said) == 4
    assert not any("tried" in line for line in said)


def test_many_settings_may_be_read_of_which_few_are_tried(tmp_path, monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(Processes, "capture", lambda self, args: asked.append(args) or (0, "trainer: {}", ""))
    names = [f"m{i}" for i in range(40)]
    study = Study(("exp.yaml",), tuple(f"{name}.yaml" for name in names), (0,), tmp_path)
    found = resolve_all(study, names[5:], Processes(), 3, lambda *event: told.append(event))
    assert list(found) == names[5:]
    assert len(asked) == 35
    assert sorted(told) == sorted((name, step) for name in names[5:] for step in STEPS[:2])


@pytest.mark.full
def test_from_the_first_second(tmp_path):
    """Before anything slow is imported. The time is that of a machine that is busy."""
    methods = ["configs/methods/baseline.yaml", "configs/methods/gc.yaml"]
    words = ["compare", "--config", "configs/digits/resnet20.yaml", "--methods", *methods, "--output", "out"]
    with (
        (tmp_path / "imports").open("wb") as imports,
        subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "lightning_znorm", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=imports,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("Reading settings")
            lines = [process.stdout.readline() for _ in range(2)]
            assert sorted(lines) == ["baseline: its settings are read\n", "gc: its settings are read\n"]
            time.sleep(0.1)
            imported = Path(tmp_path / "imports").read_text()
            assert not re.search(r"\| +(torch|lightning|matplotlib|pandas)$", imported, re.MULTILINE)
        finally:
            process.terminate()
