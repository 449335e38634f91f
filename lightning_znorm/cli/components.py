"""The parser, the Trainer and the callback that `lightning_znorm.cli.run.RunCLI` is made of."""

import argparse
import codecs
import locale
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from jsonargparse.typing import Path as Folder
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from typing_extensions import override

from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.cli.classes import import_classes
from lightning_znorm.cli.config_files import ConfigFile
from lightning_znorm.cli.help_format import HelpFormatter, in_order
from lightning_znorm.cli.parse_errors import explained
from lightning_znorm.errors import ZNormValueError

# What jsonargparse says above the arguments of a class.
_CLASS_HELP = re.compile(r"Help for --\S+=(\S+)")
# Lightning divides by these without a check.
_AT_LEAST_ONE = ("accumulate_grad_batches", "check_val_every_n_epoch")


class SaveConfig(SaveConfigCallback):
    """Save the resulting settings beside the logs. A run without a logger has no such folder, and saves nothing."""

    _folder = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the settings before the first step."""
        if trainer.loggers:
            self._folder = run_folder(trainer)  # every process must ask for it, and only one saves
            super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the settings in the first process, in UTF-8, as config files are read."""
        system = get_filesystem(self._folder)
        system.makedirs(self._folder, exist_ok=True)
        content = self.parser.dump(self.config, skip_none=False)
        with system.open(os.path.join(self._folder, self.config_filename), "w", encoding="utf-8") as file:
            file.write(content)


class Parser(LightningArgumentParser):
    """A parser that takes config files as they were read, and says in one sentence what is wrong with the settings."""

    files: Sequence[ConfigFile] = ()
    failures: list[tuple[type, Exception]]
    """Classes that could not be instantiated, and why."""
    titles: Mapping[str, str] = {}
    """Titles of groups of flags, by the names of the groups."""

    def __init__(self, *args: Any, usage: str | None = argparse.SUPPRESS, **kwargs: Any) -> None:
        # jsonargparse makes a parser for the help of a class by the description alone: no usage can be shown there.
        if found := _CLASS_HELP.fullmatch(kwargs.get("description") or ""):
            kwargs["description"] = (
                f"Arguments of {found[1]}, as flags behind the flag that names the class. In a file, these are its "
                "init_args."
            )
        super().__init__(*args, usage=usage, formatter_class=HelpFormatter, **kwargs)

    @override
    def add_argument_group(self, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        """Add a group of flags. jsonargparse's title is the first line of a class's docstring."""
        if name is not None and name in self.titles:
            args = (self.titles[name], *args[1:])
        return super().add_argument_group(*args, name=name, **kwargs)

    @override
    def format_help(self, *args: Any) -> str:
        """Return the help: of a command, what one needs comes first."""
        text: str = super().format_help(*args)
        return in_order(text) if self.titles else text

    @override
    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """Parse settings. Of a config file, parse the text that was read: a pipe cannot be read again."""
        file = next((file for number, file in enumerate(self.files) if content == stand_in(number)), None)
        # Names of other files in it are relative to its folder.
        folder = Folder(str(file.path.parent), mode="d") if file and not file.is_stream else None
        with folder.relative_path_context() if folder else nullcontext():
            settings: jsonargparse.Namespace = super().parse_string(file.text if file else content, *args, **kwargs)
        return settings

    @override
    def add_instantiator(self, instantiator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Add what instantiates a class, and remember the classes that it fails to instantiate.

        If an argument may be of several types, jsonargparse then tries the others, and its message is about these.
        """

        @wraps(instantiator)
        def instantiate(class_type: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return instantiator(class_type, *args, **kwargs)
            except Exception as error:  # a user's class may raise any; it is raised again
                self.failures.append((class_type, error))
                raise

        super().add_instantiator(instantiate, *args, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program, unless a parser around this one handles the error."""
        if self.exit_on_error:
            import_classes()  # the nearest names are suggested
            message = explained(message, self.files, self.options())
        super().error(message, ex)

    def commands(self) -> Mapping[str, "Parser"]:
        """Return the parsers of the commands."""
        # jsonargparse does not list them in public.
        return self._subcommands_action.choices if self._subcommands_action else {}

    def options(self) -> Collection[str]:
        """Return all flags of the commands, to suggest the nearest one for a misspelt flag."""
        parsers = (self, *self.commands().values())
        return {option for parser in parsers for action in flags_of(parser) for option in action.option_strings}


def flags_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the flags of a parser.

    Args:
        parser: The parser of a command.
    """
    # Neither argparse nor jsonargparse lists them in public.
    return list(dict.fromkeys(parser._option_string_actions.values()))


class CommandTrainer(Trainer):
    """Lightning's Trainer, for which ``limit_train_batches: 1`` is one batch on the command line and in YAML.

    Lightning's own annotation is ``Optional[Union[int, float]]``. ``typing`` keeps unions in a cache, and may give the
    equal ``Optional[Union[float, int]]`` of another module for it: then numbers are read as floats, so 1 means all
    batches, and 2 is refused. A union written with ``|`` is not in that cache unless its default is None: Python 3.10
    then makes an ``Optional`` of it, which is.

    Args:
        limit_train_batches: How much of the training data to take: a number of batches, or a share.
        limit_val_batches: How much of the validation data to take: a number of batches, or a share.
        limit_test_batches: How much of the test data to take: a number of batches, or a share.
        limit_predict_batches: How much of the data to predict: a number of batches, or a share.
        **kwargs: Further arguments of `lightning.pytorch.Trainer`.

    Raises:
        ValueError: If ``accumulate_grad_batches``, ``check_val_every_n_epoch``, ``gradient_clip_val`` or
            ``val_check_interval`` is out of range.

    Attributes:
        config_files: The config files that were named.
        flags: The other arguments of the command, without the checkpoint.
        given_callbacks: The callbacks that the Trainer was made with. A model may add others.
    """

    config_files: Sequence[Path] = ()
    flags: Sequence[str] = ()

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = 1.0,
        limit_val_batches: int | float | None = 1.0,
        limit_test_batches: int | float | None = 1.0,
        limit_predict_batches: int | float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        for name in _AT_LEAST_ONE:
            if (count := kwargs.get(name)) is not None and count < 1:
                raise ZNormValueError(f"trainer.{name} must be at least 1, got {count}.")
        if (norm := kwargs.get("gradient_clip_val")) is not None and norm < 0:  # Lightning would not clip
            raise ZNormValueError(f"trainer.gradient_clip_val must be at least 0, got {norm}.")
        if isinstance(interval := kwargs.get("val_check_interval"), int | float) and interval <= 0:  # else a time
            raise ZNormValueError(f"trainer.val_check_interval must be more than 0, got {interval}.")
        super().__init__(
            limit_train_batches=_unless_all(limit_train_batches),
            limit_val_batches=_unless_all(limit_val_batches),
            limit_test_batches=_unless_all(limit_test_batches),
            limit_predict_batches=_unless_all(limit_predict_batches),
            **kwargs,
        )
        trainer: Any = self  # Lightning does not declare the attribute
        self.given_callbacks: list[Callback] = list(trainer.callbacks)


def stand_in(number: int) -> str:
    """Return the text that stands in the arguments for a config file that has been read.

    Args:
        number: Index of the file. The text is neither the name of a file nor settings that anybody would write.
    """
    return f"{{config file: {number}}}"


def check_encoding(settings: Any) -> None:
    """Refuse files that config files name and that jsonargparse has read in another encoding than UTF-8.

    Args:
        settings: The parsed settings.

    Raises:
        ValueError: If such a file holds a character that the encodings read differently.
    """
    encoding = locale.getpreferredencoding(False)
    if codecs.lookup(encoding).name == "utf-8":
        return
    for path in _named_files(settings):
        if not Path(path).read_bytes().isascii():
            raise ZNormValueError(
                f"{path}, which another config file names, is not ASCII, and is read in this system's encoding, "
                f"{encoding}: write its content into the file that names it, or set PYTHONUTF8=1."
            )


def _named_files(settings: Any) -> Iterator[Any]:
    if isinstance(settings, jsonargparse.Namespace):
        settings = vars(settings)
    if isinstance(settings, dict):
        if "__path__" in settings:
            yield settings["__path__"]
        settings = list(settings.values())
    if isinstance(settings, list):
        for value in settings:
            yield from _named_files(value)


def _unless_all(limit: int | float | None) -> int | float | None:
    """Return no limit for "all batches": Lightning prints a line about each limit that it is given."""
    return None if isinstance(limit, float) and limit == 1 else limit
