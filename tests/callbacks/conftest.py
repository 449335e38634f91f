import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from tests.large_steps import LARGE_STEPS

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a Trainer on the CPU that is given callbacks, and keyword arguments of its own."""

    def make(*callbacks: Callback, cls: type = Trainer, **kwargs: Any) -> Trainer:
        defaults = QUIET | {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False}
        return cls(callbacks=list(callbacks), default_root_dir=tmp_path, **defaults | kwargs)

    return make


@pytest.fixture
def fit(trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """Trains a module on batches, with the callbacks and Trainer arguments given."""

    def run(module: LightningModule, data: Sequence[Tensor], *callbacks: Callback, **kwargs: Any) -> Trainer:
        made = trainer(*callbacks, **kwargs)
        made.fit(module, DataLoader(data, batch_size=None))
        return made

    return run


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The callback's lines in the log so far."""
    # Lightning's logger hands nothing up to the root unless that had a handler when lightning was imported.
    logger = logging.getLogger("lightning.pytorch")
    propagate, logger.propagate = logger.propagate, True
    yield lambda: [line for line in caplog.messages if re.match("\\w*(Callback|Gradient)", line)]
    logger.propagate = propagate


@pytest.fixture
def warned() -> Iterator[Callable[[], list[str]]]:
    """The callback's warnings so far; an error for those of others, as everywhere."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*(Callback|Gradient)")
        # Tests of the callbacks train at any rate: test_step_size_warnings.py is about this warning.
        warnings.filterwarnings("ignore", f".*{LARGE_STEPS}")
        yield lambda: [str(warning.message) for warning in caught]
