"""Change single lines of the package, in a seeded sample, and check that tests of the default tier fail.

python -m tests.mutants [--seed 0] [--count 24] [--only ID ...] [--jobs 1] [--timeout 180] [--check] [--output FILE]
python -m tests.mutants --list [--seed 0] [--count 24] [--only ID ...]

A mutant is a copy of the working tree (all files that git tracks or does not ignore) in which one line of the package
is changed: see `find_mutations`. Each room of the package gets at least one mutant of the sample, if there are enough.
Gradients and callbacks get more mutants than in proportion to their lines. Within a room, every line that can be
changed is equally likely.

For each mutant, one pytest process runs the files that `choose_tests` names, nearest first, until a test fails. The
mutant is

- killed, if a test fails, cannot be collected, hangs, or ends the process,
- survived, if all tests pass,
- timed out, if no test has failed after --timeout seconds.

Test files that cannot be collected in the unchanged copy are left out, and named.

The script prints a table. It exits with 1 if a mutant survives or times out without a reason in `REASONS`; with
--check, also if a test that killed a mutant fails in the unchanged copy, too.
"""

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_znorm"
CLI = f"{PACKAGE}.cli"

# Rooms that get more of the sample than in proportion to their lines, and the factor.
ROOMS = {
    "gradients": 2,
    "callbacks": 2,
    "arguments": 1,
    "batches": 1,
    "functional": 1,
    "lazy": 1,
    "requirements": 1,
    "metrics": 1,
    "models": 1,
    "tasks": 1,
    "data": 1,
    "hyperparameters": 1,
    "compare": 1,
    "cli": 1,
}

# Mutants that no test kills because they are correct, too: (file, line, line in the mutant), lines stripped: reason.
REASONS: dict[tuple[str, str, str], str] = {
    (
        "lightning_znorm/tasks/targets.py",
        "for stage, of_ranks in zip(STAGES, by_stage, strict=True):",
        "for stage, of_ranks in zip(STAGES, by_stage, strict=False):",
    ): "the notes are made with one entry for each of STAGES, so that the lengths are the same",
}

# A test that takes longer hangs. Tests with a `timeout` marker keep their own limit.
SECONDS_OF_A_TEST = 100

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
NEGATIONS = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "/"),
    ast.Div: ("/", "*"),
}
MESSAGES = re.compile(r"(.*_)?(warn|warning|log|debug|info|error|exception|critical)")


@dataclass(frozen=True)
class Mutation:
    """A replacement of a part of one line. `start` and `end` are in bytes, as `ast` counts them."""

    file: str
    line: int
    start: int
    end: int
    kind: str
    text: str
    number: int = 0  # among the mutations of the line

    @property
    def id(self) -> str:
        """Id of the mutation, for --only."""
        return f"{self.file}:{self.line}.{self.number}"

    @property
    def module(self) -> str:
        """Dotted name of the module."""
        return self.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def lines(self, source: str) -> tuple[str, str]:
        """Return the line before and after the change, stripped."""
        line = source.encode().splitlines()[self.line - 1]
        return line.decode().strip(), (line[: self.start] + self.text.encode() + line[self.end :]).decode().strip()


def render(source: str, mutation: Mutation) -> str:
    """Return the source with the mutation; all other bytes stay the same."""
    lines = source.encode().splitlines(keepends=True)
    line = lines[mutation.line - 1]
    lines[mutation.line - 1] = line[: mutation.start] + mutation.text.encode() + line[mutation.end :]
    return b"".join(lines).decode()


def find_mutations(source: str, file: str = "<source>") -> list[Mutation]:
    """Find all mutations of a module, in the order of lines.

    - ``<`` and ``<=``, ``>`` and ``>=``, ``==`` and ``!=``, ``is`` and ``is not``, ``in`` and ``not in`` are exchanged,
      ``+`` and ``-``, ``*`` and ``/``, ``and`` and ``or``.
    - ``not x`` becomes ``x``, and the condition of an ``if`` is negated.
    - Numbers grow by one, True and False are exchanged, and default values become other values.
    - A function returns None instead of a value, or a call is removed whose value is not used.

    Code without an effect on behaviour is left out: annotations, ``__all__``, ``if TYPE_CHECKING``, ``if __name__``,
    the texts of errors, warnings and logs, and strings other than default values.
    """
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    numbers: dict[int, int] = defaultdict(int)
    found = []
    # By position, so that the mutations of a line are numbered from left to right.
    for line, start, end, kind, text in sorted(finder.found):
        numbers[line] += 1
        found.append(Mutation(file, line, start, end, kind, text, numbers[line]))
    return found


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.lines = source.encode().splitlines()
        self.found: list[tuple[int, int, int, str, str]] = []

    def visit_If(self, node: ast.If) -> None:
        names = {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}
        if names & {"TYPE_CHECKING", "__name__"}:
            self._visit_all(node.orelse)
            return
        self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self._negate(condition)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            self._exchange(left, right, *COMPARISONS[type(operator)], "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        # With strings and paths, any other operator is an error at once.
        if type(node.op) in ARITHMETIC and not any(map(_is_text, (node.left, node.right))):
            self._exchange(node.left, node.right, *ARITHMETIC[type(node.op)], "arithmetic")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC and not _is_text(node.value):
            self._exchange(node.target, node.value, *ARITHMETIC[type(node.op)], "arithmetic")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._exchange(left, right, old, new, "boolean")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._leave_not_out(node)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if (text := _other_number(node.value)) is not None:
            self._replace(node, text, "constant")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._replace(node, "return None", "return")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._replace(node, "pass", "call")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).split(".")[-1]
        if name == "cast":
            self._visit_all(node.args[1:])
        elif not MESSAGES.fullmatch(name):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_all([*node.decorator_list, node.args, *node.body])

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in [*node.defaults, *node.kw_defaults]:
            if not isinstance(default, ast.Constant):
                self._visit_all([default] if default else [])
            elif default.value is None:
                self._replace(default, "0", "default")
            elif isinstance(default.value, str):
                self._replace(default, '"mutant"', "default")
            elif (text := _other_number(default.value)) is not None:
                self._replace(default, text, "default")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._visit_all([node.value] if node.value else [])

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not (isinstance(node.value, ast.Name) and node.value.id == "Literal"):
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    # Before Python 3.12, positions in an f-string are not positions in the file.
    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def _negate(self, test: ast.expr) -> None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return  # visit_UnaryOp does so
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], NEGATIONS):
            return  # visit_Compare does so
        if test.lineno == test.end_lineno and test.end_col_offset is not None:
            text = self._text(test.lineno, test.col_offset, test.end_col_offset)
            self._replace(test, f"not ({text})", "condition")

    def _leave_not_out(self, node: ast.UnaryOp) -> None:
        if node.lineno == node.operand.lineno:
            # The parenthesis belongs neither to `not` nor to the operand, so it stays.
            between = self._text(node.lineno, node.col_offset, node.operand.col_offset)
            end = node.col_offset + len(between) - len(between.removeprefix("not").lstrip())
            self.found.append((node.lineno, node.col_offset, end, "not", ""))

    def _exchange(self, left: ast.expr, right: ast.expr, old: str, new: str, kind: str) -> None:
        """Change the operator between two operands; only parentheses can stand beside it."""
        if left.end_lineno != right.lineno or left.end_col_offset is None:
            return
        between = self._text(right.lineno, left.end_col_offset, right.col_offset)
        if match := re.search(old, between):
            # An augmented assignment keeps its "=".
            begin, end = (left.end_col_offset + offset for offset in match.span())
            self.found.append((right.lineno, begin, end, kind, new))

    def _replace(self, node: ast.expr | ast.stmt, text: str, kind: str) -> None:
        if node.lineno == node.end_lineno and node.end_col_offset is not None:
            self.found.append((node.lineno, node.col_offset, node.end_col_offset, kind, text))

    def _text(self, line: int, start: int, end: int) -> str:
        return self.lines[line - 1][start:end].decode()


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _other_number(value: object) -> str | None:
    if isinstance(value, bool):
        return str(not value)
    if not isinstance(value, int | float):
        return None
    return repr(value + 1 if value + 1 != value else value / 2)


def room_of(file: str) -> str:
    """Return the room of a file of the package. Modules without code to change count as a neighbour's."""
    room = file.split("/")[1].removesuffix(".py")
    return {"__init__": "cli", "__main__": "cli", "errors": "arguments"}.get(room, room)


@cache
def package_sources(root: Path = ROOT) -> Mapping[str, str]:
    """Return the package's modules, by their path in the repository."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    return {path.relative_to(root).as_posix(): _read(path) for path in paths}


def _read(path: Path) -> str:
    return path.read_bytes().decode()  # keeps the line endings


@cache
def package_mutations(root: Path = ROOT) -> Sequence[Mutation]:
    """Find the mutations of all modules."""
    return [found for file, source in package_sources(root).items() for found in find_mutations(source, file)]


def sample(seed: int, count: int, root: Path = ROOT) -> list[Mutation]:
    """Draw a number of mutations from each room, in which each line is equally likely."""
    sources = package_sources(root)
    lines: dict[str, dict[tuple[str, int], list[Mutation]]] = {room: {} for room in ROOMS}
    for mutation in package_mutations(root):
        lines[room_of(mutation.file)].setdefault((mutation.file, mutation.line), []).append(mutation)
    sizes = dict.fromkeys(ROOMS, 0)
    for file, source in sources.items():
        sizes[room_of(file)] += source.count("\n")
    drawn = []
    for room, number in shares(sizes, count, random.Random(seed)).items():
        # Each room has a generator of its own, so that a new line in another room does not change its sample.
        generator = random.Random(f"{seed} {room}")
        places = sorted(lines[room])
        generator.shuffle(places)
        valid = (
            mutation
            for place in places
            for mutation in [generator.choice(lines[room][place])]
            if is_change(sources[mutation.file], mutation)
        )
        drawn += [mutation for _, mutation in zip(range(number), valid, strict=False)]
    return drawn


def shares(sizes: Mapping[str, int], count: int, generator: random.Random) -> dict[str, int]:
    """Divide a sample among the rooms: one for each, if there are enough, and the rest by size and `ROOMS`."""
    if count < len(sizes):
        chosen = generator.sample(list(sizes), count)
        return {room: int(room in chosen) for room in sizes}
    weights = {room: size * ROOMS[room] for room, size in sizes.items()}
    exact = {room: (count - len(sizes)) * weight / sum(weights.values()) for room, weight in weights.items()}
    whole = {room: int(share) for room, share in exact.items()}
    rest = count - len(sizes) - sum(whole.values())
    larger = sorted(sizes, key=lambda room: whole[room] - exact[room])[:rest]
    return {room: 1 + whole[room] + (room in larger) for room in sizes}


def is_change(source: str, mutation: Mutation) -> bool:
    """Return whether the mutant compiles, and differs from the original."""
    mutant = render(source, mutation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about comparisons with constants
        try:
            compile(mutant, mutation.file, "exec")
        except (SyntaxError, ValueError):
            return False
        return ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(source))


class Imports:
    """Which modules of the package, and which test files, name which modules."""

    def __init__(self, root: Path = ROOT) -> None:
        self.sources = {_module(file): source for file, source in package_sources(root).items()}
        trees = {module: _nodes(source) for module, source in self.sources.items()}
        self.bindings = {
            module: {alias.asname or alias.name: (origin, alias.name) for origin, alias in _imports_from(tree)}
            for module, tree in trees.items()
        }
        self.package = {module: self._named(tree) for module, tree in trees.items()}
        self.tests: dict[str, set[str]] = {}
        self.helpers: dict[str, set[str]] = {}
        arguments: dict[str, set[str]] = {}
        paths = sorted((root / "tests").rglob("*.py"))
        files = {path.relative_to(root).as_posix() for path in paths}
        for path in paths:
            tree, file = _nodes(_read(path)), path.relative_to(root).as_posix()
            arguments[file] = {node.arg for node in tree if isinstance(node, ast.arg)}
            self.tests[file] = self._named(tree) | self._named_in_strings(tree)
            self.helpers[file] = _helpers(tree, file, files)
        # A conftest.py helps a test if an argument of the test is the name of a fixture.
        fixtures = {file: _definitions(root / file) for file in files if file.endswith("/conftest.py")}
        for file in files:
            folders = [folder.as_posix() for folder in Path(file).parents]
            above = {f"{folder}/conftest.py" for folder in folders} & {*fixtures} - {file}
            self.helpers[file] |= {name for name in above if fixtures[name] & arguments[file]}

    def resolve(self, module: str, name: str) -> str:
        """Return the module of the package that defines a name that another module exports."""
        if f"{module}.{name}" in self.sources:
            return f"{module}.{name}"
        origin, original = self.bindings.get(module, {}).get(name, ("", ""))
        return self.resolve(origin, original) if origin.split(".")[0] == PACKAGE and origin != module else module

    def distances(self, module: str) -> dict[str, int]:
        """Return all modules that import this one, directly or through others, with the number of steps."""
        distances = {module: 0}
        nearest = [module]
        while nearest:
            nearest = sorted(
                other for other, named in self.package.items() if other not in distances and named & {*nearest}
            )
            distances.update(dict.fromkeys(nearest, max(distances.values()) + 1))
        return distances

    @cache  # noqa: B019 - there is one object for each tree
    def named_by_helpers(self, file: str) -> set[str]:
        """Return the modules of the package that a test file names through the helpers in tests/ that it uses."""
        seen, left = {file}, [file]
        while left:
            new = self.helpers[left.pop()] - seen
            seen |= new
            left += new
        return {module for helper in seen - {file} for module in self.tests[helper]}

    def _named(self, tree: list[ast.AST]) -> set[str]:
        found = {self.resolve(module, alias.name) for module, alias in _imports_from(tree) if module in self.sources}
        for node in tree:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name in self.sources}
            elif isinstance(node, ast.Attribute) and (dotted := _dotted(node)).startswith(f"{PACKAGE}."):
                found |= self._of_dotted(dotted)
        return found

    def _named_in_strings(self, tree: list[ast.AST]) -> set[str]:
        """Return the modules in class paths, in names that monkeypatch sets, in programs and in commands."""
        found = set()
        for node in tree:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for dotted in re.findall(rf"{PACKAGE}(?:\.\w+)+", node.value):
                    found |= self._of_dotted(dotted)
                for module, names in re.findall(rf"from ({PACKAGE}[\w.]*) import ([\w, ]+)", node.value):
                    found |= {self.resolve(module, name) for name in re.findall(r"\w+", names)}
                if node.value == PACKAGE or f"-m {PACKAGE}" in node.value:
                    found.add(CLI)
        return found

    def _of_dotted(self, dotted: str) -> set[str]:
        """Return the module that a dotted name belongs to, and the module that defines it, if that is another."""
        module, rest = PACKAGE, dotted.split(".")[1:]
        while rest and f"{module}.{rest[0]}" in self.sources:
            module = f"{module}.{rest.pop(0)}"
        defined = self.resolve(module, rest[0]) if rest else module
        # A package re-exports names; a module uses them.
        is_package = any(other.startswith(f"{module}.") for other in self.sources)
        return {defined} if is_package else {module, defined}


def _module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _nodes(source: str) -> list[ast.AST]:
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute, ast.Constant, ast.arg)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def _imports_from(tree: Iterable[ast.AST]) -> Iterator[tuple[str, ast.alias]]:
    for node in tree:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias) for alias in node.names)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _helpers(tree: list[ast.AST], file: str, files: set[str]) -> set[str]:
    """Return the files of tests/ that a file imports or names, as ``tests.name``, ``name`` or ``name.py``."""
    names = {module for module, _ in _imports_from(tree)}
    names |= {f"{module}.{alias.name}" for module, alias in _imports_from(tree)}
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {*re.findall(r"\btests(?:\.\w+)+", node.value), *re.findall(r"^(\w+)\.py$", node.value)}
    folder = file.rpartition("/")[0]
    paths = {
        f"{before}{name.replace('.', '/')}.py" for name in names if name for before in ("", "tests/", f"{folder}/")
    }
    return (paths & files) - {file}


def _definitions(path: Path) -> set[str]:
    tree = ast.parse(_read(path))
    imported = {alias.asname or alias.name for _, alias in _imports_from(ast.walk(tree))}
    return imported | {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@cache
def imports(root: Path = ROOT) -> Imports:
    """Read once which modules and test files name which modules."""
    return Imports(root)


def choose_tests(mutation: Mutation, root: Path = ROOT) -> list[str]:
    """Name the test files that may notice a mutation, nearest first.

    A test file names a module if it imports the module, or an object that the module defines, or if a string in it has
    the module's dotted name. The room of a test is its folder, or is part of its name. The order is:

    1. Files that have the module's name, and name it or belong to its room.
    2. Files of its room that name it.
    3. Other files that name it.
    4. Files whose helpers in tests/ name it, first those of its room.
    5. Files of its room that reach it through the package's imports.
    6. Other files that name a module that names it.
    7. Files that run the command line, because settings reach everything through it.

    Among equals, files that name fewer modules come first: they are more likely to be about this module.
    """
    found = imports(root)
    distances = found.distances(mutation.module)
    room, far = room_of(mutation.file), 1000
    stem = mutation.module.split(".")[-1]
    order = []
    for file, named in found.tests.items():
        name = file.rpartition("/")[2].removesuffix(".py")
        if not name.startswith("test_") or name == "test_mutants":
            continue
        step = min((distances.get(module, far) for module in named), default=far)
        helped = min((distances.get(module, far) for module in found.named_by_helpers(file)), default=far)
        same_room = file.startswith(f"tests/{room}/") or (file.count("/") == 1 and room in name)
        tiers = (
            (same_room or step == 0) and f"_{stem}_" in f"{name}_",
            step == 0 and same_room,
            step == 0,
            helped == 0 and same_room,
            helped == 0,
            same_room and min(step, helped) < far,
            step == 1,
            CLI in named,
        )
        if any(tiers):
            order.append((tiers.index(True), step, len(named), file))
    return [file for *_, file in sorted(order)]


@dataclass(frozen=True)
class Result:
    """The result of a mutant: "killed", "survived" or "timed out"; the test that decided, and the seconds."""

    mutation: Mutation
    outcome: str
    by: str
    seconds: float


def copy_tree(target: Path, root: Path = ROOT) -> None:
    """Copy all files that git tracks or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # otherwise the file is deleted, and git does not know yet
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def pytest_configure(config: Any) -> None:
    """Refuse, in the pytest process, to test a package that is not the copy's; for ``pytest -p tests.mutants``."""
    import pytest

    import lightning_znorm

    for file in (lightning_znorm.__file__, __file__):
        if Path.cwd() not in Path(file).resolve().parents:
            raise pytest.UsageError(f"{file} is not in {Path.cwd()}")


def run_pytest(tree: Path, arguments: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """Run pytest in a copy; return its exit status, or None after a timeout, and its output.

    No process that it started is left: some have sessions of their own, but all inherit an environment variable.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-m", "not full", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-p", "tests.mutants", "--timeout", str(SECONDS_OF_A_TEST), "--basetemp", f"{tree}.tmp", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(tree), "ZNORM_MUTANT": str(tree)}
    log = Path(f"{tree}.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill_group(process.pid)
            process.wait()
            _kill_marked(tree)
    return status, log.read_text(errors="replace")


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _kill_marked(tree: Path) -> None:
    """Kill all processes that were started in a copy, or in any copy of a folder."""
    variable = f"ZNORM_MUTANT={tree}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # the process is gone, or another user's
            if any(entry.startswith(variable) for entry in path.read_bytes().split(b"\0")):
                os.kill(int(path.parent.name), signal.SIGKILL)


def failed_tests(output: str) -> list[str]:
    """Return the failed tests of pytest's summary, or the files that it could not collect."""
    return [line.split(" - ")[0] for line in re.findall(r"^(?:FAILED|ERROR) (tests/.*)$", output, re.MULTILINE)]


def judge(status: int | None, output: str) -> tuple[str, str]:
    """Return the result that pytest's exit status and output give, and the test that decided, or the last test."""
    if failed := failed_tests(output):
        return "killed", failed[0]
    if status is None:
        begun = list(dict.fromkeys(re.findall(r"^(tests/.*?\.py)::", output, re.MULTILINE)))
        return "timed out", f"file {len(begun)}, {begun[-1]}" if begun else "collection"
    if status == 0:
        return "survived", "".join(re.findall(r"^=+ (\d.*) in .*=$", output, re.MULTILINE))
    if status < 0 or status == 3 or "while loading conftest" in output or "+ Timeout +" in output:
        return "killed", f"pytest itself, exit status {status}"
    raise RuntimeError(f"pytest did not run, exit status {status}:\n{output[-3000:]}")


def find_broken(base: Path, tests: Iterable[str]) -> list[str]:
    """Return the test files that cannot be collected in the unchanged copy: they would kill any mutant."""
    status, output = run_pytest(base, ["--collect-only", *sorted({*tests})], 300)
    if status is None:
        raise RuntimeError(f"pytest collects for more than 300 s:\n{output[-3000:]}")
    return failed_tests(output)


def run_mutant(mutation: Mutation, base: Path, timeout: float, broken: Sequence[str] = ()) -> Result:
    """Run the tests that may notice a mutation, in a fresh copy without bytecode of an earlier mutant."""
    tree = Path(tempfile.mkdtemp(prefix="mutant-", dir=base.parent))
    try:
        shutil.copytree(base, tree, dirs_exist_ok=True)
        (tree / mutation.file).write_bytes(render(_read(base / mutation.file), mutation).encode())
        start = time.monotonic()
        tests = [file for file in choose_tests(mutation, base) if file not in broken]
        outcome, by = judge(*run_pytest(tree, ["-x", *tests], timeout))
        return Result(mutation, outcome, by, time.monotonic() - start)
    finally:
        for path in (tree, Path(f"{tree}.tmp")):
            shutil.rmtree(path, ignore_errors=True)


def reason(mutation: Mutation, source: str) -> str | None:
    """Return the reason why a mutant may survive, if there is one."""
    return REASONS.get((mutation.file, *mutation.lines(source)))


def row(result: Result, source: str) -> str:
    """Print a row of the table."""
    before, after = result.mutation.lines(source)
    said = result.by
    if result.outcome != "killed":
        said = f"{result.outcome.upper()} ({said}): {reason(result.mutation, source) or 'no reason known'}"
    cells = [result.mutation.id, f"`{before}`", f"`{after}`", said, f"{result.seconds:.0f}"]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def choose(args: argparse.Namespace, root: Path) -> list[Mutation]:
    """Return the mutations that the arguments select."""
    if not args.only:
        return sample(args.seed, args.count, root)
    every = package_mutations(root)
    for name in args.only:
        if not any(name in (found.id, found.id.rpartition(".")[0]) for found in every):
            raise SystemExit(f"error: there is no mutation {name}.")
    return [found for found in every if {found.id, found.id.rpartition(".")[0]} & {*args.only}]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sample, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--only", nargs="+", metavar="ID", help="FILE:LINE, or FILE:LINE.NUMBER, as the table has them")
    parser.add_argument("--jobs", type=int, default=1, help="mutants side by side")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each mutant")
    parser.add_argument("--check", action="store_true", help="run the tests that killed in the unchanged copy as well")
    parser.add_argument("--list", action="store_true", help="name the mutants and their test files, and run nothing")
    parser.add_argument("--output", type=Path, help="file for the table as well")
    args = parser.parse_args(arguments)
    if args.list:
        for mutation in choose(args, ROOT):
            before, after = mutation.lines(package_sources()[mutation.file])
            print(f"{mutation.id} {mutation.kind}\n  - {before}\n  + {after}\n  {' '.join(choose_tests(mutation))}")
        return 0
    with tempfile.TemporaryDirectory(prefix="znorm-", ignore_cleanup_errors=True) as folder:
        # All mutants use one state of the tree, even if files are edited meanwhile.
        base = Path(folder).resolve() / "base"
        copy_tree(base)
        return run_all(choose(args, base), base, args)


def run_all(mutations: Sequence[Mutation], base: Path, args: argparse.Namespace) -> int:
    """Run mutants, and print the row of each as soon as its result is known."""
    sources = package_sources(base)
    broken = find_broken(base, (test for mutation in mutations for test in choose_tests(mutation, base)))
    if broken:
        print(f"Left out, for they cannot be collected without a mutation either: {', '.join(broken)}\n", flush=True)
    table = ["| mutant | line | becomes | killed by | seconds |", "| --- | --- | --- | --- | --: |"]
    print(*table, sep="\n", flush=True)
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for result in pool.map(lambda mutation: run_mutant(mutation, base, args.timeout, broken), mutations):
                results.append(result)
                table.append(row(result, sources[result.mutation.file]))
                print(table[-1], flush=True)
        except BaseException:  # such as Ctrl-C: the pool waits for running mutants
            _kill_marked(base.parent)
            raise
    killed = [result for result in results if result.outcome == "killed"]
    left = [result for result in results if result.outcome != "killed"]
    unexplained = [result for result in left if reason(result.mutation, sources[result.mutation.file]) is None]
    lines = [
        "",
        f"Of {len(results)} mutants {len(killed)} were killed, in {sum(r.seconds for r in results):.0f} s "
        f"in all; {len(left)} were not, {len(unexplained)} of them without a reason.",
    ]
    without_mutation = []
    if args.check and (tests := sorted({result.by for result in killed if result.by.startswith("tests/")})):
        status, output = run_pytest(base, tests, 600)
        without_mutation = failed_tests(output)
        if status or without_mutation:
            lines += [f"In the unchanged copy (exit status {status}) these fail too:", *without_mutation]
            without_mutation = without_mutation or [str(status)]
        else:
            lines.append(f"In the unchanged copy all {len(tests)} tests that killed one pass.")
    print(*lines, sep="\n")
    if args.output:
        args.output.write_text("\n".join([*table, *lines]) + "\n", encoding="utf-8")
    return int(bool(unexplained or without_mutation))


if __name__ == "__main__":
    sys.exit(main())
