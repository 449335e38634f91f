"""Small files that are there as a whole or not at all, whenever a process dies; and what is read of them is checked."""

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import UnionType
from typing import Any

from lightning_znorm.errors import ZNormValueError

_SECONDS_TO_WRITE = 600
"""After which nobody is still writing a small file."""
_LEFTOVER = re.compile(r"\..+\.(json|yaml|csv|md|html)\.\d+")


class DamagedError(ZNormValueError):
    """A file that does not hold what was written into it; the message names it and says why.

    Args:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} is damaged: {self.reason}."


def write_text(path: Path, text: str) -> None:
    """Write a file in place of an older one, if any.

    Raises:
        OSError: With the path, if it cannot be written; nothing of it is left then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files may hold bytes that are no text.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a machine that loses power may keep the name and lose the content
        temporary.replace(path)
    except OSError as error:
        _discard(temporary)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        _discard(temporary)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in place of an older one, if any.

    Raises:
        OSError: With the path, if it cannot be written; nothing of it is left then.
    """
    write_text(path, json.dumps(content, indent=1))


def read_json(path: Path) -> Any:
    """Read a JSON file; ``None`` if there is none.

    Raises:
        DamagedError: If it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise DamagedError(path, "it is a folder") from error
    except UnicodeDecodeError as error:
        raise DamagedError(path, "it is not text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"it is no JSON ({error})" if text.strip() else "it is empty") from error
    if content is None:
        raise DamagedError(path, "it holds null")
    return content


def read_object(
    path: Path, needed: Mapping[str, type | UnionType], optional: Mapping[str, type | UnionType] | None = None
) -> dict[str, Any] | None:
    """Read a JSON file that holds an object; ``None`` if there is none.

    Args:
        path: The file.
        needed: Types of the values that must be there, by their keys.
        optional: Types of those that may be there.

    Raises:
        DamagedError: If it holds something else.
    """
    content = read_json(path)
    if content is None:
        return None
    if not isinstance(content, dict):
        raise DamagedError(path, f"it holds {_shown(content)}, where an object is expected")
    for key, kind in {**needed, **(optional or {})}.items():
        if key in content and not isinstance(content[key], kind):
            raise DamagedError(path, f"its {key} is {_shown(content[key])}")
        if key in needed and key not in content:
            raise DamagedError(path, f"it holds no {key}")
    return content


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that died while they wrote have left in a folder."""
    for path in folder.glob(".*"):
        if is_leftover(path):
            with suppress(FileNotFoundError):  # it has just taken its place
                if time.time() - path.stat().st_mtime > _SECONDS_TO_WRITE:
                    _discard(path)


def is_leftover(path: Path) -> bool:
    """Whether a file is one that `write_text` writes, and then puts in the place of another."""
    return bool(_LEFTOVER.fullmatch(path.name))


def numbered(path: Path) -> Path:
    """Add the first number to a path under which nothing is there, such as ``damaged-1``."""
    return next(found for i in count(1) if not (found := path.with_name(f"{path.name}-{i}")).exists())


def named(error: OSError, path: Path) -> OSError:
    """The same error with a path: the system names none where a file that is open cannot be written."""
    return error if error.filename else OSError(error.errno, error.strerror or str(error), str(path))


def said(error: OSError) -> str:
    """What the system says of a file, such as ``study.json: No space left on device``."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _discard(path: Path) -> None:
    with suppress(OSError):  # where nothing may be removed, it stays
        path.unlink(missing_ok=True)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
