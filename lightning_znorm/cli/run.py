"""The run of one command: fit, validate, test or predict."""

import os
import pickle
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_znorm.callbacks import GradientTransform, LastCheckpoint
from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.cli.checkpoints import (
    changed_data,
    check_checkpoint,
    check_names,
    check_resumed,
    evaluation_settings,
    last_checkpoint,
    overridden_settings,
    saved_class,
    saved_model,
)
from lightning_znorm.cli.classes import import_classes
from lightning_znorm.cli.components import CommandTrainer, Parser, SaveConfig, check_encoding, stand_in
from lightning_znorm.cli.config_files import ConfigFile, check_callbacks, check_streams
from lightning_znorm.cli.error_sentences import describe_error, is_bug, sentence, users_traceback
from lightning_znorm.cli.help import SENTENCES
from lightning_znorm.cli.help_format import TITLES
from lightning_znorm.cli.launchers import check_processes
from lightning_znorm.cli.parse_errors import class_settings, where
from lightning_znorm.cli.program import program
from lightning_znorm.errors import ZNormFileExistsError, ZNormValueError
from lightning_znorm.hyperparameters import not_loadable


class RunCLI(LightningCLI):
    """Run fit, validate, test or predict.

    Args:
        files: Config files, in the order in which they are applied.
        args: The rest of the command line: the command and its flags, which override the files.
    """

    def __init__(self, files: Sequence[ConfigFile], args: Sequence[str]) -> None:
        self.files = files
        self.args = args
        self.failures: list[tuple[type, Exception]] = []
        import_classes()
        usage = f"{program()} {{}} [--config FILE ...] [--KEY VALUE ...]"
        # Others look for flags by their full names, so abbreviations are off.
        commands = {
            name: {"usage": usage.format(name), "allow_abbrev": False, "description": SENTENCES[name]}
            for name in self.subcommands()
        }
        try:
            super().__init__(
                args=[*args[:1], *_flags(map(stand_in, range(len(files)))), *args[1:]],
                parser_class=Parser,
                trainer_class=CommandTrainer,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},  # but to the run's own folder, also for W&B
                parser_kwargs={"prog": program(), "usage": None, "allow_abbrev": False, **commands},
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                # An optimizer beside the model's own would undo the methods that set the model's.
                auto_configure_optimizers=False,
            )
        except Exception as error:  # a user's class may raise any; what is not explained here is raised again
            failure = self._failed_class(error)
            if failure is None:
                if said := self._misfit(error):
                    raise ZNormValueError(said) from error
                raise
        else:
            return
        self._refuse_constructor(*failure)

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is a static method
        """Return the command that is run, with the arguments that its flags leave out; without one, all commands."""
        commands = super().subcommands()
        return {name: commands[name] for name in self.args[:1] or commands}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let callbacks draw no random numbers: a seed gives the same weights and data split with any callbacks."""
        parser.add_instantiator(_isolated, Callback)  # callbacks are instantiated before the model

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return the parser, or that of one command."""
        parser = super().init_parser(**kwargs)
        assert isinstance(parser, Parser)
        parser.titles = TITLES
        # --help is answered before PyTorch is loaded.
        parser.add_argument("--help_all", action="help", help="Show this page, and exit.")
        parser.files = self.files
        parser.failures = self.failures
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and refuse them if a gradient method was lost on the way."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)  # super's would warn that the arguments come from Python
        callbacks = self.config[self.config.subcommand].trainer.callbacks or []
        check_callbacks(
            self.files,
            [callback.as_dict() for callback in (callbacks if isinstance(callbacks, list) else [callbacks])],
            {method.__name__ for method in _subclasses(GradientTransform)},
        )
        check_encoding(self.config)

    @override
    def before_instantiate_classes(self) -> None:
        """Remember failures of all other classes too."""
        self.parser.add_instantiator(_instantiated, object)

    # Lightning offers no public hook between parsing and the settings that it takes from a checkpoint.
    @override
    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint, reject unsafe ones, and take the model's settings from it.

        `fit` refuses settings that differ from the checkpoint's. The other commands keep those that say how a
        `SegmentationTask` is evaluated (see `evaluation_settings`), and warn of all others that differ.
        """
        command = self.config.subcommand
        settings = self.config[command]
        if settings.ckpt_path == "last" and (last := last_checkpoint(settings.trainer.as_dict())):
            settings.ckpt_path = str(last)
        path = settings.ckpt_path
        if not path:
            return
        check_checkpoint(path)
        given, data = settings.model.as_dict(), settings.data.as_dict()
        # Of another class, the checkpoint's may mean something else, or lack them.
        is_same = saved_class(path) in (None, given["class_path"])
        evaluation = evaluation_settings(given, self._given_keys()) if command != "fit" and is_same else {}
        kept = [name for name, is_given in evaluation.items() if is_given]
        check_names(path, given, left_out=kept)
        if settings.weights_only is None and "://" in path:  # Lightning would run the code that it names
            settings.weights_only = True
        # As Lightning's own method, but for the settings that are kept.
        if saved := saved_model(path, left_out=kept):
            try:
                self.config = self.parser.parse_object({command: {"model": saved}}, self.config)
            except SystemExit:
                sys.stderr.write(f"These are settings of the model in {path}.\n")
                raise
        resulting = self.config[command].model.as_dict()
        if command == "fit":
            check_resumed(path, resulting, given)
            notes = changed_data(path, data)
        else:
            # What the command leaves to the checkpoint is not overridden.
            asked = {
                name: value for name, value in (given.get("init_args") or {}).items() if evaluation.get(name, True)
            }
            notes = overridden_settings(path, resulting, {**given, "init_args": asked})
        for note in notes:
            rank_zero_warn(note)

    def _given_keys(self) -> Iterator[str]:
        """Yield the dotted keys that files and flags set."""
        for file in self.files:
            yield from file.settings
        yield from (arg[2:].partition("=")[0] for arg in self.args if arg.startswith("--"))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer. A class that failed before has been replaced by another type by now."""
        self.failures.clear()
        return super().instantiate_trainer(**kwargs)

    @override
    def after_instantiate_classes(self) -> None:
        """Refuse processes that would train by themselves, and warn if an untrained model is to be evaluated.

        Callbacks find the config files and flags on the Trainer.
        """
        check_processes(os.environ, self.trainer.world_size)
        launcher = self.trainer.strategy.launcher
        # Only this launcher runs the command again in each process, and no public attribute says so.
        if isinstance(launcher, _SubprocessScriptLauncher):
            check_streams([file.name for file in self.files if file.is_stream], launcher.num_processes)
        assert isinstance(self.trainer, CommandTrainer)
        self.trainer.config_files = [file.path for file in self.files]
        self.trainer.flags = list(_without_checkpoint(self.args[1:]))
        if self.subcommand != "fit" and not self.config[self.subcommand].ckpt_path:
            rank_zero_warn(f"{self.subcommand} without --ckpt_path uses the weights that the model starts with.")

    def before_fit(self) -> None:
        """Warn of checkpoints that no command will load, and of last checkpoints that are not of the last epoch."""
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
                        "the last checkpoint only in epochs that are among the best, so a training that is resumed "
                        "from it repeats all later epochs. Use LastCheckpoint in place of save_last: it saves one "
                        "after every epoch."
                    )

    def after_fit(self) -> None:
        """Print the metrics, the path of the best checkpoint (or of the last one), and the command that tests it."""
        # Under manual optimization the model may step without Lightning's count.
        if self.trainer.global_step == 0 and self.model.automatic_optimization:
            rank_zero_warn("fit ended without a step of the optimizer: nothing was trained.")
        if not self.trainer.is_global_zero:
            return
        checkpoints = self._model_checkpoints()
        chosen = (checkpoint for checkpoint in checkpoints if checkpoint.monitor and checkpoint.best_model_path)
        best = next(chosen, None)
        since = self._best_since(best)
        print()
        metrics = {name: value for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")}
        width = max(16, *map(len, metrics)) if metrics else 16
        for name, value in metrics.items():
            score = None if best is None or best.monitor != name else best.best_model_score
            print(f"{name:<{width}} final {value:.4f}{'' if score is None else f'   best {score:.4f}{since}'}")
        which, path = "best", "" if best is None else best.best_model_path
        if not path:  # without a monitor, Lightning's "best" model is the last that was saved
            paths = (checkpoint.last_model_path or checkpoint.best_model_path for checkpoint in checkpoints)
            which, path = "last", next(filter(None, paths), "")
        trainer: Any = self.trainer  # Lightning does not declare the attribute
        if path and not trainer.fast_dev_run:  # a fast_dev_run writes no checkpoint
            path = _relative(path)
            args = ["test", *self._same_settings(), "--ckpt_path", path]
            which = f"{which} checkpoint"
            print(f"{which:<{width}} {path}{since}")
            print(f"{'test it with':<{width}} {program()} {shlex.join(args)}")

    def _same_settings(self) -> list[str]:
        """Return files and flags for another command on the same settings."""
        # A pipe is gone by now, but the settings were saved.
        if any(file.is_stream for file in self.files) and self.trainer.loggers:
            return ["--config", _relative(os.path.join(run_folder(self.trainer), "config.yaml"))]
        return [*_flags(file.name for file in self.files), *_without_checkpoint(self.args[1:])]

    def _failed_class(self, error: Exception) -> tuple[type, Exception] | None:
        """Return the class that could not be instantiated, and why, if that led to the error."""
        is_later = hasattr(self, "config_init")  # an optimizer is instantiated once there are parameters
        return next((failed for failed in self.failures[-1:] if not is_later or failed[1] is error), None)

    def _refuse_constructor(self, class_type: type, failure: Exception) -> NoReturn:
        """Print the user's part of the traceback, and say which setting's class could not be instantiated.

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
        sys.stderr.write(users_traceback(failure))
        raise ZNormValueError(f"{which} cannot be made: {name} raises {describe_error(failure)}.") from failure

    def _misfit(self, error: Exception) -> str | None:
        """Return a sentence on what in the checkpoint does not fit, if that is the error."""
        path = self.config[self.config.subcommand].ckpt_path if "config" in vars(self) else None
        if path is None or users_traceback(error):  # the user's own code loads another checkpoint
            return None
        if isinstance(error, KeyError) and "checkpoint contains only the model" in str(error):
            return f"{path} holds only the model, without the state of the training: fit cannot go on from it."
        first, *details = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()] or [""]
        if isinstance(error, RuntimeError) and first.startswith("Error(s) in loading state_dict for"):
            more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
            return f"{path} does not fit the model: {details[0]}{more}."
        if isinstance(error, ValueError) and first.startswith("loaded state dict "):
            return f"{path} does not fit the optimizer: {first}."
        return None

    def _best_since(self, best: ModelCheckpoint | None) -> str:
        """Return since when the best one is the best: `ModelCheckpoint` forgets a best score of another folder."""
        resumed = str(self.trainer.ckpt_path or "")
        if best is None or not resumed or best.best_model_score is None:
            return ""
        same = os.path.realpath(best.dirpath or "") == os.path.realpath(os.path.dirname(resumed))
        return "" if same else f" (of the epochs after {_relative(resumed)})"

    def _model_checkpoints(self) -> list[ModelCheckpoint]:
        trainer: Any = self.trainer  # Lightning does not declare its callbacks
        return [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]

    def predict(self, **kwargs: Any) -> None:
        """Predict, and save beside the logs what ``predict_step`` returned.

        Batches are joined to one tensor if they can be. Of several data loaders, a list is saved, with one entry each.

        Args:
            **kwargs: Arguments of ``Trainer.predict``.

        Raises:
            FileExistsError: Before the first prediction, if the file exists. It may be anybody's.
            ValueError: If the predictions cannot be saved.
        """
        trainer: Any = self.trainer  # Lightning does not declare its callbacks
        writes = any(isinstance(callback, BasePredictionWriter) for callback in trainer.callbacks)
        if writes and kwargs.get("return_predictions") is None:
            kwargs["return_predictions"] = False  # the writer puts them on disk
        path = self._predictions_path()  # without a logger, or with a named version, other runs have the same path
        if kwargs.get("return_predictions") is not False and path.exists():
            raise ZNormFileExistsError(f"{path} is there already, and predictions overwrite no file: move it away.")
        predictions: Any = self.trainer.predict(**kwargs)
        if not predictions:
            return
        if len(self.trainer.num_predict_batches) > 1:
            predictions = [_joined(batches) for batches in predictions]
            what = f"{len(predictions)} loaders: {', '.join(map(_size, predictions))}"
        else:
            predictions = _joined(predictions)
            what = _size(predictions)
        path = self._predictions_path()  # by now all processes agree on the version of the run
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(predictions, path)
        except BaseException as error:
            path.unlink(missing_ok=True)  # half a file would be in the way of the next predictions
            if isinstance(error, (AttributeError, TypeError, pickle.PicklingError)):  # pickle raises one of these
                raise ZNormValueError(
                    f"the predictions cannot be saved: {describe_error(error)}. Let predict_step return tensors, "
                    "numbers, texts, or lists and dicts of these."
                ) from error
            raise
        print(f"predictions      {what}, for torch.load: {_relative(path)}")

    def _predictions_path(self) -> Path:
        # Each process has its own part of the data.
        part = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        return Path(run_folder(self.trainer)) / f"predictions{part}.pt"


def _joined(batches: list[Any]) -> Any:
    """Join the predictions of a data loader to one tensor, if their shapes allow it."""
    are_rows = all(isinstance(batch, torch.Tensor) and batch.ndim for batch in batches)
    return torch.cat(batches) if are_rows and len({batch.shape[1:] for batch in batches}) == 1 else batches


def _size(predictions: Any) -> str:
    if isinstance(predictions, torch.Tensor):
        return f"shape {tuple(predictions.shape)}"
    return f"{len(predictions)} batch{'es' if len(predictions) != 1 else ''}"


def _isolated(class_type: type[Callback], *args: Any, **kwargs: Any) -> Callback:
    with isolate_rng(include_cuda=False):
        return class_type(*args, **kwargs)


def _instantiated(class_type: type, *args: Any, **kwargs: Any) -> Any:
    return class_type(*args, **kwargs)


def _subclasses(cls: type[GradientTransform]) -> Iterator[type[GradientTransform]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _subclasses(subclass)


def _flags(files: Iterable[str]) -> list[str]:
    return [arg for file in files for arg in ("--config", file)]


def _without_checkpoint(args: Iterable[str]) -> Iterator[str]:
    remaining = iter(args)
    for arg in remaining:
        if arg == "--ckpt_path":
            next(remaining, None)
        elif not arg.startswith("--ckpt_path="):
            yield arg


def _relative(path: str | Path) -> str:
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
