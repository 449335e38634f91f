"""A run that is resumed, by as many processes or others, goes on as the reference does, with the callback."""

from functools import cache
from pathlib import Path

import pytest
import torch

from lightning_znorm.cli.checkpoint import check_checkpoint
from tests.strategies.conftest import WITHOUT_CALLBACK
from tests.strategies.reference import check, records
from tests.strategies.training import SCENARIOS, Weights

RESUMED = [name for name, scenario in SCENARIOS.items() if scenario.resumes is not None]
SAVED = [name for name, scenario in SCENARIOS.items() if scenario.saves]


@cache
def momentum_of(directory: Path, name: str) -> Weights:
    """What a run that is right leaves to the one that goes on."""
    return check(name, SCENARIOS[name], records(directory, name, 1)[0])


@pytest.mark.parametrize("name", SAVED)
def test_holds_no_code(directory: Path, name: str) -> None:
    """Or the command line would refuse it."""
    check_checkpoint(str(directory / f"{name}.ckpt"))


@pytest.mark.parametrize("name", RESUMED)
def test_goes_on(directory: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    saved, resumed = records(directory, scenario.resumes, 1)[0], records(directory, name, 1)[0]
    for key, weight in saved["weights"][-1].items():
        assert torch.equal(weight, resumed["weights"][0][key]), key
    check(name, scenario, resumed, momentum_of(directory, scenario.resumes))


@pytest.mark.parametrize("name", RESUMED)
def test_does_not_miss_the_callback(directory: Path, name: str) -> None:
    for run in records(directory, name, SCENARIOS[name].processes):
        said = [message for message in run["warnings"] if "ZNormCallback" in message]
        assert [message for message in said if "has not been tested" not in message] == []


@pytest.mark.parametrize("name", WITHOUT_CALLBACK)
def test_would_miss_the_callback(directory: Path, name: str) -> None:
    run = records(directory, f"{name}-without_callback", 1)[0]
    missing = [message for message in run["warnings"] if "ZNormCallback" in message]
    assert len(missing) == 1
    assert "callbacks" in missing[0]


@pytest.mark.parametrize("name", WITHOUT_CALLBACK)
def test_without_the_callback_the_reference_differs(directory: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    momentum = momentum_of(directory, scenario.resumes)
    with pytest.raises(AssertionError, match="more than allowed"):
        check(name, scenario, records(directory, f"{name}-without_callback", 1)[0], momentum)
