"""A callback that writes down, for each process, what a test needs to know of it."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Witness(Callback):
    """Writes ``<rank>.json`` when training starts and ``<rank>.pt``, the weights, when it ends.

    In between, in the midst of every epoch, ``<rank>-in-epoch-<epoch>``, an empty file.

    Args:
        folder: Where to.
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
        file.with_suffix(".new").rename(file)  # at once: a test may be waiting for it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            (self.folder / f"{trainer.global_rank}-in-epoch-{trainer.current_epoch}").touch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = {name: parameter.detach() for name, parameter in pl_module.named_parameters()}
        torch.save(weights, self.folder / f"{trainer.global_rank}.pt")
