"""Which errors the user reads as one sentence, and which are bugs that need their traceback."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from lightning_znorm.errors import ZNormError

# Packages through whose code an error may pass on its way. Anybody else's code may be at fault, and the traceback shows
# it.
_PASSED = {"lightning_znorm", "lightning", "contextlib", "jsonargparse", "torch"}
_SYSTEM = _PASSED | {"fsspec", "lightning_fabric", "torchvision"} | sys.stdlib_module_names
# The built-in exceptions by which Lightning refuses settings. They are compared exactly: their subclasses, and others
# such as TypeError, AttributeError and KeyError, also come from bugs in the code that Lightning calls.
_REFUSALS = (FileNotFoundError, ImportError, ModuleNotFoundError, NotImplementedError, RuntimeError, ValueError)
# Folders of installed packages: no user's code lies there.
_INSTALLED = ("site-packages", "dist-packages")
_STDLIB = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]


def sentence(error: BaseException) -> str | None:
    """Return what to tell the user in place of a traceback; None if the traceback is to be shown.

    The user reads as a sentence: a `ZNormError` that this package raises, a refusal that Lightning raises, and what the
    system says of a file or its name. jsonargparse may have wrapped the error. If code of the user's own is on the way
    to the error, the traceback is shown.

    Args:
        error: The error that ended a command.

    Example:
        >>> sentence(ZeroDivisionError("a bug"))
    """
    for cause in _causes(error):
        if _is_refusal(cause):
            return str(cause)
        if isinstance(cause, OSError) and cause.filename and cause.strerror and _packages(cause) <= _SYSTEM:
            return f"{cause.filename}: {cause.strerror}"
        if isinstance(cause, UnicodeEncodeError) and _packages(cause) <= _SYSTEM:
            return (
                f"{cause.object!a} cannot be written in the encoding of this system ({cause.encoding}): set the "
                "environment variable PYTHONUTF8=1, or choose another name."
            )
    return None


def describe_error(error: BaseException) -> str:
    """Return an error's type and message. If it passed through the user's own code, add the last file and line there.

    Args:
        error: The error.

    Example:
        >>> describe_error(ZeroDivisionError("a bug"))
        'ZeroDivisionError: a bug'
    """
    message = " ".join(str(error).split())
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame)]
    if isinstance(error, SyntaxError) or not frames:  # the message of a SyntaxError names file and line itself
        return said
    path = Path(frames[-1].filename)
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{said} ({name}, line {frames[-1].lineno})"


def users_traceback(error: BaseException) -> str:
    """Format the user's own frames in the traceback of an error and of its causes; return "" if there are none.

    Args:
        error: The error.
    """
    if not any(map(_is_users, traceback.extract_tb(error.__traceback__))):
        return ""
    shown = traceback.TracebackException.from_exception(error)
    parts = [shown]
    for part in parts:
        part.stack = traceback.StackSummary.from_list([frame for frame in part.stack if _is_users(frame)])
        parts += filter(None, (part.__cause__, part.__context__))
    return "".join(shown.format())


def is_bug(error: BaseException) -> bool:
    """Return whether an error is a bug of this package: its own code failed, and no code of the user called it.

    Args:
        error: The error.
    """
    in_package = _package(_innermost(error)) == "lightning_znorm"
    return in_package and not isinstance(error, ZNormError) and not users_traceback(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_refusal(error: BaseException) -> bool:
    if error.__traceback__ is None or not _packages(error) <= _PASSED:
        return False
    package = _package(_innermost(error))
    # An error of a DataLoader's process comes from torch: its message is the text of a whole traceback.
    if package not in ("lightning_znorm", "lightning"):
        return False
    return isinstance(error, ZNormError) or _refused_by_lightning(error, package)


def _refused_by_lightning(error: BaseException, package: str) -> bool:
    if "lightning.pytorch" not in sys.modules:  # help and early refusals do not load it
        return False
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException) or (package == "lightning" and type(error) in _REFUSALS)


def _is_users(frame: traceback.FrameSummary) -> bool:
    """Return whether code is the user's: not Python's, not an installed package's and not this package's."""
    path = Path(frame.filename)
    libraries = (sys.modules[name].__file__ for name in _SYSTEM - sys.stdlib_module_names if name in sys.modules)
    folders = [*_STDLIB, *(Path(file).parent for file in libraries if file)]
    return not (
        frame.filename.startswith("<")
        or any(name in path.parts for name in _INSTALLED)
        or any(path.is_relative_to(folder) for folder in folders)
    )


def _packages(error: BaseException) -> set[str]:
    """Return the packages through whose code an error has passed."""
    return {_package(frame) for frame, _ in traceback.walk_tb(error.__traceback__)}


def _innermost(error: BaseException) -> FrameType:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame


def _package(frame: FrameType) -> str:
    return str(frame.f_globals["__name__"]).partition(".")[0]
