"""One sentence in place of jsonargparse's message about settings that it does not accept."""

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lightning_znorm.cli.config_files import ConfigFile
from lightning_znorm.cli.error_sentences import describe_error
from lightning_znorm.cli.jsonargparse_messages import Fault, read_fault
from lightning_znorm.requirements import is_ours, needs

_OF_CLASSES = ("class_path", "init_args")
_SECTIONS = ("seed_everything", "model", "data", "trainer")
_UNKNOWN = re.compile(r"(?:(?:Group '([^']+)'|Subcommand '[^']+') does not accept option|Option) '([^']+)'")
_UNRECOGNIZED = "unrecognized arguments: "
_REQUIRED = "the following arguments are required: "
_WRONG_CLASS = re.compile(
    r"(?:Import path|Expected) '?(?P<path>[\w.]+?)?'? ?"
    r"(?:does not|to be a) (?:correspond to a subclass of|implement protocol|subclass of|function that returns|"
    r"class that instantiates into callable or a subclass of) "
    r"(?:<class '|(?:typing\.)?Union\[)?(?P<base>.+?)(?:'>|\])?\.*$"
)
_ATTRIBUTE = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
_TYPE_NAME = re.compile(r"[a-z_]\w*(?:\.\w+)*\.[A-Z]\w*")
_CLASS_PATHS = re.compile(r"\bclass_path'?[=:] ?'([^']+)'")
_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_LONGEST = 200
# Subclasses of these may be named without their module.
_BASES = (
    "lightning.pytorch.LightningModule",
    "lightning.pytorch.LightningDataModule",
    "lightning.pytorch.Callback",
    "lightning.pytorch.loggers.Logger",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
)


def explained(message: str, files: Iterable[ConfigFile], options: Collection[str] = ()) -> str:
    """Say in one sentence which setting is wrong, in which file, and why.

    Args:
        message: The message of jsonargparse. For a nested setting, it is a tree of all types that were tried.
        files: All config files.
        options: All flags of the command, such as ``--trainer.max_epochs``.

    Returns:
        The sentence; for a message of an unknown kind, the message itself on one line.
    """
    files = list(files)
    fault = read_fault(message)
    one_line = " ".join(message.split())
    if one_line.startswith(_UNRECOGNIZED):
        flag = one_line.removeprefix(_UNRECOGNIZED).split()[0].partition("=")[0]
        return one_line + _did_you_mean(flag, options)
    if unknown := _UNKNOWN.search(fault.reason):
        return _unknown(fault, unknown[1], unknown[2], files, options)
    if not fault.keys:
        if fault.reason.startswith(_REQUIRED):
            name = fault.reason.removeprefix(_REQUIRED).partition(".")[2]
            return f"{name} is required: name its class in a file (`{name}: {{class_path: ...}}`) or by --{name}."
        return one_line
    return _wrong(fault, files)


def class_settings(settings: dict[str, Any], class_type: type) -> list[tuple[str, str]]:
    """Find the settings that name a class. Return the dotted key of each, and the name.

    Args:
        settings: The settings of a command.
        class_type: The class.
    """
    named = ((path, value) for path, value in _nodes(settings) if isinstance(value, str))
    same_name = ((path, value) for path, value in named if value.endswith(class_type.__name__))
    return [(path, value) for path, value in same_name if _resolved(value) is class_type]


def where(path: str, value: str | None, files: Iterable[ConfigFile]) -> str:
    """Return which files hold a setting, in parentheses; an empty text if it was a flag.

    Args:
        path: Dotted key of the setting.
        value: The value to look for; for a class, its name. None stands for any value.
        files: All config files.
    """
    holders = []
    for file in files:
        for key, setting in _nodes(file.content):
            is_same = value is None or str(setting) == value or _class_name(setting) == _class_name(value) != ""
            # A file may name another file, which holds the nested settings.
            is_reference = isinstance(setting, str) and setting.endswith((".yaml", ".yml", ".json"))
            if (key == path and is_same) or (is_reference and path.startswith(f"{key}.")):
                holders.append(file.name if key == path else f"{setting} of {file.name}")
    return f" ({', '.join(dict.fromkeys(holders))})" if holders else ""


def _wrong(fault: Fault, files: Sequence[ConfigFile]) -> str:
    """Return a sentence on a setting that exists, and has a wrong value."""
    path = ".".join(fault.keys)
    groups = ((file, *node) for file in files for node in _nodes(file.content) if isinstance(node[1], dict))
    for file, key, group in groups:
        if f"{key}.".startswith(f"{path}.") and (message := _misshapen(group, f" ({file.name})")):
            return f"{key}{message}"
    for class_path in dict.fromkeys([fault.owner, *_CLASS_PATHS.findall(fault.value), *_bare_classes(fault)]):
        if failure := _failed_import(class_path, fault.reason):
            key = next(_keys_of(class_path, path, files), path)
            return f"{key}{where(key, class_path, files)} {failure}"
    if fault.kinds:
        verb = "holds" if fault.is_part else "is"
        origin = where(path, None if fault.is_part else fault.given, files)
        return f"{path}{origin} {verb} {_short(fault.given)}, and {' or '.join(fault.kinds)} is expected."
    if (name := fault.class_name) is not None:
        if known := next((cls for cls in _classes(_BASES) if cls.__name__ == name), None):
            full = f"{known.__module__}.{name}"
            return f"{path}{where(path, name, files)} is {full}, a class of another kind than is expected there."
        advice = (
            _did_you_mean(name, _class_names(_TYPE_NAME.findall(fault.types)))
            or _did_you_mean(name, _class_names(_BASES))
            or ", and others are named with their module, as in torch.optim.Adam."
        )
        return f"{path}{where(path, name, files)} cannot be made: there is no class {name} here{advice}"
    if missing := _ATTRIBUTE.search(fault.reason):
        advice = _did_you_mean(missing[2], dir(_resolved(missing[1]))) or "."
        name = fault.owner if f"{fault.owner}.".startswith(f"{missing[1]}.{missing[2]}.") else fault.given
        return f"{path}{where(path, name, files)} cannot be made: {missing[0]}{advice}"
    if wrong := _WRONG_CLASS.match(fault.reason):
        name = wrong["path"] or fault.given
        bases = [base.rpartition(".")[2] for base in wrong["base"].split(", ")]
        return f"{path}{where(path, name, files)} is {name}, {_nature(name, ' or '.join(bases))}."
    if fault.reason.startswith(_REQUIRED):
        lacking = fault.reason.removeprefix(_REQUIRED)
        for name in lacking.split(", "):
            set_in = [(file, value) for file in files for key, value in _nodes(file.content) if key == f"{path}.{name}"]
            if set_in:  # then the last file that names it has set it to null, or else a flag has
                origin = f" ({set_in[-1][0].name})" if set_in[-1][1] is None else ""
                return f"{path}.{name}{origin} is null, and {fault.owner} requires it."
        return f"{path}{where(path, fault.owner, files)} lacks {lacking}, which {fault.owner} requires."
    given = f"{where(path, fault.given, files)} is {_short(fault.given)}" if fault.given else ""
    return f"{path}{given}: {fault.reason.rstrip('.')}."


def _misshapen(spec: dict[str, Any], origin: str) -> str | None:
    """Return what is wrong with the form of class_path and init_args; None if the form is right or another one."""
    misspelt = [*_near_misses(spec)]
    if spec.keys() - {*_OF_CLASSES, *misspelt}:
        return None
    if misspelt:
        return f" has the key {misspelt[0]}{origin}: class_path and init_args are expected."
    class_path, arguments = spec.get("class_path", "a.class"), spec.get("init_args")
    if not isinstance(class_path, str) or not _PATH.fullmatch(class_path):
        return f".class_path{origin} is {class_path!r}, and the name of a class is expected, such as my_module.MyClass."
    if not isinstance(arguments, dict | None):
        return f".init_args{origin} is {arguments!r}, and `key: value` lines are expected there."
    return None


def _unknown(
    fault: Fault, group: str | None, option: str, files: Sequence[ConfigFile], options: Collection[str]
) -> str:
    """Return a sentence on a setting that does not exist."""
    section, _, inner = option.partition(".")
    parents = [*fault.keys, *filter(None, [group])]
    if section in _SECTIONS and inner and not parents:
        parents, option = [section], inner
    name = option.partition(".")[0]
    path = ".".join([*parents, name])
    origin = where(path.removesuffix("+"), None, files)
    if not parents:
        return f"there is no setting {path}{origin}; a file's sections are {', '.join(_SECTIONS)}."
    if next(_near_misses([name]), None):
        return f"there is no setting {path}{origin}: class_path and init_args are expected."
    known = [*_arguments(fault.owner)] if fault.owner else []
    known += [flag.removeprefix(f"--{parents[0]}.") for flag in options if flag.startswith(f"--{parents[0]}.")]
    of = f", of {fault.owner}" if fault.owner else ""
    return f"there is no setting {path}{of}{origin}{_did_you_mean(name, known) or '.'}"


def _nodes(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting and group of settings by its dotted key, as in a flag. A class has the key of its path."""
    if path:
        yield path, settings
    if isinstance(settings, dict):
        for key, value in settings.items():
            names = [path, *(name for name in key.removesuffix("+").split(".") if name not in _OF_CLASSES)]
            yield from _nodes(value, ".".join(filter(None, names)))
    elif isinstance(settings, list):
        for value in settings:
            yield from _nodes(value, path)


def _near_misses(keys: Iterable[str]) -> Iterator[str]:
    """Yield the keys that look like ``class_path`` or ``init_args``, and are neither."""
    for key in keys:
        if key not in _OF_CLASSES and difflib.get_close_matches(key, _OF_CLASSES, 1, 0.8):
            yield key


def _keys_of(class_path: str, within: str, files: Iterable[ConfigFile]) -> Iterator[str]:
    """Yield the dotted keys at which files name a class."""
    for file in files:
        for key, value in _nodes(file.content):
            if value == class_path and f"{key}.".startswith(f"{within}."):
                yield key


def _bare_classes(fault: Fault) -> list[str]:
    """Return the words that stand in place of a class, so that jsonargparse has tried to import them."""
    if not fault.reason or not any(map(_is_class, _TYPE_NAME.findall(fault.types))):
        return []
    words = [word.strip("'") for word in fault.given.strip("[]").split(", ")]
    return [word for word in words if _PATH.fullmatch(word)]


def _failed_import(class_path: str, reason: str) -> str | None:
    """Return why the module of a class cannot be imported; None if the fault has another reason."""
    module = class_path.rpartition(".")[0]
    if not _PATH.fullmatch(module):
        return None
    try:
        importlib.import_module(module)
    except Exception as error:  # the user's module may raise any exception
        if " ".join(str(error).split()) not in reason:
            return None
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            parent, _, name = error.name.rpartition(".")
            if is_ours(error.name):
                return f"is {class_path}, {needs('which', error.name)}"
            folders = getattr(_resolved(parent), "__path__", ()) if parent else None
            known = [each.name for each in pkgutil.iter_modules(folders)]
            return f"cannot be made: {error}{_did_you_mean(name, known, parent) or '.'}"
        return f"is {class_path}, and {module} cannot be imported: {describe_error(error)}."
    return None


def _resolved(path: str) -> Any:
    """Return the object that a dotted path names in an imported module; None if there is none."""
    names = path.split(".")
    for count in range(len(names), 0, -1):
        if module := sys.modules.get(".".join(names[:count])):
            resolved: Any = module
            for name in names[count:]:
                resolved = getattr(resolved, name, None)
            return resolved
    return None


def _nature(class_path: str, expected: str) -> str:
    """Return what a name stands for, in place of the class that is expected."""
    resolved = _resolved(class_path)
    if inspect.isclass(resolved):
        namesake = next((base for base in inspect.getmro(resolved) if base.__name__ == expected), None)
        if namesake:
            return f"which derives from {namesake.__module__}.{expected}, not from the {expected} that is expected"
        return f"a class that is no {expected}"
    if inspect.isroutine(resolved):
        return f"a function that is not annotated to return a {expected}"
    return f"{'a module' if inspect.ismodule(resolved) else f'of type {type(resolved).__name__}'}, and no {expected}"


def _class_name(value: Any) -> str:
    """Return the last part of a class path; an empty text for anything else."""
    return value.rpartition(".")[2] if isinstance(value, str) and _PATH.fullmatch(value) else ""


def _is_class(path: str) -> bool:
    """Return whether a path names a class that is instantiated from settings, not a type of Python's values."""
    return inspect.isclass(_resolved(path)) and path.partition(".")[0] not in (*sys.stdlib_module_names, "jsonargparse")


def _class_names(bases: Iterable[str]) -> list[str]:
    """Return the names of some classes and of all classes that derive from them."""
    return [subclass.__name__ for subclass in _classes(bases)]


def _classes(bases: Iterable[str]) -> Iterator[type]:
    return (subclass for path in bases if _is_class(path) for subclass in _subclasses(_resolved(path)))


def _subclasses(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _subclasses(subclass)


def _arguments(class_path: str) -> list[str]:
    """Return the names of a class's arguments, as jsonargparse finds them."""
    resolved = _resolved(class_path)
    if not callable(resolved):
        return []
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(resolved) else parser.add_function_arguments
    return list(add(resolved, fail_untyped=False))


def _did_you_mean(name: str, known: Iterable[str], parent: str = "") -> str:
    """Return the nearest names as the end of a sentence; an empty text if there is none."""
    lower: dict[str, str] = {}
    for candidate in known:
        lower.setdefault(candidate.lower(), candidate)
    nearest = difflib.get_close_matches(name.lower(), lower, 1, 0.75)
    if not nearest and len(name) > 2:
        nearest = [candidate for candidate in lower if candidate.startswith(name.lower())][:2]
    prefix = f"{parent}." if parent else ""
    return f": did you mean {' or '.join(prefix + lower[candidate] for candidate in nearest)}?" if nearest else ""


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
