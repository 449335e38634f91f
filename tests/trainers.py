"""Trainers that write and print nothing."""

from typing import Any

from lightning.pytorch import Trainer


def trainer(**kwargs: Any) -> Trainer:
    """Return a Trainer for one epoch on the CPU; the arguments override that."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, **quiet, **kwargs})
