"""Run a program in which only some packages can be imported: ``python only.py PACKAGE,... PROGRAM [ARGUMENT ...]``.

The standard library can be imported, and lightning_znorm. Of the other packages, importlib.metadata knows nothing
either.
"""

import importlib.metadata
import re
import runpy
import sys
from collections.abc import Iterator
from typing import Any

ALLOWED = {*sys.argv[1].split(","), *sys.stdlib_module_names, "lightning_znorm", "__main__"}


class Only:
    """In place of all finders of modules: finds what they find, if it is allowed."""

    def __init__(self, finders: list[Any], owners: dict[str, list[str]]) -> None:
        self.finders = finders
        self.distributions = {_canonical(owner) for name in ALLOWED for owner in (*owners.get(name, ()), name)}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        package = name.partition(".")[0]
        if package not in ALLOWED and not package.startswith("_sysconfigdata"):  # a part of sysconfig
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, context: Any = importlib.metadata.DistributionFinder.Context()) -> Iterator[Any]:  # noqa: B008
        for finder in self.finders:
            for found in getattr(finder, "find_distributions", lambda _: ())(context):
                if _canonical(found.metadata["Name"] or "") in self.distributions:
                    yield found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    for name in [name for name in sys.modules if name.partition(".")[0] not in ALLOWED]:
        del sys.modules[name]  # such as what a .pth file has loaded
    sys.meta_path[:] = [Only(list(sys.meta_path), dict(importlib.metadata.packages_distributions()))]
    sys.argv[:] = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
