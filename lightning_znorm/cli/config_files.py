"""Config files: where they are found, and what they set."""

import difflib
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file of settings.

    Args:
        name: As the user named it.
        path: Where it was found.
        settings: Value of each dotted key, such as ``trainer.max_epochs``; a key that ends in ``+`` appends.
    """

    name: str
    path: Path
    settings: dict[str, Any]

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

    Raises:
        FileNotFoundError: If it is in neither place.
        ValueError: If it is not a YAML mapping.
    """
    path = _find(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{name} is not valid YAML{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    except (RecursionError, ValueError, TypeError) as error:  # PyYAML's, of a date that is none, say
        raise ValueError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds no settings: write `key: value` lines into it (`trainer: {{}}` for none).")
    try:
        _check_keys(name, content)
    except RecursionError:
        raise ValueError(f"{name} holds settings within themselves, or nested too deeply.") from None
    if not isinstance(content.get("trainer", {}), dict):
        raise ValueError(f"{name} has trainer: {content['trainer']!r}, and `key: value` lines are expected there.")
    return ConfigFile(name, path, flatten(content))


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
                raise ValueError(f"{name} has the key {key!r}, and settings have names: see that it is spelt right.")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_keys(name, inner)


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path.absolute()
    names = shipped_configs()
    if PurePath(name).as_posix() in names:
        return _shipped_root() / name
    nearest = difflib.get_close_matches(name, names)
    advice = (
        f"did you mean {' or '.join(nearest)}?" if nearest else "python -m lightning_znorm --help lists the latter."
    )
    raise FileNotFoundError(f"No config file {name}, on disk or among those that come with the package: {advice}")


def _shipped_root() -> Path:
    # Inside the package where a wheel was installed, beside it in the repository.
    return _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
