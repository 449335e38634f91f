"""The script that changes lines of the package: what it changes, and which tests it runs for each change."""

import random
from pathlib import Path

import pytest

from tests.mutants import (
    PACKAGE,
    REASONS,
    ROOMS,
    ROOT,
    Mutation,
    Result,
    choose_tests,
    failed_tests,
    find_mutations,
    imports,
    is_change,
    judge,
    main,
    package_mutations,
    package_sources,
    pytest_configure,
    render,
    room_of,
    row,
    sample,
    shares,
)

SEEDS = [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("x = a < b <= c", ["x = a <= b <= c", "x = a < b < c"]),
        ("x = (a) == (b)", ["x = (a) != (b)"]),
        ("x = a is b", ["x = a is not b"]),
        ("x = a is  not b", ["x = a is b"]),
        ("x = a not in b", ["x = a in b"]),
        ("x = a + b - c * d / e", ["x = a - b - c * d / e", "x = a + b + c * d / e",
          "x = a + b - c / d / e", "x = a + b - c * d * e"]),
        ("x += a", ["x -= a"]),
        ("x = a and b and not c", ["x = a or b and not c", "x = a and b or not c", "x = a and b and c"]),
        ("x = not (a or b)", ["x = (a or b)", "x = not (a and b)"]),
        ("x = [0, 1.5, -1, True, False]", ["x = [1, 1.5, -1, True, False]", "x = [0, 2.5, -1, True, False]",
          "x = [0, 1.5, -2, True, False]", "x = [0, 1.5, -1, False, False]", "x = [0, 1.5, -1, True, True]"]),
        ("call(a)  # why", ["pass  # why"]),
        ("x = a if b else c", ["x = a if not (b) else c"]),
        ("x = [a for a in b if c]", ["x = [a for a in b if not (c)]"]),
        ("if (found := call()): call", ["if (not (found := call())): call"]),
        ("if a == b: x", ["if a != b: x"]),
        ("if not a: x", ["if a: x"]),
        ("def f(): return a", ["def f(): return None"]),
        ("def f(a=None, *, b='x', c=True): return", ["def f(a=0, *, b='x', c=True): return",
          "def f(a=None, *, b=\"mutant\", c=True): return", "def f(a=None, *, b='x', c=False): return"]),
        ("x = 'ä' + f(a < b)", ["x = 'ä' + f(a <= b)"]),  # positions are in bytes
        ("@dataclass(frozen=True)\nclass A: x: int", ["@dataclass(frozen=False)\nclass A: x: int"]),
    ],
)  # fmt: skip
def test_changes_of_a_line(line: str, becomes: list[str]) -> None:
    found = find_mutations(line)
    assert sorted(render(line, mutation) for mutation in found) == sorted(becomes)
    assert [mutation.number for mutation in found] == list(range(1, len(found) + 1))
    assert all(is_change(line, mutation) for mutation in found)


@pytest.mark.parametrize(
    "source",
    [
        '"""A text: 1 < 2."""',
        "__all__ = ['a', 1]",
        "x: Literal[1, 2]",
        "def f(a: Literal[1]) -> Literal[True]: return",
        "def f(): return None",
        "if TYPE_CHECKING:\n    import a\n    x = 1",
        "if __name__ == '__main__':\n    main(1)",
        "raise ValueError(1 + 2)",
        "x = warn('text', stacklevel=2)",
        "x = log.info('text', 1)",
        "x = cast(1, a)",
        "x = f'{a + 1}'",
        "x = folder / 'name'",
        "x = 'a' + b",
        "x = None",
        "x = (a and\n     b)",  # more than one line
        "call(\n    a)",
    ],
)
def test_what_stays(source: str) -> None:
    assert find_mutations(source) == []


def test_other_lines_stay_to_the_byte() -> None:
    source = "a = 'ä'\r\nb = 1 \t\r\n\fc = 'ö'"
    (mutation,) = find_mutations(source, "file.py")
    assert render(source, mutation) == "a = 'ä'\r\nb = 2 \t\r\n\fc = 'ö'"
    assert mutation.id == "file.py:2.1"
    assert mutation.lines(source) == ("b = 1", "b = 2")


def test_what_changes_nothing_is_no_mutant() -> None:
    assert not is_change("x = a", Mutation("file.py", 1, 4, 5, "call", "(a)"))
    assert not is_change("x = a", Mutation("file.py", 1, 4, 5, "call", "if"))


@pytest.mark.full
@pytest.mark.parametrize("seed", SEEDS)
def test_a_sample_of_the_package(seed: int) -> None:
    drawn = sample(seed, 24)
    assert len({(mutation.file, mutation.line) for mutation in drawn}) == 24
    rooms = [room_of(mutation.file) for mutation in drawn]
    assert {*rooms} == {*ROOMS}
    assert min(rooms.count("gradients"), rooms.count("callbacks")) > 2
    for mutation in drawn:
        source = package_sources()[mutation.file]
        mutant = render(source, mutation)
        compile(mutant, mutation.file, "exec")
        pairs = zip(source.split("\n"), mutant.split("\n"), strict=True)
        assert [number for number, (old, new) in enumerate(pairs, 1) if old != new] == [mutation.line]
        tests = choose_tests(mutation)
        assert tests
        assert len({*tests}) == len(tests)
        assert all((ROOT / test).is_file() for test in tests)


@pytest.mark.full
def test_a_seed_is_a_list() -> None:
    first = [sample(seed, 24) for seed in SEEDS]
    assert [sample(seed, 24) for seed in SEEDS] == first
    assert len({tuple(drawn) for drawn in first}) == len(SEEDS)
    assert len(sample(0, 3)) == 3


def test_shares_of_rooms() -> None:
    sizes = dict.fromkeys(ROOMS, 100) | {"gradients": 1000}
    for count in (0, 1, 9, 10, 11, 24, 100):
        found = shares(sizes, count, random.Random(0))
        assert sum(found.values()) == count
        assert {*found} == {*ROOMS}
    assert min(shares(sizes, len(ROOMS), random.Random(0)).values()) == 1
    assert found["gradients"] > 3 * found["compare"]
    assert found["callbacks"] > found["compare"]


def in_module(file: str) -> Mutation:
    assert (ROOT / file).is_file()
    return Mutation(file, 1, 0, 0, "call", "")


@pytest.mark.full
def test_nearest_tests_come_first() -> None:
    tests = choose_tests(in_module("lightning_znorm/gradients/shards.py"))
    assert tests[0] == "tests/gradients/test_shards.py"
    assert tests.index("tests/gradients/test_amp.py") < tests.index("tests/test_cli.py")
    assert choose_tests(in_module("lightning_znorm/functional.py"))[0] == "tests/test_functional.py"
    tests = choose_tests(in_module("lightning_znorm/data/lgg.py"))
    assert tests[0] == "tests/data/test_lgg.py"
    assert "tests/gradients/test_amp.py" not in tests


@pytest.mark.full
def test_names_lead_to_where_they_are_defined() -> None:
    found = imports()
    assert found.resolve(PACKAGE, "ZNormCallback") == "lightning_znorm.callbacks.methods"
    assert found.resolve("lightning_znorm.gradients", "ZScore") == "lightning_znorm.gradients.methods"
    assert found.resolve("lightning_znorm.cli", "main") == "lightning_znorm.cli"
    # By a class path, by what it patches, and by a program that it starts.
    assert "lightning_znorm.callbacks.last_checkpoint" in found.tests["tests/compare/test_settings.py"]
    assert "lightning_znorm.compare.report" in found.tests["tests/compare/test_report.py"]
    assert "lightning_znorm.cli" in found.tests["tests/compare/test_paper.py"]
    assert "tests/processes.py" in found.helpers["tests/test_package.py"]
    assert "tests/callbacks/conftest.py" in found.helpers["tests/callbacks/test_lifecycle.py"]


def test_each_module_has_a_test_that_names_it_or_its_room() -> None:
    for file in package_sources():
        assert choose_tests(in_module(file)), file


@pytest.mark.parametrize(
    ("status", "output", "outcome", "by"),
    [
        (0, "tests/a.py::b PASSED\n=== 3 passed, 1 skipped in 1.23s ===\n", "survived", "3 passed, 1 skipped"),
        (None, "collecting ...", "timed out", "collection"),
        (None, "tests/a.py::b PASSED\ntests/c/d.py::e PASSED\n", "timed out", "file 2, tests/c/d.py"),
        (1, "FAILED tests/a.py::test[x y] - assert 1\n1 failed", "killed", "tests/a.py::test[x y]"),
        (2, "ERROR tests/a.py - ImportError: b\n", "killed", "tests/a.py"),
        (None, "FAILED tests/a.py::test\n", "killed", "tests/a.py::test"),
        (-11, "", "killed", "pytest itself, exit status -11"),
        (4, "ImportError while loading conftest 'tests/conftest.py'.", "killed", "pytest itself, exit status 4"),
    ],
)
def test_verdicts(status: int | None, output: str, outcome: str, by: str) -> None:
    assert judge(status, output) == (outcome, by)
    assert failed_tests(output) == ([by] if by.startswith("tests/") else [])


@pytest.mark.parametrize("status", [4, 5])
def test_a_run_without_tests_is_no_verdict(status: int) -> None:
    with pytest.raises(RuntimeError, match=f"pytest did not run, exit status {status}"):
        judge(status, "ERROR: unrecognized arguments")


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    (mutation,) = find_mutations("x = a | f(1)", "file.py")
    killed, survived = Result(mutation, "killed", "tests/a.py::test", 9.6), Result(mutation, "survived", "3 passed", 1)
    line = "| file.py:1.1 | `x = a \\| f(1)` | `x = a \\| f(2)` |"
    assert row(killed, "x = a | f(1)") == f"{line} tests/a.py::test | 10 |"
    assert row(survived, "x = a | f(1)") == f"{line} SURVIVED (3 passed): no reason known | 1 |"
    monkeypatch.setitem(REASONS, ("file.py", "x = a | f(1)", "x = a | f(2)"), "the same")
    assert row(survived, "x = a | f(1)") == f"{line} SURVIVED (3 passed): the same | 1 |"


def test_reasons_are_those_of_mutants() -> None:
    files = {file for file, _, _ in REASONS}
    known = {
        (found.file, *found.lines(package_sources()[found.file]))
        for found in package_mutations()
        if found.file in files
    }
    assert {*REASONS} <= known


@pytest.mark.full
def test_list_and_only(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sample(0, 2)
    assert main(["--list", "--only", first.id, second.id.rpartition(".")[0]]) == 0
    out = capsys.readouterr().out
    assert f"{first.id} {first.kind}\n" in out
    assert f"{second.id} {second.kind}\n" in out
    assert choose_tests(first)[0] in out
    with pytest.raises(SystemExit, match=r"there is no mutation nowhere\.py:1"):
        main(["--list", "--only", "nowhere.py:1"])


def test_the_plugin_refuses_another_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    pytest_configure(None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pytest.UsageError, match="is not in"):
        pytest_configure(None)
