"""The resulting settings of a run, and how two of them differ."""

from typing import Any


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Key every value by its path.

    Example:
        >>> flatten({"trainer": {"max_epochs": 2, "callbacks": [{"class_path": "ZNormCallback"}]}})
        {'trainer.max_epochs': 2, 'trainer.callbacks[0].class_path': 'ZNormCallback'}
    """
    if isinstance(settings, dict) and settings:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list) and any(isinstance(value, dict) for value in settings):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(settings)]
    else:
        return {prefix: settings}
    return {path: value for key, inner in items for path, value in flatten(inner, key).items()}


def differences(one: Any, other: Any) -> list[tuple[str, str, str]]:
    """Paths at which two settings differ, with the value of each: ``-`` where there is none.

    Example:
        >>> differences({"lr": 0.1, "betas": [0.9]}, {"lr": 0.2, "betas": [0.9], "eps": 1})
        [('eps', '-', '1'), ('lr', '0.1', '0.2')]
    """
    a, b = flatten(one), flatten(other)
    return [(key, _shown(a, key), _shown(b, key)) for key in sorted({*a, *b}) if a.get(key, a) != b.get(key, b)]


def monitored(settings: dict[str, Any]) -> tuple[str, str] | None:
    """The metric by which the experiment's own `ModelCheckpoint` chooses, and its mode."""
    for callback in as_list(settings["trainer"].get("callbacks")):
        arguments = callback.get("init_args") or {}
        if arguments.get("monitor") and callback["class_path"].endswith("Checkpoint"):
            return str(arguments["monitor"]), str(arguments.get("mode", "min"))
    return None


def as_list(value: Any) -> list[dict[str, Any]]:
    """Objects in a setting that may hold one, several, none, or a switch."""
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, dict)]


def class_name(entry: dict[str, Any]) -> str:
    """Name of an object's class, without its module."""
    return str(entry["class_path"]).rpartition(".")[2]


def _shown(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "-"
