"""The default tier and the full tier: their tests, the number of processes, and the scripts that run both tiers."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from tests import conftest
from tests.processes import run_python

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]

# A test file that stands for the tests of this package.
SAMPLE = """
import logging
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _witness(request):
    with Path(os.environ["WITNESS"]).open("a") as file:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "none")
        file.write(f"{request.node.nodeid} {worker} {torch.get_num_threads()}\\n")


@pytest.fixture(scope="module")
def shared():
    return 1


def test_short():
    logging.getLogger().warning(os.fsdecode(b"M\\xfcller"))


@pytest.mark.parametrize("text", ["a]@b", "::"])
def test_odd_names(text):
    pass


@pytest.mark.full
def test_long(tmp_path):
    pass


@pytest.mark.full
class TestLong:
    def test_sharing(self, shared):
        pass

    def test_alone(self, tmp_path_factory):
        pass


@pytest.mark.xdist_group("own")
def test_grouped():
    pass
"""
SHORT = ["test_short", "test_odd_names[a]@b]", "test_odd_names[::]", "test_grouped"]
LONG = ["test_long", "test_sharing", "test_alone"]
BOTH = sorted(SHORT + LONG)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with two test files, and this package's conftest.py."""
    (pytester.path / "checks/inner").mkdir(parents=True)
    for name in ("checks/test_outer.py", "checks/inner/test_inner.py"):
        (pytester.path / name).write_text(SAMPLE)
    (pytester.path / "checks/conftest.py").write_text("from tests.conftest import *")
    (pytester.path / "pytest.ini").write_text(
        "[pytest]\ntestpaths = checks\naddopts = -n auto --dist loadgroup -p no:cacheprovider --import-mode=importlib\n"
        "markers =\n    full: long\n    gpu: of a GPU\n"
    )
    monkeypatch.setenv("WITNESS", str(pytester.path / "witness"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return pytester


def collected(project: pytest.Pytester, *arguments: str) -> list[pytest.Item]:
    run = project.inline_run("--collect-only", "-q", "-n", "0", *arguments)
    (call,) = run.getcalls("pytest_collection_finish")
    return list(call.session.items)


@pytest.mark.parametrize(
    ("arguments", "outer", "inner"),
    [
        ([], SHORT, SHORT),
        (["checks/inner"], [], SHORT),
        (["checks/test_outer.py"], BOTH, []),
        (["checks/test_outer.py", "checks/inner"], BOTH, SHORT),
        (["checks/inner/test_inner.py::TestLong"], [], ["test_sharing", "test_alone"]),
        (["checks/test_outer.py::test_long", "checks/inner/test_inner.py::test_short"], ["test_long"], ["test_short"]),
        (["-m", "full"], LONG, LONG),
        (["-k", "sharing or short"], ["test_short"], ["test_short"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_is_chosen(project: pytest.Pytester, arguments: list[str], outer: list[str], inner: list[str]) -> None:
    items = collected(project, *arguments)
    for file, expected in (("test_outer.py", outer), ("test_inner.py", inner)):
        assert sorted(item.name for item in items if item.path.name == file) == sorted(expected)


def test_groups(project: pytest.Pytester) -> None:
    items = collected(project, "checks/test_outer.py")
    file = "checks/test_outer.py"
    assert {item.name: conftest.group_of(item) for item in items} == {
        **dict.fromkeys(SHORT, file),
        "test_sharing": file,  # its module's fixture
        "test_long": f"{file}::test_long",
        "test_alone": f"{file}::TestLong::test_alone",  # tmp_path_factory is not ours
        "test_grouped": "own",
    }


@pytest.mark.parametrize(
    ("arguments", "cores", "workers"),
    [
        ([], 3, 3),
        ([], 64, 8),
        (["-m", "full"], 3, 3),
        (["checks/inner"], 3, 3),
        (["checks/inner", "checks/test_outer.py"], 3, 3),
        (["checks/test_outer.py"], 3, 0),
        (["checks/inner", "checks/test_mistyped.py"], 3, 0),
        (["checks/test_outer.py::TestLong::test_alone", "checks/inner/test_inner.py"], 3, 0),
    ],
    ids=str,
)
def test_number_of_workers(
    project: pytest.Pytester, arguments: list[str], cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    assert conftest.pytest_xdist_auto_num_workers(project.parseconfig(*arguments)) == workers


def test_number_of_workers_of_the_environment(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "5")
    assert conftest.pytest_xdist_auto_num_workers(project.parseconfig()) is None


def test_header(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("ZNORM_DATA", raising=False)
    monkeypatch.setattr(conftest.importlib.util, "find_spec", lambda name: None)
    tier, data, ray, gpu = conftest.pytest_report_header(project.parseconfig())
    assert tier.startswith("tier: default")
    assert "pytest -m full" in tier
    assert "ZNORM_DATA" in data
    assert "'.[ray]'" in ray
    assert "CUDA" in gpu
    assert "'full'" in conftest.pytest_report_header(project.parseconfig("-m", "full"))[0]


@pytest.mark.full  # three processes import torch
def test_workers(project: pytest.Pytester) -> None:
    project.runpytest_subprocess("-n", "2", "-m", "full or not full", "-v", "-rP").assert_outcomes(passed=2 * len(BOTH))
    lines = [line.rsplit(" ", 2) for line in (project.path / "witness").read_text().splitlines()]
    assert {threads for _, _, threads in lines} == {os.environ.get("OMP_NUM_THREADS", "1")}
    workers = {nodeid: worker for nodeid, worker, _ in lines}
    assert set(workers.values()) == {"gw0", "gw1"}
    groups = {item.nodeid: conftest.group_of(item) for item in collected(project, "-m", "full or not full")}
    assert groups.keys() == workers.keys()  # the ids are those of tests, so that they can be run again
    pairs = {(groups[nodeid], worker) for nodeid, worker in workers.items()}
    assert len(pairs) == len(set(groups.values()))


@pytest.mark.full  # all tests are collected twice
def test_every_test_is_in_one_tier() -> None:
    def listed(*arguments: str) -> tuple[list[str], int]:
        """Return the tests of a tier, and the number of tests from which it chooses."""
        command = ("-m", "pytest", "--collect-only", "-q", "-n", "0", *arguments)
        run = run_python(*command, timeout=140, cwd=ROOT)
        assert run.returncode == 0, run.stdout
        ids, _, rest = run.stdout.partition("\n\n")
        (number,) = re.findall(r"^\d+/(\d+) tests collected", rest, flags=re.MULTILINE)
        return re.findall(r"^tests/.*::.*$", ids, flags=re.MULTILINE), int(number)

    (default, number), (full, same_number) = listed(), listed("-m", "full")
    assert default
    assert full
    assert not set(default) & set(full)
    assert len(default) + len(full) == number == same_number
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    collected = {nodeid.split("::")[0] for nodeid in (*default, *full)}
    assert collected <= files
    for file in files - collected:  # this machine lacks what the file needs
        assert re.search(r"^(\w+ = )?pytest\.importorskip\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_workflow_runs_what_is_run_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"].values()
    assert all(job["timeout-minutes"] for job in jobs)
    assert [command for job in jobs for command in commands(job)] == [".ci/run", ".ci/versions ${{ matrix.which }}"]
    versions = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {row["which"] for row in versions} == {"--oldest", "--newest"}
    assert all(os.access(ROOT / ".ci" / script, os.X_OK) for script in ("run", "versions"))


def test_all_checks_run_both_tiers() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert script.index("run_readme_block 2") < script.index("python -m pytest -m full")
    assert "-m 'full or not full' \"$@\"" in (ROOT / ".ci/versions").read_text(encoding="utf-8")


def test_slowest_tests_are_told() -> None:
    """The named tests exist. Whether they are still the slowest is not tested."""
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The ten slowest tests of each tier")[2]
    )
    named = re.findall(r"^\| `(tests/\w[\w/]*\.py)::([\w:]+)[^|]*` \| [\d.]+ \|$", section, flags=re.MULTILINE)
    assert len(named) == 20
    for file, test in named:
        assert f"def {test.split('::')[-1]}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"
