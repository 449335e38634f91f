"""The package's classes that settings may name without their module."""

import importlib

import lightning_znorm.data
import lightning_znorm.tasks

CLASSES = {
    "model": ("lightning_znorm.tasks", lightning_znorm.tasks.__all__),
    "data": ("lightning_znorm.data", lightning_znorm.data.__all__),
    "trainer.callbacks": ("lightning_znorm", lightning_znorm.__all__),
}
"""By setting: where its classes are, and their names, which are known without their import."""


def import_classes() -> None:
    """Import the public names of these rooms, because jsonargparse knows the names of imported classes only."""
    for room in ("callbacks", "data", "metrics", "models", "tasks"):
        package = importlib.import_module(f"lightning_znorm.{room}")
        for name in package.__all__:
            getattr(package, name)
