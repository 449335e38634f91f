"""What jsonargparse says of settings that it does not accept, in one sentence."""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lightning_znorm.cli.config_files import ConfigFile

_UNKNOWN = re.compile(r"(?:(?:Group '([^']+)'|Subcommand '[^']+') does not accept option|Option) '([^']+)'")
_SECTIONS = ("seed_everything", "model", "data", "trainer")
_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_VALUE = re.compile(r"(?:Got|Given) value: (.+?)(?=\. Got value: |$)", re.MULTILINE)
_CLASS_PATH = re.compile(r"^(?:Namespace\(|\{'?).*?\bclass_path'?[=:] ?'([^']+)'")
_TYPE = re.compile(
    r"Expected an? <class '(?P<type>[^']+)'>|Expected a typing.Literal\[(?P<values>.+)\]|"
    r"Not a valid subclass of (?P<base>\w+)"
)
_NOT_FOUND = re.compile(r"No module named '[^']+'|module '[^']+' has no attribute '[^']+'")
_NOT_NAMED = re.compile(r"Expected a dot import path string: (.+)")


def explained(message: str, files: Iterable[ConfigFile]) -> str:
    """Say in one sentence which setting is wrong, in which file, and why.

    Args:
        message: What jsonargparse says: where a setting is nested, a paragraph of all that it tried.
        files: All config files that were named.

    Returns:
        The sentence; the message itself, on one line, where it is of another kind.
    """
    files = list(files)
    found = list(_KEY.finditer(message))
    path = [match[1] for match in found]
    if unknown := _UNKNOWN.search(message):
        group, option = unknown.groups()
        section, _, inner = option.partition(".")
        parents = [*filter(None, [group]), *path]
        if section in _SECTIONS and inner and not parents:
            parents, option = [section], inner
        name = option.partition(".")[0]
        classes = _CLASS.findall(message)
        of = f", of {classes[-1]}," if classes and name not in _near_misses([name]) else ""
        advice = "" if parents else f"; a file's sections are {', '.join(_SECTIONS)}"
        where = _where(name, files, at_top=not parents)
        return f"there is no setting {'.'.join([*parents, name])}{of}{where}{advice}."
    if not found or not (value := _VALUE.search(message, found[-1].end())):
        return " ".join(message.split())
    if misspelt := next(_near_misses(key for file in files for key in _keys(file.settings)), None):
        return (
            f"{'.'.join(path)} has the key {misspelt}{_where(misspelt, files)}: class_path and init_args are expected."
        )
    reasons = message[found[-1].end() : value.start()]
    if "class_path" in value[1] and (not_found := _NOT_FOUND.search(reasons)):
        return f"{'.'.join(path)}{_where('class_path', files)} cannot be made: {not_found[0]}."
    if "class_path" in value[1] and (not_named := _NOT_NAMED.search(reasons)):
        return (
            f"{'.'.join(path)}{_where('class_path', files)} cannot be made: there is no class {not_named[1]} here, and "
            "others are named with their module, as in torch.optim.Adam."
        )
    class_path = _CLASS_PATH.search(value[1])
    given = f"{'.'.join(path)}{_where(path[-1].rpartition('.')[2], files)} is {(class_path or value)[1]}"
    expected = " or ".join(dict.fromkeys(map(_kind, _TYPE.finditer(reasons))))
    return f"{given}, and {expected} is expected." if expected else " ".join(message.split())


def _kind(expected: re.Match[str]) -> str:
    """What a setting should be, as YAML has it."""
    if values := expected["values"]:
        return f"one of {values}"
    if base := expected["base"]:
        return f"a {base} (class_path and init_args)"
    name = expected["type"].rpartition(".")[2]
    return "null" if name == "NoneType" else name


def _where(name: str, files: Iterable[ConfigFile], at_top: bool = False) -> str:
    """Which files have a key of this name; none if it was a flag."""
    found = []
    for file in files:
        keys = (key.partition(".")[0] for key in file.settings) if at_top else _keys(file.settings)
        if any(name in (key, key.removesuffix("+")) for key in keys):
            found.append(file.name)
    return f" ({', '.join(found)})" if found else ""


def _near_misses(keys: Iterable[str]) -> Iterator[str]:
    """Those that look like ``class_path`` or ``init_args``, and are neither."""
    for key in keys:
        if key not in ("class_path", "init_args") and difflib.get_close_matches(
            key, ["class_path", "init_args"], 1, 0.8
        ):
            yield key


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from str(key).split(".")
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)
