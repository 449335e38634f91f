"""The built wheel, installed without the repository, runs the README's commands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

REPOSITORY = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder in which only the wheel is installed."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = ["-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ".", cwd=REPOSITORY)
    run(*pip, "install", "--no-deps", "--target", site, *wheels.glob("*.whl"), cwd=wheels)
    return site


def test_every_config_inside(installed):
    def names(folder: Path) -> list[Path]:
        return sorted(path.relative_to(folder) for path in folder.rglob("*.yaml"))

    assert names(installed / "lightning_znorm/configs") == names(REPOSITORY / "configs")
    assert (installed / "lightning_znorm/py.typed").is_file()


def test_every_template_of_the_report_inside(installed):
    folder = "lightning_znorm/compare/templates"
    inside, outside = (sorted(path.name for path in (root / folder).iterdir()) for root in (installed, REPOSITORY))
    assert inside == outside
    assert "report.html.j2" in inside


def test_console_script(installed, tmp_path):
    program = "import importlib.metadata as m; print(*m.distribution('lightning-znorm').entry_points)"
    assert "value='lightning_znorm.cli:main'" in run("-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    out = run(installed / "bin/lightning-znorm", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.startswith("usage: lightning-znorm {")


def test_first_command_of_the_readme(installed, tmp_path):
    command = re.search(r"python (-m lightning_znorm fit .*)", (REPOSITORY / "README.md").read_text())
    assert command
    where = run(
        "-c", "import lightning_znorm; print(lightning_znorm.__file__)", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert Path(where.strip()).is_relative_to(installed)
    flags = ["--trainer.fast_dev_run", "true"]
    out = run(*shlex.split(command[1]), *flags, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "val/accuracy" in out
