"""Names that are imported on first use, so that each costs, and needs, no more than it uses itself.

The ``__init__.py`` of a room lists its names twice: for type checkers as ordinary imports, and for Python by
:func:`lazy_names`::

    if TYPE_CHECKING:
        from lightning_znorm.models.resnet import resnet20
    else:
        __getattr__, __dir__ = lazy_names(__name__, {"resnet": ["resnet20"]})

Where a package is missing that a name needs, the name raises
:class:`~lightning_znorm.errors.ZNormImportError`, which is no ``AttributeError``. So ``hasattr`` and
``inspect.getmembers`` of a room raise it too. This is chosen, because the reader must learn which package to install:
``from lightning_znorm.tasks import ClassificationTask`` turns an ``AttributeError`` into "cannot import name", and
``hasattr`` turns it into ``False``. ``dir`` and ``__all__`` list all names, and import nothing.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_znorm.requirements import needed_by


def lazy_names(
    package: str, names: Mapping[str, Iterable[str]], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the functions ``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    Args:
        package: The package, ``__name__``.
        names: The names that each of its modules defines.
        modules: Modules of the package that are imported on first use themselves.

    Example:
        >>> getattribute, _ = lazy_names("lightning_znorm.models", {"resnet": ["resnet20"]})
        >>> getattribute("resnet20").__module__
        'lightning_znorm.models.resnet'
    """
    where = {name: module for module, found in names.items() for name in found}
    submodules = frozenset(modules)

    def __getattr__(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with needed_by(name):
            value = getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        setattr(sys.modules[package], name, value)  # so that Python finds it without this function from now on
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where, *submodules})

    return __getattr__, __dir__
