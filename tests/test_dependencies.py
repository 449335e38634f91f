"""Every package that lightning_znorm imports is declared in pyproject.toml, and every declared one is imported."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import lightning_znorm
from lightning_znorm import requirements

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PACKAGE = Path(lightning_znorm.__file__).parent
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

# Imported, and not declared: why.
NOT_DECLARED = {
    "triton": "comes with torch where there is a GPU that it works for, and other kernels do its work elsewhere",
}
# Declared, and not imported by name: why.
NOT_IMPORTED: dict[str, str] = {}
# Extras of developers, whose packages users never need.
DEVELOPERS = {"test", "dev", "docs"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(lines: list[str]) -> set[str]:
    """Return the names of distributions in a list of requirements."""
    return {canonical(re.split(r"[\[<>=!~; ]", line)[0]) for line in lines} - {"lightning-znorm"}


def declared() -> tuple[set[str], dict[str, set[str]]]:
    """Return the dependencies, and those of each extra of users."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = {extra: names(lines) for extra, lines in project["optional-dependencies"].items()}
    return names(project["dependencies"]), {extra: found for extra, found in extras.items() if extra not in DEVELOPERS}


def imported() -> dict[str, set[str]]:
    """Return the packages that the files import, in functions too, and the files."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            else:
                continue
            for package in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names:
                found.setdefault(package, set()).add(str(path.relative_to(PACKAGE)))
    del found["lightning_znorm"]
    return found


def owners(package: str) -> set[str]:
    """Return the distributions that an import comes from. One that is not installed has the name of its import."""
    return set(map(canonical, packages_distributions().get(package, [package])))


def all_declared() -> set[str]:
    needed, extras = declared()
    return needed.union(*extras.values())


def test_every_import_is_declared() -> None:
    known = all_declared()
    unknown = {package: files for package, files in imported().items() if not owners(package) & known}
    assert set(unknown) == set(NOT_DECLARED), unknown


def test_every_dependency_is_imported() -> None:
    used = set().union(*(owners(package) for package in imported()))
    assert all_declared() - used == set(NOT_IMPORTED)


def test_every_dependency_has_a_lower_bound_and_a_reason() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block
    lines = block[1].splitlines()
    assert len(lines) == len(declared()[0])
    without_reason = {"numpy"}  # all others follow it
    for line in lines:
        match = re.fullmatch(r'    "([\w-]+)(\[\w+\])?>=[\d.]+",( +# \w.*)?', line)
        assert match, line
        assert match[3] or match[1] in without_reason, line


@pytest.mark.parametrize("package", sorted(imported()))
def test_the_command_that_installs_it(package: str) -> None:
    """What an error tells the user to install brings the package along."""
    needed, extras = declared()
    name = canonical(requirements.DISTRIBUTIONS.get(package, package))
    extra = requirements.EXTRAS.get(package)
    if package in NOT_DECLARED:
        assert extra is None
    else:
        assert name in owners(package)
        assert name in (needed if extra is None else extras[extra])


def test_each_package_that_is_asked_for_is_imported() -> None:
    """So that no list of what a feature needs holds a package that is no longer used."""
    through_jsonargparse = {"docstring_parser", "typeshed_client"}
    known = {*imported(), *through_jsonargparse}
    asked = {*requirements.STUDY, *requirements.EXTRAS, *requirements.DISTRIBUTIONS}
    assert asked - known == set()
    brought = {"fsspec", "lightning", "torch", "torchmetrics", "typing_extensions"}  # by torch and lightning
    for package in known - set(NOT_DECLARED) - brought:
        assert requirements.is_ours(package), package
