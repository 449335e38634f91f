"""Which errors are the user's to read as a sentence, and which are bugs that need their traceback."""

import linecache
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# Through whose code an error may have passed on its way: anybody else's may be at fault, and is to be shown.
_OWN = {"lightning_znorm", "lightning"}
_PASSED = _OWN | {"contextlib", "jsonargparse", "torch"}
_SYSTEM = _PASSED | {"fsspec", "lightning_fabric", "torchvision"} | sys.stdlib_module_names
# Where no code of the user's lies.
_INSTALLED = ("site-packages", "dist-packages")
_STDLIB = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]


def sentence(error: BaseException) -> str | None:
    """What to tell the user in place of a traceback; None where the traceback is to be shown.

    A sentence is what this package or Lightning says in a ``raise`` statement, when no code of the user's own is on the
    way there; also when jsonargparse wrapped it into an error of its own. So is what the system says of a file or
    its name.

    Example:
        >>> sentence(ZeroDivisionError("a bug"))
    """
    for cause in _causes(error):
        if _raised_on_purpose(cause):
            return str(cause)
        if isinstance(cause, OSError) and cause.filename and cause.strerror and _packages(cause) <= _SYSTEM:
            return f"{cause.filename}: {cause.strerror}"
        if isinstance(cause, UnicodeEncodeError) and _packages(cause) <= _SYSTEM:
            return (
                f"{cause.object!a} cannot be written in the encoding of this system ({cause.encoding}): set the "
                "environment variable PYTHONUTF8=1, or choose another name."
            )
    return None


def raised(error: BaseException) -> str:
    """Say an error's type and message and, if the user's own code raised it or called what did, the file and line.

    Example:
        >>> raised(ZeroDivisionError("a bug"))
        'ZeroDivisionError: a bug'
    """
    message = " ".join(str(error).split())
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame)]
    if isinstance(error, SyntaxError) or not own:  # whose message names the place
        return said
    path = Path(own[-1].filename)
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{said} ({name}, line {own[-1].lineno})"


def own_traceback(error: BaseException) -> str:
    """Format the traceback of an error, and of what caused it, of the user's own code alone; empty if there is none."""
    if not any(map(_is_users, traceback.extract_tb(error.__traceback__))):
        return ""
    shown = traceback.TracebackException.from_exception(error)
    parts = [shown]
    for part in parts:
        part.stack = traceback.StackSummary.from_list([frame for frame in part.stack if _is_users(frame)])
        parts += filter(None, (part.__cause__, part.__context__))
    return "".join(shown.format())


def is_bug(error: BaseException) -> bool:
    """Whether this package's own code has failed, in other ways than by a ``raise`` statement, and called by nobody."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return _package(frame) == "lightning_znorm" and not _is_raise(frame, line) and not own_traceback(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _is_users(frame: traceback.FrameSummary) -> bool:
    """Whether it is neither Python's, nor of an installed package, nor of this one."""
    path = Path(frame.filename)
    libraries = (sys.modules[name].__file__ for name in _SYSTEM - sys.stdlib_module_names if name in sys.modules)
    folders = [*_STDLIB, *(Path(file).parent for file in libraries if file)]
    return not (
        frame.filename.startswith("<")
        or any(name in path.parts for name in _INSTALLED)
        or any(path.is_relative_to(folder) for folder in folders)
    )


def _packages(error: BaseException) -> set[str]:
    """Through whose code it has passed."""
    return {_package(frame) for frame, _ in traceback.walk_tb(error.__traceback__)}


def _package(frame: FrameType) -> str:
    return str(frame.f_globals["__name__"]).partition(".")[0]


def _raised_on_purpose(error: BaseException) -> bool:
    steps = list(traceback.walk_tb(error.__traceback__))
    if not steps or not _packages(error) <= _PASSED:
        return False
    frame, line = steps[-1]
    return _package(frame) in _OWN and _is_raise(frame, line)


def _is_raise(frame: FrameType, line: int) -> bool:
    return linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
