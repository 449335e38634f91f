"""Config files: where they are found, and what they set."""

import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from lightning_znorm.errors import ZNormFileNotFoundError, ZNormValueError

_PACKAGE = Path(__file__).parents[1]
_STDIN = "-"


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file of settings, as it was when it was read.

    Args:
        name: As the user named it.
        path: Where it was found.
        settings: Value of each dotted key, such as ``trainer.max_epochs``; a key that ends in ``+`` appends.
        content: The same, nested as it is written.
        text: All that it holds.
        is_stream: Whether it can be read only once, as a pipe.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    content: dict[str, Any]
    text: str
    is_stream: bool

    @property
    def is_experiment(self) -> bool:
        """Whether the file says what is trained or on what: it names the class of the model or of the data."""
        return any(self.settings.get(key) for key in ("model", "model.class_path", "data", "data.class_path"))

    @property
    def is_method(self) -> bool:
        """Whether the file is to be laid over experiments: it lies in a folder named ``methods``."""
        return self.path.parent.name == "methods"

    @property
    def callbacks(self) -> list[str]:
        """Class paths of the callbacks that the file names."""
        listed = [self.settings.get(key) or [] for key in ("trainer.callbacks", "trainer.callbacks+")]
        entries = [entry for value in listed for entry in (value if isinstance(value, list) else [value])]
        return [str(entry.get("class_path") if isinstance(entry, dict) else entry) for entry in entries]


def shipped_configs() -> list[str]:
    """Names of the config files that come with the package, such as ``configs/methods/znorm.yaml``."""
    root = _shipped_root()
    return sorted(path.relative_to(root).as_posix() for path in (root / "configs").rglob("*.yaml"))


def read_config(name: str) -> ConfigFile:
    """Read a config file from disk or, where there is none of this name, from those that come with the package.

    It is read once, in UTF-8 on every system. ``-`` is standard input.

    Raises:
        FileNotFoundError: If it is in neither place.
        ValueError: If it is not a YAML mapping.
    """
    path = _find(name)
    raw = b""
    try:
        raw = sys.stdin.buffer.read() if name == _STDIN else path.read_bytes()
        text = raw.decode("utf-8-sig")  # editors on Windows may begin a file with a mark of its encoding
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ZNormValueError(f"{name} is not valid YAML{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ZNormValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        place = f"line {raw.count(10, 0, error.start) + 1}, byte 0x{raw[error.start]:02x}"
        raise ZNormValueError(f"{name} is not text in UTF-8 ({place}): save it in UTF-8.") from error
    except OSError as error:
        raise ZNormValueError(f"{name} cannot be read: {error.strerror}") from error
    except (RecursionError, ValueError, TypeError) as error:  # PyYAML's, of a date that is none, say
        raise ZNormValueError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ZNormValueError(f"{name} holds no settings: write `key: value` lines into it (`trainer: {{}}` for none).")
    try:
        _check_keys(name, content)
    except RecursionError:
        raise ZNormValueError(f"{name} holds settings within themselves, or nested too deeply.") from None
    if not isinstance(content.get("trainer", {}), dict):
        raise ZNormValueError(f"{name} has trainer: {content['trainer']!r}, and `key: value` lines are expected there.")
    return ConfigFile(name, path, flatten(content), content, text, is_stream(name))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is twice in one mapping: to YAML it is an error, and PyYAML drops the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue  # what is merged in gives way to what is written
            if key.value in lines:
                problem = f"the key `{key.value}` is in line {lines[key.value]} already: merge the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def is_stream(name: str) -> bool:
    """Whether a file can be read only once: standard input, or a pipe such as ``<(...)`` makes."""
    return name == _STDIN or (os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name))


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Key the values of nested mappings by dotted keys.

    Example:
        >>> flatten({"trainer": {"max_epochs": 2, "callbacks+": ["ZNormCallback"]}})
        {'trainer.max_epochs': 2, 'trainer.callbacks+': ['ZNormCallback']}
    """
    settings: dict[str, Any] = {}
    for key, value in content.items():
        # A callback may stand alone, not in a list: it is one value all the same.
        if isinstance(value, dict) and key.removesuffix("+") != "callbacks":
            settings |= flatten(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value
    return settings


def _check_keys(name: str, value: Any) -> None:
    """Refuse keys that are no text, which YAML allows, throughout."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ZNormValueError(
                    f"{name} has the key {key!r}, and settings have names: see that it is spelt right."
                )
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_keys(name, inner)


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
    advice = (
        f"did you mean {' or '.join(nearest)}?" if nearest else "python -m lightning_znorm --help lists the latter."
    )
    raise ZNormFileNotFoundError(f"No config file {name}, on disk or among those that come with the package: {advice}")


def _shipped_root() -> Path:
    # Inside the package where a wheel was installed, beside it in the repository.
    return _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
