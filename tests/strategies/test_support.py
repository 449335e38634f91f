"""The table of what is supported: every yes is trained, every refusal is one, and the README says the same."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_znorm.callbacks import strategies
from tests.strategies.scenarios import SCENARIOS
from tests.strategies.support import NAMES, PRECISIONS, REFUSED, SUPPORT, readme_table

README = Path(__file__).parents[2] / "README.md"
SECTION = "## What works today\n"

TRAINED = {(scenario.kind, scenario.precision) for scenario in SCENARIOS.values() if scenario.refused is None}
REFUSES: dict[str, Callable[[str], object]] = {
    "FSDP": FSDPPrecision,
    "FSDP2, TP": lambda precision: Trainer(
        accelerator="cpu", strategy=ModelParallelStrategy(), precision=precision, logger=False
    ),
    "DeepSpeed": DeepSpeedPrecision,
}


def test_table_is_complete() -> None:
    assert SUPPORT.keys() == NAMES.keys()
    assert all(tuple(row) == PRECISIONS for row in SUPPORT.values())
    # FSDP2 and tensor parallelism are of one strategy, single devices of one.
    assert len(SUPPORT) == len(strategies.SUPPORTED)


def test_every_yes_is_trained_and_nothing_else() -> None:
    assert {(kind, precision) for kind, row in SUPPORT.items() for precision in PRECISIONS if row[precision].works} == (
        TRAINED
    )


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(kind, precision) for kind, row in SUPPORT.items() for precision in PRECISIONS if row[precision] is REFUSED],
)
def test_lightning_refuses(kind: str, precision: str) -> None:
    with pytest.raises(
        ValueError, match=f"{precision}.*(not supported|does not support)|does not support.*{precision}"
    ):
        REFUSES[kind](precision)


def test_readme_shows_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(SECTION) == 1
    section = re.split(r"^## ", text.partition(SECTION)[2], flags=re.MULTILINE)[0]
    assert f"\n{readme_table()}\n" in section
