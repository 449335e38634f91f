"""The package's own errors: what they derive from, that all files raise them, and how the command line tells them."""

import ast
import builtins
import copy
import inspect
import pickle
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_znorm
from lightning_znorm import errors
from lightning_znorm.cli.error_sentences import is_bug, sentence
from lightning_znorm.cli.launchers import check_processes
from lightning_znorm.gradients import UnsupportedGradientError

PACKAGE = Path(lightning_znorm.__file__).parent
OWN = [value for value in vars(errors).values() if inspect.isclass(value)]
# Built-in exceptions that a room raises, and why.
BUILT_IN = {
    "lazy.py": {"AttributeError"},  # the protocol of a module's __getattr__
    "compare": {
        "KeyError",  # the protocol of a lookup
        "KeyboardInterrupt",  # an interruption is not an error
        "OSError",  # the system's own error, with the path of the file
    },
    "gradients": {"ImportError"},  # is caught in the same function
}


@pytest.mark.parametrize("error", OWN)
def test_users_catch_what_they_caught(error: type[Exception]) -> None:
    assert issubclass(error, errors.ZNormError)
    if error is not errors.ZNormError:
        built_in = getattr(builtins, error.__name__.removeprefix("ZNorm"))
        assert issubclass(error, built_in)
    made = error("what is wrong: the way out")
    for each in (made, copy.copy(made), pickle.loads(pickle.dumps(made))):
        assert type(each) is error
        assert str(each) == "what is wrong: the way out"


def test_other_errors_of_the_package_derive_from_them() -> None:
    assert issubclass(UnsupportedGradientError, errors.ZNormError)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and path != PACKAGE / "errors.py":
                assert not set(map(ast.unparse, node.bases)) & built_in_errors(), f"{path}: {node.name}"


def test_the_package_raises_its_own_errors() -> None:
    """A built-in exception would look like a bug to the command line."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        raised = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                raised.add(ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc))
        assert raised & built_in_errors() <= BUILT_IN.get(room, set()), path


def built_in_errors() -> set[str]:
    return {
        name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
    }


def caught(function, *args, **kwargs) -> BaseException:
    """The error of a call, as it comes from `main`: without a frame of this file."""
    with pytest.raises(BaseException) as info:  # noqa: PT011
        function(*args, **kwargs)
    info.value.__traceback__ = info.value.__traceback__.tb_next
    return info.value


class TestSentences:
    def test_our_own(self) -> None:
        error = caught(check_processes, {"WORLD_SIZE": "2"}, world_size=1)
        assert sentence(error) == str(error)
        assert not is_bug(error)

    def test_our_own_in_the_users_code(self) -> None:
        with pytest.raises(ValueError, match="2 processes") as info:
            check_processes({"WORLD_SIZE": "2"}, world_size=1)
        assert sentence(info.value) is None  # this file is at fault

    def test_a_bug_of_ours(self) -> None:
        error = caught(check_processes, {"WORLD_SIZE": "two"}, world_size=1)
        assert isinstance(error, ValueError)  # int() raises it, as a raise statement might
        assert sentence(error) is None
        assert is_bug(error)

    def test_of_lightning(self) -> None:
        error = caught(Trainer, strategy="none")
        assert isinstance(error, ValueError)
        assert sentence(error) == str(error)
        error = caught(Trainer, accelerator="cpu", limit_train_batches=-1)
        assert isinstance(error, MisconfigurationException)
        assert sentence(error) == str(error)

    def test_a_bug_under_lightning(self) -> None:
        """Lightning raises TypeError too, but so does Python, about what a user's hook returns."""
        error = caught(Trainer, accelerator="cpu", limit_val_batches="many")
        assert isinstance(error, TypeError)
        assert sentence(error) is None

    def test_without_a_traceback(self) -> None:
        assert sentence(errors.ZNormValueError("never raised")) is None

    @pytest.mark.parametrize("is_ours", [True, False])
    def test_what_another_process_raised(self, is_ours: bool) -> None:
        """torch raises the error of a DataLoader's process again, with a whole traceback for its message."""
        from torch._utils import ExceptionWrapper

        kind = errors.ZNormValueError if is_ours else ValueError
        try:
            raise kind("wrong file")
        except ValueError:
            wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
        error = caught(wrapper.reraise)
        assert isinstance(error, kind)
        assert "Traceback" in str(error)
        assert sentence(error) is None
