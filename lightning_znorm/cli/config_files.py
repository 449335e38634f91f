"""Config files: where they are found, what they set, and in which order they are applied."""

import difflib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from lightning_znorm.cli.program import program
from lightning_znorm.errors import ZNormFileNotFoundError, ZNormValueError

_PACKAGE = Path(__file__).parents[1]
_STDIN = "-"


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file of settings, as it was when it was read.

    Args:
        name: The name that the user gave.
        path: Where the file was found.
        settings: The value of each dotted key, such as ``trainer.max_epochs``. A key that ends in ``+`` appends.
        content: The same settings, nested as in the file.
        text: The text of the file.
        is_stream: Whether the file can be read only once, like a pipe.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    content: dict[str, Any]
    text: str
    is_stream: bool

    @property
    def is_experiment(self) -> bool:
        """Whether the file says what is trained or on what: it names the class of the model or of the data.

        A method may do so too, and is no experiment.
        """
        return not self.is_method and any(
            self.settings.get(key) for key in ("model", "model.class_path", "data", "data.class_path")
        )

    @property
    def is_method(self) -> bool:
        """Whether the file lies in a folder named ``methods``, and so is applied to experiments."""
        return self.path.parent.name == "methods"

    @property
    def callbacks(self) -> list[str]:
        """Class paths of the callbacks that the file names."""
        listed = [self.settings.get(key) or [] for key in ("trainer.callbacks", "trainer.callbacks+")]
        entries = [entry for value in listed for entry in (value if isinstance(value, list) else [value])]
        return [str(entry.get("class_path") if isinstance(entry, dict) else entry) for entry in entries]


def shipped_configs() -> list[str]:
    """Return the names of the config files in the package, such as ``configs/methods/znorm.yaml``."""
    root = _shipped_root()
    return sorted(path.relative_to(root).as_posix() for path in (root / "configs").rglob("*.yaml"))


def read_config(name: str) -> ConfigFile:
    """Read a config file from disk or, if there is none of this name, from the package.

    The file is read once, in UTF-8 on every system. The name ``-`` stands for standard input.

    Args:
        name: A path, the name of a file in the package, or ``-``.

    Raises:
        FileNotFoundError: If the file is in neither place.
        ValueError: If the file is not a YAML mapping.
    """
    path = _find(name)
    raw = b""
    try:
        raw = sys.stdin.buffer.read() if name == _STDIN else path.read_bytes()
        text = raw.decode("utf-8-sig")  # editors on Windows may write a byte order mark
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ZNormValueError(f"{name} is not valid YAML{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ZNormValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        position = f"line {raw.count(10, 0, error.start) + 1}, byte 0x{raw[error.start]:02x}"
        raise ZNormValueError(f"{name} is not text in UTF-8 ({position}): save it in UTF-8.") from error
    except OSError as error:
        raise ZNormValueError(f"{name} cannot be read: {error.strerror}") from error
    except (RecursionError, ValueError, TypeError) as error:  # PyYAML raises them, for example for an impossible date
        raise ZNormValueError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ZNormValueError(f"{name} holds no settings: write `key: value` lines into it (`trainer: {{}}` for none).")
    try:
        _check_keys(name, content)
        named = _named(content)
    except RecursionError:
        raise ZNormValueError(f"{name} holds settings within themselves, or nested too deeply.") from None
    if not isinstance(content.get("trainer", {}), dict):
        raise ZNormValueError(f"{name} has trainer: {content['trainer']!r}, and `key: value` lines are expected there.")
    if named != content:  # jsonargparse reads whole numbers from texts, and fails on others in its own messages
        content, text = named, yaml.safe_dump(named, sort_keys=False)
    return ConfigFile(name, path, dotted(content), content, text, is_stream(name))


def is_stream(name: str) -> bool:
    """Return whether a file can be read only once: standard input, or a pipe such as ``<(...)`` makes."""
    return name == _STDIN or (os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name))


def check_streams(streams: Sequence[str], processes: int) -> None:
    """Refuse settings from a pipe if several processes would each read a part of them, or nothing.

    Args:
        streams: Names of the config files that can be read only once.
        processes: The number of processes that read them.

    Raises:
        ValueError: If there are several processes.

    Example:
        >>> check_streams(["-"], processes=1)
    """
    if processes > 1:
        refuse_streams(streams, f"each of {processes} processes reads the settings")


def refuse_streams(streams: Sequence[str], readers: str) -> None:
    """Refuse settings from a pipe that several readers would need.

    Args:
        streams: Names of the config files that can be read only once.
        readers: Says who would read them more than once, for the message.

    Raises:
        ValueError: If there is such a file.
    """
    if streams:
        names = " and ".join(streams)
        raise ZNormValueError(f"{names} can be read only once, and {readers}: write a file, and name that.")


def dotted(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted keys.

    Args:
        content: The nested mappings.
        prefix: Comes before each key.

    Example:
        >>> dotted({"trainer": {"max_epochs": 2, "callbacks+": ["ZNormCallback"]}})
        {'trainer.max_epochs': 2, 'trainer.callbacks+': ['ZNormCallback']}
    """
    settings: dict[str, Any] = {}
    for key, value in content.items():
        # A callback may stand alone instead of in a list. It is one value all the same.
        if isinstance(value, dict) and key.removesuffix("+") != "callbacks":
            settings |= dotted(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value
    return settings


def in_order(files: Sequence[ConfigFile]) -> list[ConfigFile]:
    """Return files in the order in which they are applied: methods that are named before an experiment go behind it.

    A later file overrides an earlier one, and a plain ``callbacks:`` replaces the callbacks of earlier files. A method
    must not get lost without a word in this way, so a file that overrides one is refused.

    Args:
        files: All config files, as the user named them.

    Returns:
        The same files. All others keep their order, and so do the methods.

    Raises:
        ValueError: If a file is named twice, if a file that is neither an experiment nor a method is named before an
            experiment, or if a file overrides a method that is applied before it.
    """
    count = _count_to_last_experiment(files)
    first = list(files[:count])
    for i, file in enumerate(first):
        if not (file.is_experiment or file.is_method):
            experiment = next(later for later in first[i:] if later.is_experiment)
            right = sorted(files, key=lambda file: not file.is_experiment)
            raise ZNormValueError(
                f"{experiment.name} is an experiment and overrides what is named before it, {file.name}: name "
                f"experiments first, as in {' '.join(f'--config {shlex.quote(file.name)}' for file in right)}"
            )
    ordered = [*sorted(first, key=lambda file: file.is_method), *files[count:]]
    for i, later in enumerate(ordered):
        for earlier in ordered[:i]:
            if later.path == earlier.path:
                raise ZNormValueError(f"{later.name} is named twice: name it once.")
            if earlier.is_method:
                _refuse_override(earlier, later)
    return ordered


def describe_moves(files: Sequence[ConfigFile]) -> str:
    """Return a sentence that says which methods `in_order` moves behind experiments; empty if it moves none.

    Args:
        files: All config files, as the user named them.
    """
    count = _count_to_last_experiment(files)
    methods = [file.name for file in files[:count] if file.is_method]
    if not methods:
        return ""
    verb = "is" if len(methods) == 1 else "are"
    return f"{' and '.join(methods)} {verb} applied after {files[count - 1].name}, because methods go last."


def _count_to_last_experiment(files: Sequence[ConfigFile]) -> int:
    return max((number for number, file in enumerate(files, start=1) if file.is_experiment), default=0)


def check_callbacks(files: Iterable[ConfigFile], callbacks: Sequence[dict[str, Any]], methods: Iterable[str]) -> None:
    """Refuse a run that has lost a gradient method named in a file, or that applies one twice.

    Args:
        files: All config files.
        callbacks: The trainer's callbacks, each by its ``class_path`` and ``init_args``.
        methods: Class names of all gradient methods.

    Raises:
        ValueError: If a method is missing among the callbacks, or is there twice with the same arguments.
    """
    kept = [_class_name(callback["class_path"]) for callback in callbacks]
    for file in files:
        for name in map(_class_name, file.callbacks):
            if name in methods and name not in kept:
                raise ZNormValueError(
                    f"{name} of {file.name} is lost, because --trainer.callbacks replaces all callbacks: append with "
                    "--trainer.callbacks+= (in a file, `callbacks+:`)."
                )
    for i, name in enumerate(kept):
        if name in methods and callbacks[i] in callbacks[:i]:
            raise ZNormValueError(f"{name} is twice among the callbacks: name it once.")


class _Loader(yaml.SafeLoader):
    """A loader that refuses a key that stands twice in one mapping: YAML forbids it, and PyYAML drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue  # a merged key gives way to a written one
            if key.value in lines:
                problem = f"the key `{key.value}` is in line {lines[key.value]} already: merge the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _check_keys(name: str, value: Any, in_arguments: bool = False) -> None:
    """Refuse keys that are not texts, at any depth. YAML allows them. Values of arguments may have whole numbers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str) and not (in_arguments and type(key) is int):
                raise ZNormValueError(f"{name} has the key {key!r}, and settings have names: correct its spelling.")
            _check_keys(name, inner, in_arguments or key == "init_args")
    if isinstance(value, list):
        for inner in value:
            _check_keys(name, inner, in_arguments)


def _named(value: Any) -> Any:
    """Return settings with texts in place of whole numbers as keys."""
    if isinstance(value, dict):
        return {str(key): _named(inner) for key, inner in value.items()}
    return [_named(inner) for inner in value] if isinstance(value, list) else value


def _find(name: str) -> Path:
    if name == _STDIN:
        if sys.stdin is None:
            raise ZNormFileNotFoundError(f"No config file {name}: standard input is closed.")
        return Path("/dev/stdin")
    path = Path(name)
    if path.is_dir():
        raise ZNormValueError(f"{name} is a folder: name a config file in it.")
    if path.exists():
        return path.absolute()
    names = shipped_configs()
    if PurePath(name).as_posix() in names:
        return _shipped_root() / name
    nearest = difflib.get_close_matches(name, names)
    advice = f"did you mean {' or '.join(nearest)}?" if nearest else f"{program()} --help lists the latter."
    raise ZNormFileNotFoundError(f"No config file {name}, neither on disk nor in the package: {advice}")


def _shipped_root() -> Path:
    # An installed wheel has the files inside the package; the repository has them beside it.
    return _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


def _refuse_override(method: ConfigFile, later: ConfigFile) -> None:
    for key, value in later.settings.items():
        overridden = next((setting for setting in method.settings if _overrides(key, setting)), None)
        if overridden is None or (key == overridden and value == method.settings[key]):
            continue
        if overridden.endswith("+"):
            way_out = "write `callbacks+:` there, which appends"
        elif later.is_method:
            way_out = "name one of the two"
        else:
            way_out = f"leave it out there, and override it by --{key} if you mean to"
        raise ZNormValueError(
            f"{later.name} sets {key} and so undoes {method.name}, which is applied before it: {way_out}."
        )


def _overrides(key: str, earlier: str) -> bool:
    earlier = earlier.removesuffix("+")
    return earlier in (key, key.removesuffix(".class_path")) or earlier.startswith(f"{key}.")


def _class_name(class_path: str) -> str:
    return class_path.rpartition(".")[2]
