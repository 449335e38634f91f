"""An environment that holds what some packages need, and nothing else: their files, or names that may be imported."""

from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(*requirements: str) -> dict[str, Distribution]:
    """Return the installed distributions that are needed, directly or not, by their canonical names."""
    found: dict[str, Distribution] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(each) for each in requirements]
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in done:
            continue
        done.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # an extra that is not installed
            continue
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append(needed)
    return found


def import_names(distributions: Iterable[str]) -> set[str]:
    """Return the names under which distributions are imported."""
    wanted = set(distributions)
    return {
        name
        for name, owners in packages_distributions().items()
        if wanted & {canonicalize_name(each) for each in owners}
    }


def link(distributions: Iterable[Distribution], site: Path) -> None:
    """Link the files of installed distributions into an empty ``site-packages``.

    Whole folders are linked where only these distributions have files in them, and single files elsewhere: other
    packages may have theirs in a namespace such as ``nvidia``.
    """
    chosen = {canonicalize_name(each.metadata["Name"]): each for each in distributions}
    owners = packages_distributions()
    for each in chosen.values():
        for file in each.files or ():
            if file.parts[0] in ("..", "__pycache__", "/"):
                continue
            is_whole = {canonicalize_name(owner) for owner in owners.get(file.parts[0], ())} <= {*chosen}
            parts = file.parts[:1] if is_whole else file.parts
            source, target = Path(str(each.locate_file(Path(*parts)))), site.joinpath(*parts)
            if source.exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)
