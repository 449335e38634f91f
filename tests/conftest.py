"""Fixtures, the two tiers, and the warnings of other packages that must not become errors."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

try:
    from xdist.scheduler import LoadScopeScheduling
except ImportError:  # benchmarks/gpu.sh does not need pytest-xdist
    LoadScopeScheduling = object

# Set before torch is imported: workers that share the cores are slower with several threads than with one. If the user
# has set the variable, it stays.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.cifar10 import fake_cifar10, real_cifar10  # noqa: F401
from tests.large_steps import ANY_RATE, LARGE_STEPS
from tests.medical import fake_lgg, fake_pcam, real_lgg, real_pcam  # noqa: F401
from tests.processes import start_autograd

# Each worker holds torch, Lightning and the data of its tests.
MOST_WORKERS = 8

GROUPS = pytest.StashKey[Path]()

THIRD_PARTY = (
    # Lightning 2.6 with torch 2.15.
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    # torchvision, when it unpacks CIFAR-10's archive on Python 3.12 and 3.13.
    "ignore:Python 3.14 will, by default, filter extracted tar archives:DeprecationWarning",
    # torch.compile, only on Python 3.13.0.
    r"ignore:Guards may run slower on Python 3\.13\.0:RuntimeWarning",
    # On machines with more than two CPU cores: data in memory does not need workers.
    r"ignore:The '\w+_dataloader' does not have many workers",
    # On machines with fewer CPU cores than a test has workers.
    r"ignore:This DataLoader will create \d+ worker processes in total",
    # LightningCLI's own calls.
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    # On machines with a GPU: tests choose the CPU.
    r"ignore:GPU available but not used",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadgroup = False  # pytest-xdist would append groups to ids: see GroupScheduling
    for warning in THIRD_PARTY:
        config.addinivalue_line("filterwarnings", warning)
    start_autograd()


def named_files(config: pytest.Config) -> set[Path]:
    """Return the files that the command line names, alone or in the ids of tests."""
    paths = (Path(config.invocation_params.dir, str(argument).split("::")[0]) for argument in config.args)
    return {path.resolve() for path in paths if path.is_file()}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return the number of workers for ``-n auto``, or 0 if the tests should run in this process."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None  # pytest-xdist reads it
    paths = [Path(config.invocation_params.dir, str(argument).split("::")[0]) for argument in config.args]
    # Workers would not report a path that does not exist.
    if all(path.is_file() for path in paths) or not all(path.exists() for path in paths):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def pytest_report_header(config: pytest.Config) -> list[str]:
    expression = config.option.markexpr
    if expression:
        tier = f"what -m {expression!r} chooses; python -m pytest alone runs the default tier"
    else:
        tier = "default, and all of a file that is named; python -m pytest -m full runs the long tests"
    return [f"tier: {tier}", *(f"not tested: {what}" for what in missing())]


def missing() -> Iterator[str]:
    """Yield what this machine lacks, and how to have its tests run."""
    if not os.environ.get("ZNORM_DATA"):
        yield "real data: set ZNORM_DATA to a folder with cifar10, lgg-mri-segmentation and pcam"
    if not importlib.util.find_spec("ray"):
        yield "Ray: python -m pip install '.[ray]'"
    if not torch.cuda.is_available():
        yield "a GPU: it takes a CUDA device, and a torch that was built for it"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.markexpr:
        choose_default_tier(config, items)
    for item in items:
        if item.path.parent.name in ANY_RATE:
            item.add_marker(pytest.mark.filterwarnings(f"ignore:.*{LARGE_STEPS}"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and a torch that was built for it"))


def choose_default_tier(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of the full tier, except in files that the command line names."""
    named = named_files(config)
    left_out = [item for item in items if item.get_closest_marker("full") and item.path.resolve() not in named]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        out = set(left_out)
        items[:] = [item for item in items if item not in out]


def group_of(item: pytest.Item) -> str:
    """Return the name of the group of tests that one worker runs, one after the other.

    The group is the file, so that its fixtures are made once. A long test that shares no fixture is a group of its own.
    """
    if mark := item.get_closest_marker("xdist_group"):
        return str(mark.args[0] if mark.args else mark.kwargs["name"])
    if item.get_closest_marker("full") and not shares_fixtures(item):
        return item.nodeid
    return item.nodeid.split("::")[0]


def shares_fixtures(item: pytest.Item) -> bool:
    """Return whether a fixture of this project lives longer than the test."""
    used: dict[str, Iterable[Any]] = item._fixtureinfo.name2fixturedefs
    # Fixtures of pytest and of its plugins have no base id.
    return any(fixture.baseid and fixture.scope != "function" for fixtures in used.values() for fixture in fixtures)


# pytest-xdist 3.8 appends the groups to the tests' ids, by a private name which pytest 9.2 ignores. Here each worker
# writes its groups into a file, before it reports that it has collected the tests.
class GroupScheduling(LoadScopeScheduling):
    """``--dist loadgroup``: distribute tests by :func:`group_of`."""

    @cached_property
    def groups(self) -> dict[str, str]:
        written = next(self.config.stash[GROUPS].glob("*.json"))
        groups: dict[str, str] = json.loads(written.read_text(encoding="utf-8"))
        return groups

    def _split_scope(self, nodeid: str) -> str:
        return self.groups[nodeid]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling | None:
    return GroupScheduling(config, log) if config.getoption("dist") == "loadgroup" else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    if GROUPS not in node.config.stash:
        node.config.stash[GROUPS] = Path(tempfile.mkdtemp(prefix="groups-"))
        node.config.add_cleanup(lambda: shutil.rmtree(node.config.stash[GROUPS]))
    node.workerinput["groups"] = str(node.config.stash[GROUPS] / f"{node.workerinput['workerid']}.json")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if file := getattr(session.config, "workerinput", {}).get("groups"):
        groups = {item.nodeid: group_of(item) for item in session.items}
        Path(file).write_text(json.dumps(groups), encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[None]:
    """Let workers send every log text of a test: pytest-xdist fails at a text that is not UTF-8."""
    return in_utf_8((yield))


def in_utf_8(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(data, dict):
        return {key: in_utf_8(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(in_utf_8(value) for value in data)
    return data
