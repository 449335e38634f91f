"""Users' code and YAML hold these names and parameters: if one goes, or changes position or default, a test fails.

`python -m tests.test_public_api` adds new names to tests/public_api.txt, so that later releases keep them.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("public_api.txt")
MODULES = [
    "lightning_znorm",
    "lightning_znorm.callbacks",
    "lightning_znorm.cli",
    "lightning_znorm.compare",
    "lightning_znorm.data",
    "lightning_znorm.errors",
    "lightning_znorm.functional",
    "lightning_znorm.gradients",
    "lightning_znorm.metrics",
    "lightning_znorm.models",
    "lightning_znorm.tasks",
]


def public(module: str) -> Iterator[str]:
    """Return a line for each name, and one for each parameter: with its position, unless it is keyword-only."""
    imported = importlib.import_module(module)
    for name in sorted(imported.__all__):
        value = getattr(imported, name)
        yield f"{module}.{name}"
        if inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, Exception)):
            for place, parameter in enumerate(inspect.signature(value).parameters.values()):
                text = re.sub(r" at 0x[0-9a-f]+", "", str(parameter.replace(annotation=inspect.Parameter.empty)))
                yield f"{module}.{name}  {'*' if parameter.kind is parameter.KEYWORD_ONLY else place}  {text}"


def lines() -> list[str]:
    return [line for module in MODULES for line in public(module)]


def test_nothing_has_disappeared() -> None:
    missing = [line for line in SNAPSHOT.read_text(encoding="utf-8").splitlines() if line not in set(lines())]
    assert missing == [], f"programs rely on these; if they must go, take them out of {SNAPSHOT.name}"


if __name__ == "__main__":
    old = SNAPSHOT.read_text(encoding="utf-8").splitlines() if SNAPSHOT.exists() else []
    SNAPSHOT.write_text("\n".join(sorted({*old, *lines()})) + "\n", encoding="utf-8")
    sys.stdout.write(f"{SNAPSHOT}\n")
