"""The checkpoint that a study tests. The one to resume from is `lightning_znorm.LastCheckpoint`'s.

Both stay in one folder for all attempts at a run, because `ModelCheckpoint` forgets what the best score was when its
folder changes.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

MONITORED = "lightning_znorm.monitored"
"""Key in a checkpoint: name of the metric by which it was chosen, and its value in that epoch."""
STOPPED = "lightning_znorm.stopped"
"""Key in a checkpoint: whether training was told to stop, which Lightning does not save."""


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint of the epoch with the best validation metric.

    Args:
        dirpath: Folder.
        monitor: The metric.
        mode: Whether ``"min"`` or ``"max"`` of it is best.
    """

    def __init__(self, dirpath: str, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Not the score in the callback's own state: that is infinite where the metric is NaN.
        value = trainer.callback_metrics.get(str(self.monitor))
        checkpoint[MONITORED] = {"name": self.monitor, "value": None if value is None else float(value)}


def monitored_value(checkpoint: dict[str, Any]) -> tuple[str | None, float | None]:
    """Return the metric by which a checkpoint was chosen, and its value; None where no metric chose it."""
    if MONITORED in checkpoint:
        return checkpoint[MONITORED]["name"], checkpoint[MONITORED]["value"]
    for key, state in checkpoint["callbacks"].items():  # of version 0.1.0
        if key.startswith(f"{BestCheckpoint.__name__}{{"):
            return state["monitor"], None if state["current_score"] is None else float(state["current_score"])
    return None, None
