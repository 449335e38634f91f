"""The package from outside: the cost of its imports, its metadata, and which room may import which."""

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_znorm
from tests.processes import run_python

PACKAGE = Path(lightning_znorm.__file__).parent
REPOSITORY = Path(__file__).parents[1]

MODULES = ["lightning_znorm"] + [
    module.name
    for module in pkgutil.walk_packages([str(PACKAGE)], "lightning_znorm.")
    if module.name != "lightning_znorm.__main__"  # runs a command
]


def source(module: str) -> str:
    found = importlib.util.find_spec(module)
    assert found is not None
    return Path(str(found.origin)).read_text(encoding="utf-8")


HEAVY = {"PIL", "matplotlib", "monai", "scipy", "sklearn", "timm", "torchvision", "triton"}

IMPORT = """
import json, sys, time
import lightning.pytorch
before, start = set(sys.modules), time.process_time()
import lightning_znorm
lightning_znorm.ZNormCallback()
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""


def python(program: str) -> str:
    finished = run_python("-W", "ignore", "-c", program, timeout=60)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


@pytest.mark.full  # measures time
def test_price_of_the_import() -> None:
    runs = [json.loads(python(IMPORT)) for _ in range(3)]
    # The least CPU time, because other programs on a busy machine must not count.
    assert min(seconds for seconds, _ in runs) < 0.15


@pytest.mark.full
def test_import_loads_nothing_heavy() -> None:
    loaded = set(json.loads(python(IMPORT))[1])
    assert "lightning_znorm" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_import_alone_loads_neither_torch_nor_lightning() -> None:
    loaded = python("import sys, lightning_znorm; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "lightning_znorm" in loaded
    assert not {"torch", "lightning", *HEAVY} & set(loaded)


WITHOUT_LIGHTNING = """
import sys
sys.modules.update(dict.fromkeys(["lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "torchvision"]))
import torch
from lightning_znorm.functional import attach, centralize_grads_, zscore_grads_
weight = torch.nn.Parameter(torch.zeros(2, 2))
optimizer = torch.optim.SGD([weight], lr=1.0)
attach(optimizer)
weight.grad = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
optimizer.step()
print(weight.tolist())
"""


def test_functional_needs_torch_alone() -> None:
    assert python(WITHOUT_LIGHTNING).strip() == "[[1.0, 1.0], [-1.0, -1.0]]"


PUBLIC = {
    "lightning_znorm": ["GradientCentralizationCallback", "GradientTransform", "ZNormCallback", "__version__"],
    "lightning_znorm.errors": ["ZNormError", "ZNormTypeError", "ZNormValueError"],
    "lightning_znorm.functional": ["attach", "centralize_grads_", "transform_grads_", "zscore_grads_"],
    "lightning_znorm.gradients": ["AffineMethod", "Statistics", "UnsupportedGradientError", "ZScore"],
    "lightning_znorm.tasks": ["ClassificationTask"],
    "lightning_znorm.data": [
        "CIFAR10DataModule",
        "DigitsDataModule",
        "ImageFolderDataModule",
        "LGGDataModule",
        "MaskFolderDataModule",
        "PCamDataModule",
    ],
    "lightning_znorm.metrics": ["DiceScore", "HausdorffDistance", "MaskCount", "PatientDiceScore", "TverskyIndex"],
    "lightning_znorm.models": ["resnet20", "resnet56"],
    "lightning_znorm.compare": ["Row", "StudyError", "Table", "run"],
    "lightning_znorm.cli": ["main"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    imported = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert name in dir(imported)
        assert getattr(imported, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'lightning_znorm' has no attribute 'ZNorm'"):
        lightning_znorm.ZNorm  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_all_names_exist(module: str) -> None:
    if module.endswith((".kernels.triton", ".kernels.triton_programs")):
        pytest.importorskip("triton", reason="needs Triton: pip install triton")
    imported = importlib.import_module(module)
    for name in getattr(imported, "__all__", []):
        assert hasattr(imported, name)


def test_version() -> None:
    assert lightning_znorm.__version__ == importlib.metadata.version("lightning-znorm")
    assert f"\n## [{lightning_znorm.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {lightning_znorm.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")


def test_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_configs_go_into_the_wheel() -> None:
    # tests/test_wheel.py builds it.
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert '[tool.hatch.build.targets.wheel.force-include]\nconfigs = "lightning_znorm/configs"\n' in text


@pytest.mark.parametrize("module", [name for name in MODULES if ">>> " in source(name)])
def test_doctests(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
    assert list(tmp_path.iterdir()) == []


# From top to bottom; a room may import the rooms below it.
ROOMS = [
    "__main__",
    "cli",
    "compare",
    "tasks",
    "data",
    "hyperparameters",
    "models",
    "metrics",
    "callbacks",
    "batches",
    "functional",
    "gradients",
    "arguments",
    "__init__",
    "lazy",
    "requirements",
    "errors",
]
# Packages that a room may load, besides the standard library, torch and torch's dependencies.
LIBRARIES = {
    "cli": {"jsonargparse", "lightning", "yaml"},
    "compare": {"jinja2", "lightning", "markupsafe", "numpy", "psutil", "rich", "yaml"},
    "tasks": {"lightning", "numpy", "torchmetrics"},
    "data": {"lightning", "numpy"},
    "hyperparameters": {"lightning", "numpy"},
    "metrics": {"numpy", "torchmetrics"},
    "callbacks": {"fsspec", "lightning"},  # torch and lightning depend on fsspec
    "gradients": {"triton"},  # by what is loaded where there is a GPU
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield the full names that a file imports when it is imported itself, without imports inside functions."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.Lambda) and not is_for_type_checkers(node):
            todo += ast.iter_child_nodes(node)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_go_down(path: Path) -> None:
    below = ROOMS[ROOMS.index(room(path)) :]
    libraries = {"torch", "typing_extensions", *sys.stdlib_module_names, *LIBRARIES.get(room(path), ())}
    for name in imports(path):
        library, *inner = name.split(".")
        if library == "lightning_znorm":
            assert inner == ["__version__"] or inner[0] in below, f"{room(path)} imports {name}"
        else:
            assert library in libraries, f"{room(path)} imports {name}"


def test_no_path_of_a_machine() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("needs a clone: git lists no files here")
    machine = re.compile(r"(?<![\w.~$}/-])/(work|root|home|Users|mnt|farm)/\w|\b[A-Z]:\\Users")
    for path in (REPOSITORY / name for name in listed.stdout.decode().split("\0") if name):
        found = machine.search(path.read_text(encoding="utf-8", errors="ignore"))
        assert not found, f"{path}: {found}"
