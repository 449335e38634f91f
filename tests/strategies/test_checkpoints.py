"""A run that is resumed, by as many processes or others, goes on as the reference does, with the callback."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_znorm.cli.checkpoints import check_checkpoint
from tests.large_steps import LARGE_STEPS
from tests.strategies.conftest import Runs
from tests.strategies.reference import check
from tests.strategies.scenarios import SCENARIOS, Scenario, selected
from tests.strategies.strategies import Weights
from tests.strategies.training import STEPS

Momentum = Callable[[str], Weights]


def resumed(name: str, scenario: Scenario) -> bool:
    return scenario.resumes is not None and not scenario.without_callback


def resumed_without_callback(name: str, scenario: Scenario) -> bool:
    return scenario.without_callback


@pytest.fixture(scope="session")
def momentum(runs: Runs) -> Momentum:
    """Return what a run that is right leaves to the one that goes on."""
    known: dict[str, Weights] = {}

    def of(name: str) -> Weights:
        if name not in known:
            known[name] = check(name, SCENARIOS[name], runs(name)[0])
        return known[name]

    return of


@pytest.mark.parametrize("name", selected(lambda name, scenario: scenario.saves))
def test_holds_no_code(runs: Runs, directory: Path, name: str) -> None:
    """Otherwise the command line would refuse it."""
    runs(name)
    check_checkpoint(str(directory / f"{name}.ckpt"))


@pytest.mark.parametrize("name", selected(resumed))
def test_goes_on(runs: Runs, momentum: Momentum, name: str) -> None:
    scenario = SCENARIOS[name]
    saved, resumed = runs(scenario.resumes)[0], runs(name)[0]
    for key, weight in saved["weights"][-1].items():
        assert torch.equal(weight, resumed["weights"][0][key]), key
    check(name, scenario, resumed, momentum(scenario.resumes))


@pytest.mark.parametrize("name", selected(lambda name, scenario: scenario.epochs == 2))
def test_goes_on_as_if_it_had_not_ended(runs: Runs, name: str) -> None:
    saved, resumed = (runs(name.replace("whole", end)) for end in ("save", "resume-2"))
    for whole, first, second in zip(runs(name), saved, resumed, strict=True):
        assert len(whole["weights"]) == 2 * STEPS + 1
        for start, part in ((0, first), (STEPS, second)):
            for ours, theirs in zip(whole["weights"][start : start + STEPS + 1], part["weights"], strict=True):
                assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", selected(resumed))
def test_does_not_miss_the_callback(runs: Runs, name: str) -> None:
    for run in runs(name):
        said = [message for message in run["warnings"] if "ZNormCallback" in message and LARGE_STEPS not in message]
        assert [message for message in said if "has not been tested" not in message] == []


@pytest.mark.parametrize("name", selected(resumed_without_callback))
def test_would_miss_the_callback(runs: Runs, name: str) -> None:
    said = (message for message in runs(name)[0]["warnings"] if LARGE_STEPS not in message)
    missing = [message for message in said if "ZNormCallback" in message]
    assert len(missing) == 1
    assert "callbacks" in missing[0]


@pytest.mark.parametrize("name", selected(resumed_without_callback))
def test_without_the_callback_the_reference_differs(runs: Runs, momentum: Momentum, name: str) -> None:
    scenario = SCENARIOS[name]
    with pytest.raises(AssertionError, match="more than allowed"):
        check(name, scenario, runs(name)[0], momentum(scenario.resumes))
