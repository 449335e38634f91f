"""What is said where a package is missing: which feature needs it, and the command that installs it.

The gradient callbacks need torch and lightning alone, so the package may be installed without its other dependencies
(``pip install --no-deps lightning-znorm``). Every feature that needs another package asks for it here, before work is
lost: when it is made, or when a run is set up.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_znorm.errors import ZNormImportError

DISTRIBUTIONS = {
    "PIL": "pillow",
    "docstring_parser": "docstring-parser",
    "sklearn": "scikit-learn",
    "typeshed_client": "typeshed-client",
    "yaml": "PyYAML",
}
"""Names under which packages are installed, by the names under which they are imported, where the two differ."""

EXTRAS = {"deepspeed": "deepspeed", "nibabel": "volumes", "ray": "ray", "shtab": "completion"}
"""The extra that installs a package, by the name under which it is imported. The others come without an extra."""

COMMAND = ("jsonargparse", "docstring_parser", "typeshed_client", "numpy", "yaml")
"""What the commands import, besides what torch and lightning need: the middle two make the help from docstrings."""

STUDY = (*COMMAND, "jinja2", "markupsafe", "matplotlib", "psutil", "rich", "scipy")
"""What a study imports."""


def missing(*packages: str) -> list[str]:
    """Return those of some packages that are not installed. None of them is imported.

    Args:
        *packages: Names under which they are imported.

    Example:
        >>> missing("torch", "no_such_package")
        ['no_such_package']
    """
    return [package for package in packages if not _is_installed(package)]


def require(feature: str, *packages: str) -> None:
    """Raise an error if a package is missing. None of them is imported.

    Args:
        feature: What needs them.
        *packages: Names under which they are imported.

    Raises:
        ImportError: If one of them is missing.

    Example:
        >>> require("MaskOverlay", "torch")
    """
    if absent := missing(*packages):
        try:
            importlib.import_module(absent[0])
        except ImportError as error:
            raise ZNormImportError(needs(feature, *absent)) from error


@contextmanager
def needed_by(feature: str) -> Iterator[None]:
    """Say which feature needs what cannot be imported within this context.

    Args:
        feature: What needs it.

    Raises:
        ImportError: If a package is missing, or another version of it is installed.

    Example:
        >>> with needed_by("A task"):
        ...     import no_such_package
        Traceback (most recent call last):
        lightning_znorm.errors.ZNormImportError: A task needs no_such_package, which cannot be imported: install it
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, ZNormImportError) or package in ("", "lightning_znorm"):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ZNormImportError(needs(feature, package)) from error
        raise ZNormImportError(
            f"{feature} cannot use the installed {_distribution(package)} ({error}): "
            f"{how_to_install(package) if is_ours(package) else 'install another version'}"
        ) from error


def needs(feature: str, *packages: str) -> str:
    """Return the sentence on a feature that needs packages.

    Example:
        >>> needs("VolumeDataModule", "monai", "nibabel")
        "VolumeDataModule needs monai and nibabel: pip install 'lightning-znorm[volumes]'"
    """
    *most, last = map(_distribution, packages)
    names = f"{', '.join(most)} and {last}" if most else last
    unreachable = "" if all(map(is_ours, packages)) else ", which cannot be imported"
    return f"{feature} needs {names}{unreachable}: {_way_out(*packages)}"


def how_to_install(*packages: str) -> str:
    """Return the command that installs packages of :func:`is_ours` in versions that this package works with.

    Example:
        >>> how_to_install("timm")
        'pip install lightning-znorm'
    """
    extras = ",".join(sorted({EXTRAS[package] for package in packages if package in EXTRAS}))
    return f"pip install 'lightning-znorm[{extras}]'" if extras else "pip install lightning-znorm"


def is_ours(package: str) -> bool:
    """Return whether the command of :func:`how_to_install` installs a package of this name, with what it needs.

    Example:
        >>> is_ours("monai"), is_ours("somebody_else")
        (True, False)
    """
    return package in _OURS


_REST = ("fsspec", "h5py", "lightning", "monai", "timm", "torch", "torchmetrics", "torchvision", "typing_extensions")
_OURS = {*STUDY, *EXTRAS, *DISTRIBUTIONS, *_REST}


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _way_out(*packages: str) -> str:
    if all(map(is_ours, packages)):
        return how_to_install(*packages)
    # Something that a package of ours, or the user's own code, imports: its name in the package index is unknown here.
    return "install it" if len(packages) == 1 else "install them"


def _distribution(package: str) -> str:
    return DISTRIBUTIONS.get(package, package)
