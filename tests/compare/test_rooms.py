"""The files of a study know only of those below them."""

import ast
from pathlib import Path

import pytest

import lightning_znorm.compare

PACKAGE = Path(lightning_znorm.compare.__file__).parent

# From the ground up. A study's way goes up: study, plan, runner, results, statistics, report.
FILES = [
    "cores",
    "formatting",
    "files",
    "looks",
    "study",
    "settings",
    "checkpoints",
    "results",
    "recorder",
    "forks",
    "processes",
    "runner",
    "plan",
    "engines",
    "progress",
    "power",
    "statistics",
    "advice",
    "plots",
    "sweep",
    "report",
    "command",
    "__init__",
]


def test_each_file_has_its_place() -> None:
    assert sorted(path.stem for path in PACKAGE.glob("*.py")) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_arrows_go_down(name: str) -> None:
    below = {f"lightning_znorm.compare.{other}" for other in FILES[: FILES.index(name)]}
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning_znorm.compare."):
            assert node.module in below, f"{name} imports {node.module}"
            assert not [alias.name for alias in node.names if alias.name.startswith("_")], (
                f"{name} imports a private name"
            )
