"""Each run's files have a folder of their own, beside its checkpoints, whatever the logger."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader
from training import Training, batches

from lightning_znorm import GradientMonitor
from lightning_znorm.callbacks.folders import run_folder
from tests.own_module import OwnLogger


class Asked(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(run_folder(trainer))


@pytest.mark.parametrize(
    ("logger", "where"),
    [
        (lambda path: CSVLogger(path), "lightning_logs/version_0"),
        (lambda path: CSVLogger(path, name="name", version="mine"), "name/mine"),
        (lambda path: TensorBoardLogger(path), "lightning_logs/version_0"),
        (lambda path: OwnLogger("x5i32th9", f"{path}/remote"), "remote/project/x5i32th9"),
        (lambda path: OwnLogger(3, f"{path}/remote"), "remote/project/version_3"),
        (lambda path: OwnLogger("x5i32th9", save_dir=None), "project/x5i32th9"),
        (lambda path: False, ""),
    ],
)
def test_beside_the_checkpoints(
    trainer: Callable[..., Trainer], tmp_path: Path, logger: Callable[[Path], Logger | bool], where: str
) -> None:
    asked, checkpoint = Asked(), ModelCheckpoint()
    made = trainer(asked, checkpoint, logger=logger(tmp_path), enable_checkpointing=True, log_every_n_steps=1)
    made.fit(Training(), DataLoader(batches(1), batch_size=None))
    assert asked.folder == tmp_path / where
    assert checkpoint.dirpath is not None
    assert Path(checkpoint.dirpath) == asked.folder / "checkpoints"


def test_logger_without_names(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    made = trainer(logger=OwnLogger(None, f"{tmp_path}/remote", name=None))
    assert run_folder(made) == str(tmp_path / "remote")


def test_second_run_leaves_the_pictures_of_the_first(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    for version in ("one", "two"):
        made = trainer(GradientMonitor(), logger=OwnLogger(version, str(tmp_path)), log_every_n_steps=1)
        made.fit(Training(), DataLoader(batches(1), batch_size=None))
    drawn = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    figures = ("mean_share", "sigma_by_depth", "sigma_over_steps", "znorm_change")
    names = [f"grad_{figure}.png" for figure in figures]
    assert drawn == [f"project/{version}/gradients/{name}" for version in ("one", "two") for name in names]
