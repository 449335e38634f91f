"""References to names of this package that have no entry in the reference, such as `lightning_znorm.batches`.

A docstring may name a module or a class that is not public: it is then shown as code. But it must exist: a misspelt
name remains a warning, which `python -m sphinx -W -n` turns into an error.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils import nodes

PACKAGE = "lightning_znorm"


def exists(name: str) -> bool:
    """Return whether a module, or an attribute of a module or of a class in it, has this full name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            annotated = part in getattr(found, "__annotations__", {})
            if not hasattr(found, part) and not annotated:
                return False
            found = getattr(found, part, None)
        return True
    return False


def as_code(app: Any, env: Any, node: nodes.Element, content: nodes.Element) -> nodes.Element | None:
    """Return the reference's text, if the name exists: in full, or in the module that is being described."""
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"])
    names = [target, f"{node.get('py:module')}.{target}"]
    return content if any(name.startswith(f"{PACKAGE}.") and exists(name) for name in names) else None


def setup(app: Any) -> dict[str, bool]:
    """Register the look-up, for names that the reference does not have."""
    app.connect("missing-reference", as_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
