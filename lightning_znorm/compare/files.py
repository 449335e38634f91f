"""Small JSON files that are there as a whole or not at all, whenever a process dies."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file in place of an older one, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in place of an older one, if any."""
    write_text(path, json.dumps(content, indent=1))


def read_json(path: Path) -> Any:
    """Read a JSON file; ``None`` if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
