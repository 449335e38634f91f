"""What a command does, once its config files are found to be in order."""

import codecs
import locale
import os
import pickle
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
from jsonargparse.typing import Path as Folder
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

# Imported for their names: YAML may then name these classes without their modules.
import lightning_znorm.data
import lightning_znorm.tasks  # noqa: F401
from lightning_znorm.callbacks import GradientTransform, LastCheckpoint
from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.cli.checkpoint import check_checkpoint, check_names
from lightning_znorm.cli.config_files import ConfigFile
from lightning_znorm.cli.config_order import check_callbacks
from lightning_znorm.cli.errors import is_bug, own_traceback, raised, sentence
from lightning_znorm.cli.last_checkpoint import last_checkpoint
from lightning_znorm.cli.parse_errors import class_settings, explained, where
from lightning_znorm.cli.processes import check_processes, check_streams
from lightning_znorm.cli.resumed import changed_data, check_resumed, overridden
from lightning_znorm.cli.trainer import CommandTrainer
from lightning_znorm.errors import ZNormFileExistsError, ZNormValueError
from lightning_znorm.hyperparameters import not_loadable

_PROGRAM = "python -m lightning_znorm"


class SaveConfig(SaveConfigCallback):
    """Save the resulting settings beside the logs; without a logger there is no such place, and nothing is saved."""

    _folder = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, before the first step."""
        if trainer.loggers:
            self._folder = run_folder(trainer)  # here, where every process is
            super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, in the first process, in the encoding in which config files are read."""
        system = get_filesystem(self._folder)
        system.makedirs(self._folder, exist_ok=True)
        content = self.parser.dump(self.config, skip_none=False)
        with system.open(os.path.join(self._folder, self.config_filename), "w", encoding="utf-8") as file:
            file.write(content)


class Parser(LightningArgumentParser):
    """Says in one sentence what is wrong with the settings."""

    files: Sequence[ConfigFile] = ()
    failures: list[tuple[type, Exception]]
    """Classes that could not be made, and why."""

    @override
    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """Parse settings: of a config file what was read of it, for it may be a pipe, or be changed by now."""
        file = next((file for number, file in enumerate(self.files) if content == _stand_in(number)), None)
        # Names of other files in it begin where it is.
        folder = Folder(str(file.path.parent), mode="d") if file and not file.is_stream else None
        with folder.relative_path_context() if folder else nullcontext():
            settings: jsonargparse.Namespace = super().parse_string(file.text if file else content, *args, **kwargs)
        return settings

    @override
    def add_instantiator(self, instantiator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Add what makes the objects of a class, and remember those that it fails to make.

        Where an argument may be of several types, jsonargparse tries the others then, and speaks of these.
        """

        @wraps(instantiator)
        def make(class_type: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return instantiator(class_type, *args, **kwargs)
            except Exception as error:
                self.failures.append((class_type, error))
                raise

        super().add_instantiator(make, *args, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program, unless a parser around this one makes something else of the error."""
        super().error(explained(message, self.files, self._options()) if self.exit_on_error else message, ex)

    def _options(self) -> Collection[str]:
        commands: Iterable[Parser] = self._subcommands_action.choices.values() if self._subcommands_action else ()
        return {*self._option_string_actions, *(option for command in commands for option in command._options())}


class RunCLI(LightningCLI):
    """Run fit, validate, test or predict.

    Args:
        files: Config files, in order.
        args: The rest of the command line: the command and its flags, which win over the files.
    """

    def __init__(self, files: Sequence[ConfigFile], args: Sequence[str]) -> None:
        self.files = files
        self.args = args
        self.failures: list[tuple[type, Exception]] = []
        usages = {name: f"{_PROGRAM} {name} [--config FILE ...] [--KEY VALUE ...]" for name in self.subcommands()}
        # A flag by its beginning would slip past those who look for it by name.
        commands = {name: {"usage": usage, "allow_abbrev": False} for name, usage in usages.items()}
        try:
            super().__init__(
                args=[*args[:1], *_flags(map(_stand_in, range(len(files)))), *args[1:]],
                parser_class=Parser,
                trainer_class=CommandTrainer,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},  # but to the run's own folder, also for W&B
                parser_kwargs={"prog": _PROGRAM, "allow_abbrev": False, **commands},
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                # An optimizer beside the model's own would undo the methods that set the latter.
                auto_configure_optimizers=False,
            )
        except Exception as error:
            failure = self._not_made(error)
            if failure is None:
                if said := self._misfit(error):
                    raise ZNormValueError(said) from error
                raise
        else:
            return
        self._refuse_constructor(*failure)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See that a seed gives the same weights and the same split of the data whatever callbacks there are."""
        parser.add_instantiator(_undrawn, Callback)  # they are made before the model

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, or that of one command."""
        parser = super().init_parser(**kwargs)
        assert isinstance(parser, Parser)
        parser.files = self.files
        parser.failures = self.failures
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and see that no gradient method was lost on the way."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)  # not super's, which warns of arguments that come from Python
        callbacks = self.config[self.config.subcommand].trainer.callbacks or []
        check_callbacks(
            self.files,
            [callback.as_dict() for callback in (callbacks if isinstance(callbacks, list) else [callbacks])],
            {method.__name__ for method in _subclasses(GradientTransform)},
        )
        _check_encoding(self.config)

    @override
    def before_instantiate_classes(self) -> None:
        """Remember what fails to be made of any other class too."""
        self.parser.add_instantiator(_made, object)

    @override
    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint: refused where training, and said where anything else, differs.

        And find the last checkpoint.
        """
        command = self.config.subcommand
        settings = self.config[command]
        if settings.ckpt_path == "last" and (last := last_checkpoint(settings.trainer.as_dict())):
            settings.ckpt_path = str(last)
        if path := settings.ckpt_path:
            check_checkpoint(path)
            check_names(path, settings.model.as_dict())
            if settings.weights_only is None and "://" in path:  # Lightning would load it with the code that it names
                settings.weights_only = True
        model, data = settings.model, settings.data
        super()._parse_ckpt_path()
        settings = self.config[command]
        if not settings.ckpt_path:
            return
        if command == "fit":
            check_resumed(settings.ckpt_path, settings.model.as_dict(), model.as_dict())
            notes = changed_data(settings.ckpt_path, data.as_dict())
        else:
            notes = overridden(settings.ckpt_path, settings.model.as_dict(), model.as_dict())
        for note in notes:
            rank_zero_warn(note)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; what could not be made of one type has been made of another by then."""
        self.failures.clear()
        return super().instantiate_trainer(**kwargs)

    @override
    def after_instantiate_classes(self) -> None:
        """Refuse to leave processes on their own, and say so if a model that was never trained is to be evaluated.

        Callbacks find on the Trainer which config files and flags were given.
        """
        check_processes(os.environ, self.trainer.world_size)
        launcher = self.trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):  # which begins this command again, for each other process
            check_streams([file.name for file in self.files if file.is_stream], launcher.num_processes)
        assert isinstance(self.trainer, CommandTrainer)
        self.trainer.config_files = [file.path for file in self.files]
        self.trainer.flags = list(_without_checkpoint(self.args[1:]))
        if self.subcommand != "fit" and not self.config[self.subcommand].ckpt_path:
            rank_zero_warn(f"{self.subcommand} without --ckpt_path uses the weights that the model starts with.")

    def before_fit(self) -> None:
        """Warn of checkpoints from which no command could go on, and of a last one that repeats epochs.

        ``--ckpt_path last`` would repeat those since the best one.
        """
        for owner in (self.model, self.datamodule):
            if owner is not None and (names := not_loadable(owner.hparams)):
                rank_zero_warn(
                    f"{type(owner).__name__} saves hyperparameters that are not plain values ({', '.join(names)}). "
                    "`test`, `predict` and `fit --ckpt_path` refuse such checkpoints, because loading them could run "
                    "code: convert the values before save_hyperparameters (NumPy's numbers by float() or int()), or "
                    "exclude them by its argument ignore."
                )
        checkpoints = self._model_checkpoints()
        if not any(isinstance(checkpoint, LastCheckpoint) for checkpoint in checkpoints):
            for checkpoint in checkpoints:
                if checkpoint.save_last and checkpoint.monitor and checkpoint.save_top_k != -1:
                    rank_zero_warn(
                        f"ModelCheckpoint(monitor={checkpoint.monitor!r}, save_last={checkpoint.save_last!r}) writes "
                        "the last checkpoint only in epochs that are among the best: a training that is resumed from "
                        "it repeats those since. Put LastCheckpoint among the callbacks in place of save_last, for one "
                        "of every epoch."
                    )

    def after_fit(self) -> None:
        """Print what was reached, where the best checkpoint (else the last) is, and how to test it."""
        if self.trainer.global_step == 0 and self.model.automatic_optimization:  # else it may step past Lightning
            rank_zero_warn("fit ended without a step of the optimizer: nothing was trained.")
        if not self.trainer.is_global_zero:
            return
        checkpoints = self._model_checkpoints()
        chosen = (checkpoint for checkpoint in checkpoints if checkpoint.monitor and checkpoint.best_model_path)
        best = next(chosen, None)
        since = self._best_since(best)
        print()
        for name, value in self.trainer.callback_metrics.items():
            if name.startswith("val/"):
                score = None if best is None or best.monitor != name else best.best_model_score
                print(f"{name:<16} final {value:.4f}{'' if score is None else f'   best {score:.4f}{since}'}")
        which, path = "best", "" if best is None else best.best_model_path
        if not path:  # without a monitor, Lightning's "best" model is the last that was saved
            paths = (checkpoint.last_model_path or checkpoint.best_model_path for checkpoint in checkpoints)
            which, path = "last", next(filter(None, paths), "")
        trainer: Any = self.trainer  # of which Lightning does not declare it
        if path and not trainer.fast_dev_run:  # which writes none
            path = _relative(path)
            args = ["test", *self._same_settings(), "--ckpt_path", path]
            print(f"{which} checkpoint  {path}{since}\ntest it with     {_PROGRAM} {shlex.join(args)}")

    def _same_settings(self) -> list[str]:
        """Files and flags for another command on the same settings; a pipe is there no more, but what was saved is."""
        if any(file.is_stream for file in self.files) and self.trainer.loggers:
            return ["--config", _relative(os.path.join(run_folder(self.trainer), "config.yaml"))]
        return [*_flags(file.name for file in self.files), *_without_checkpoint(self.args[1:])]

    def _not_made(self, error: Exception) -> tuple[type, Exception] | None:
        """The class that fails to be made, and why, if that has led to the error."""
        is_later = hasattr(self, "config_init")  # an optimizer is made when there are parameters
        return next((made for made in self.failures[-1:] if not is_later or made[1] is error), None)

    def _refuse_constructor(self, class_type: type, failure: Exception) -> NoReturn:
        """Say which setting's class fails to be made, after the steps in the user's own code.

        Raises:
            ValueError: With the sentence.
            Exception: The failure itself, if it is a bug of this package.
        """
        if said := sentence(failure):
            raise ZNormValueError(said) from failure
        if is_bug(failure):
            raise failure
        settings = self.config[self.config.subcommand].as_dict()
        named = dict.fromkeys(class_settings(settings, class_type))
        which = " or ".join(f"{key}{where(key, name, self.files)}" for key, name in named) or "a setting"
        name = next((name for _, name in named), f"{class_type.__module__}.{class_type.__qualname__}")
        sys.stderr.write(own_traceback(failure))
        raise ZNormValueError(f"{which} cannot be made: {name} raises {raised(failure)}.") from failure

    def _misfit(self, error: Exception) -> str | None:
        """Say what of the checkpoint does not fit the model or the optimizer, if that is the error."""
        path = self.config[self.config.subcommand].ckpt_path if "config" in vars(self) else None
        if path is None or own_traceback(error):  # the user's own code loads something else
            return None
        first, *details = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()] or [""]
        if isinstance(error, RuntimeError) and first.startswith("Error(s) in loading state_dict for"):
            more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
            return f"{path} does not fit the model: {details[0]}{more}."
        if isinstance(error, ValueError) and first.startswith("loaded state dict "):
            return f"{path} does not fit the optimizer: {first}."
        return None

    def _best_since(self, best: ModelCheckpoint | None) -> str:
        """Since when the best is looked for: `ModelCheckpoint` forgets a best score of another folder."""
        resumed = str(self.trainer.ckpt_path or "")
        if best is None or not resumed or best.best_model_score is None:
            return ""
        same = os.path.realpath(best.dirpath or "") == os.path.realpath(os.path.dirname(resumed))
        return "" if same else f" (of the epochs after {_relative(resumed)})"

    def _model_checkpoints(self) -> list[ModelCheckpoint]:
        trainer: Any = self.trainer  # of which Lightning declares no callbacks
        return [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]

    def predict(self, **kwargs: Any) -> None:
        """Predict, and save what ``predict_step`` returned beside the logs: one tensor where batches can be joined.

        Of several data loaders, a list with what each of them gave.

        Raises:
            FileExistsError: Before the first prediction, if the file is there: it may be anybody's.
        """
        trainer: Any = self.trainer  # of which Lightning declares no callbacks
        writes = any(isinstance(callback, BasePredictionWriter) for callback in trainer.callbacks)
        if writes and kwargs.get("return_predictions") is None:
            kwargs["return_predictions"] = False  # they are on disk
        path = self._predictions_path()  # another run may have had it: without a logger, or named
        if kwargs.get("return_predictions") is not False and path.exists():
            raise ZNormFileExistsError(f"{path} is there already, and predictions overwrite nothing: move it away.")
        predictions: Any = self.trainer.predict(**kwargs)
        if not predictions:
            return
        if len(self.trainer.num_predict_batches) > 1:
            predictions = [_joined(batches) for batches in predictions]
            what = f"{len(predictions)} loaders: {', '.join(map(_size, predictions))}"
        else:
            predictions = _joined(predictions)
            what = _size(predictions)
        path = self._predictions_path()  # which all processes agree on by now
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(predictions, path)
        except BaseException as error:
            path.unlink(missing_ok=True)  # or half a file would be in the way of the next predictions
            if isinstance(error, (AttributeError, TypeError, pickle.PicklingError)):  # pickle's, of what it cannot
                raise ZNormValueError(
                    f"the predictions cannot be saved: {raised(error)}. Let predict_step return tensors, numbers, "
                    "texts, or lists and dicts of such."
                ) from error
            raise
        print(f"predictions      {what}, for torch.load: {_relative(path)}")

    def _predictions_path(self) -> Path:
        # Each process has its own part of the data.
        part = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        return Path(run_folder(self.trainer)) / f"predictions{part}.pt"


def _joined(batches: list[Any]) -> Any:
    """What a data loader gave, as one tensor if its batches are rows of one."""
    are_rows = all(isinstance(batch, torch.Tensor) and batch.ndim for batch in batches)
    return torch.cat(batches) if are_rows and len({batch.shape[1:] for batch in batches}) == 1 else batches


def _size(predictions: Any) -> str:
    if isinstance(predictions, torch.Tensor):
        return f"shape {tuple(predictions.shape)}"
    return f"{len(predictions)} batch{'es' if len(predictions) != 1 else ''}"


def _undrawn(class_type: type[Callback], *args: Any, **kwargs: Any) -> Callback:
    with isolate_rng(include_cuda=False):
        return class_type(*args, **kwargs)


def _made(class_type: type, *args: Any, **kwargs: Any) -> Any:
    return class_type(*args, **kwargs)


def _stand_in(number: int) -> str:
    """What stands in the arguments for a config file that has been read: no name of a file, nor anybody's settings."""
    return f"{{config file: {number}}}"


def _check_encoding(settings: Any) -> None:
    """Refuse files that config files name and jsonargparse has read in another encoding than UTF-8.

    Raises:
        ValueError: If one holds a character for which that matters.
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


def _subclasses(cls: type[GradientTransform]) -> Iterator[type[GradientTransform]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _subclasses(subclass)


def _flags(files: Iterable[str]) -> list[str]:
    return [arg for file in files for arg in ("--config", file)]


def _without_checkpoint(args: Iterable[str]) -> Iterator[str]:
    rest = iter(args)
    for arg in rest:
        if arg == "--ckpt_path":
            next(rest, None)
        elif not arg.startswith("--ckpt_path="):
            yield arg


def _relative(path: str | Path) -> str:
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
