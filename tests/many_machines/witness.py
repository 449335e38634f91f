"""A callback that writes, for each process, the facts that a test needs."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Witness(Callback):
    """Writes ``<rank>.json`` when training starts and ``<rank>.pt``, the weights, when it ends.

    In the middle of every epoch, it writes an empty file ``<rank>-in-epoch-<epoch>``.

    Args:
        folder: Folder to write to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        facts = {
            "pid": os.getpid(),
            "environment": type(trainer._accelerator_connector.cluster_environment).__name__,
            "world_size": trainer.world_size,
            "node": trainer.node_rank,
            "main_address": os.environ.get("MASTER_ADDR"),
            "epoch": trainer.current_epoch,
        }
        file = self.folder / f"{trainer.global_rank}.json"
        file.with_suffix(".new").write_text(json.dumps(facts))
        file.with_suffix(".new").rename(file)  # in one step, because a test may wait for the file

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            (self.folder / f"{trainer.global_rank}-in-epoch-{trainer.current_epoch}").touch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        torch.save(weights, self.folder / f"{trainer.global_rank}.pt")
