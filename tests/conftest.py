"""Fixtures, the two tiers, and warnings of others, which pytest's policy (all are errors) would turn into failures."""

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
except ImportError:  # benchmarks/gpu.sh does without pytest-xdist
    LoadScopeScheduling = object

# Before torch is imported: workers that share the cores are slower with more threads than with one. A user who sets the
# variable knows why.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.cifar10 import fake_cifar10, real_cifar10  # noqa: F401
from tests.medical import fake_lgg, fake_pcam, real_lgg, real_pcam  # noqa: F401

# Each worker holds torch, Lightning and the data of its tests.
MOST_WORKERS = 8

GROUPS = pytest.StashKey[Path]()

THIRD_PARTY = (
    # Lightning 2.6 with torch 2.15.
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    # torchvision unpacks CIFAR-10's archive, on Python 3.12 and 3.13.
    "ignore:Python 3.14 will, by default, filter extracted tar archives:DeprecationWarning",
    # torch.compile, on Python 3.13.0 alone.
    r"ignore:Guards may run slower on Python 3\.13\.0:RuntimeWarning",
    # Of machines with more than two CPU cores: workers would do nothing for data that is in memory.
    r"ignore:The '\w+_dataloader' does not have many workers",
    # Of machines with fewer CPU cores than a test has workers.
    r"ignore:This DataLoader will create \d+ worker processes in total",
    # LightningCLI's own calls.
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    # Of machines with a GPU: tests choose the CPU.
    r"ignore:GPU available but not used",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadgroup = False  # pytest-xdist would append groups to ids: see GroupScheduling
    for warning in THIRD_PARTY:
        config.addinivalue_line("filterwarnings", warning)


def named_files(config: pytest.Config) -> set[Path]:
    """Files that the command line names, by themselves or in the ids of tests."""
    places = (Path(config.invocation_params.dir, str(argument).split("::")[0]) for argument in config.args)
    return {place.resolve() for place in places if place.is_file()}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return the number of workers for ``-n auto``; none where all should happen in this very process."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None  # pytest-xdist reads it
    places = [Path(config.invocation_params.dir, str(argument).split("::")[0]) for argument in config.args]
    # Of a path that is not there, workers would say nothing.
    if all(place.is_file() for place in places) or not all(place.exists() for place in places):
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
    """What is not here, and how to have its tests run."""
    if not os.environ.get("ZNORM_DATA"):
        yield "real data: set ZNORM_DATA to a folder with cifar10, lgg-mri-segmentation and pcam"
    if not importlib.util.find_spec("ray"):
        yield "Ray: python -m pip install '.[ray]'"
    if not torch.cuda.is_available():
        yield "a GPU: it takes a CUDA device, and a torch that was built for it"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.markexpr:
        choose_default_tier(config, items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and a torch that was built for it"))


def choose_default_tier(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of the full tier, but of files that the command line names."""
    named = named_files(config)
    left_out = [item for item in items if item.get_closest_marker("full") and item.path.resolve() not in named]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        out = set(left_out)
        items[:] = [item for item in items if item not in out]


def group_of(item: pytest.Item) -> str:
    """Return the name of the group of tests that one worker runs, one after the other.

    It is the file, whose fixtures are then made once; a long test that shares none is better off alone.
    """
    if mark := item.get_closest_marker("xdist_group"):
        return str(mark.args[0] if mark.args else mark.kwargs["name"])
    if item.get_closest_marker("full") and not shares_fixtures(item):
        return item.nodeid
    return item.nodeid.split("::")[0]


def shares_fixtures(item: pytest.Item) -> bool:
    """Whether a fixture of ours lives longer than the test."""
    used: dict[str, Iterable[Any]] = item._fixtureinfo.name2fixturedefs
    # Those of pytest and of its plugins have no place of their own.
    return any(fixture.baseid and fixture.scope != "function" for fixtures in used.values() for fixture in fixtures)


# pytest-xdist 3.8 tells the groups to the process that hands out the tests by appending them to the tests' ids, by a
# private name which pytest 9.2 ignores. Here each worker writes them down, before it says that it has collected.
class GroupScheduling(LoadScopeScheduling):
    """``--dist loadgroup``: hand out tests by :func:`group_of`."""

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
    """Let workers send what a test has logged, whatever it is: pytest-xdist breaks off at a text that is not UTF-8."""
    return in_utf_8((yield))


def in_utf_8(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(data, dict):
        return {key: in_utf_8(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(in_utf_8(value) for value in data)
    return data
