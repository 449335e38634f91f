"""What a command does, once its config files are found to be in order."""

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

# Imported for their names: YAML may then name these classes without their modules.
import lightning_znorm.data
import lightning_znorm.tasks  # noqa: F401
from lightning_znorm.callbacks import GradientTransform, LastCheckpoint
from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.cli.checkpoint import check_checkpoint
from lightning_znorm.cli.config_files import ConfigFile
from lightning_znorm.cli.config_order import check_callbacks
from lightning_znorm.cli.last_checkpoint import last_checkpoint
from lightning_znorm.cli.parse_errors import explained
from lightning_znorm.cli.processes import check_processes
from lightning_znorm.cli.resumed import changed_data, check_resumed, overridden
from lightning_znorm.cli.trainer import CommandTrainer

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
        """Save, in the first process."""
        get_filesystem(self._folder).makedirs(self._folder, exist_ok=True)
        path = os.path.join(self._folder, self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)


class Parser(LightningArgumentParser):
    """Says in one sentence what is wrong with the settings."""

    files: Sequence[ConfigFile] = ()

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program, unless a parser around this one makes something else of the error."""
        super().error(explained(message, self.files) if self.exit_on_error else message, ex)


class RunCLI(LightningCLI):
    """Run fit, validate, test or predict.

    Args:
        files: Config files, in order.
        args: The rest of the command line: the command and its flags, which win over the files.
    """

    def __init__(self, files: Sequence[ConfigFile], args: Sequence[str]) -> None:
        self.files = files
        self.args = args
        usages = {name: f"{_PROGRAM} {name} [--config FILE ...] [--KEY VALUE ...]" for name in self.subcommands()}
        super().__init__(
            args=[*args[:1], *_flags(str(file.path) for file in files), *args[1:]],
            parser_class=Parser,
            trainer_class=CommandTrainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},  # but to the run's own folder, also for W&B
            parser_kwargs={"prog": _PROGRAM, **{name: {"usage": usage} for name, usage in usages.items()}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            # An optimizer beside the model's own would undo the methods that set the latter.
            auto_configure_optimizers=False,
        )

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
        if checkpoint := self.config[self.config.subcommand].ckpt_path:
            check_checkpoint(checkpoint)

    @override
    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint: refused where training, and said where anything else, differs.

        And find the last checkpoint.
        """
        command = self.config.subcommand
        settings = self.config[command]
        if settings.ckpt_path == "last" and (last := last_checkpoint(settings.trainer.as_dict())):
            settings.ckpt_path = str(last)
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
    def after_instantiate_classes(self) -> None:
        """Refuse to leave processes on their own, and say so if a model that was never trained is to be evaluated.

        Callbacks find on the Trainer which config files and flags were given.
        """
        check_processes(os.environ, self.trainer.world_size)
        assert isinstance(self.trainer, CommandTrainer)
        self.trainer.config_files = [file.path for file in self.files]
        self.trainer.flags = list(_without_checkpoint(self.args[1:]))
        if self.subcommand != "fit" and not self.config[self.subcommand].ckpt_path:
            rank_zero_warn(f"{self.subcommand} without --ckpt_path uses the weights that the model starts with.")

    def before_fit(self) -> None:
        """Warn if ``--ckpt_path last`` would repeat the epochs since the best one."""
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
        if path:
            path = _relative(path)
            args = ["test", *_flags(file.name for file in self.files), *_without_checkpoint(self.args[1:])]
            args += ["--ckpt_path", path]
            print(f"{which} checkpoint  {path}{since}\ntest it with     {_PROGRAM} {shlex.join(args)}")

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

        Raises:
            FileExistsError: Before the first prediction, if the file is there: it may be anybody's.
        """
        trainer: Any = self.trainer  # of which Lightning declares no callbacks
        writes = any(isinstance(callback, BasePredictionWriter) for callback in trainer.callbacks)
        if writes and kwargs.get("return_predictions") is None:
            kwargs["return_predictions"] = False  # they are on disk
        path = self._predictions_path()  # another run may have had it: without a logger, or named
        if kwargs.get("return_predictions") is not False and path.exists():
            raise FileExistsError(f"{path} is there already, and predictions overwrite nothing: move it away.")
        predictions: Any = self.trainer.predict(**kwargs)
        if not predictions:
            return
        what = f"{len(predictions)} batches"
        if all(
            isinstance(batch, torch.Tensor) and batch.shape[1:] == predictions[0].shape[1:] for batch in predictions
        ):
            predictions = torch.cat(predictions)
            what = f"shape {tuple(predictions.shape)}"
        path = self._predictions_path()  # which all processes agree on by now
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(predictions, path)
        print(f"predictions      {what}, for torch.load: {_relative(path)}")

    def _predictions_path(self) -> Path:
        # Each process has its own part of the data.
        part = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        return Path(run_folder(self.trainer)) / f"predictions{part}.pt"


def _undrawn(class_type: type[Callback], *args: Any, **kwargs: Any) -> Callback:
    with isolate_rng(include_cuda=False):
        return class_type(*args, **kwargs)


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
