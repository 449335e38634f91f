"""What witness.py has written down."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WITNESS = {"PYTHONPATH": str(Path(__file__).parent)}
"""Environment in which a program finds witness.py."""


def facts(folder: Path, rank: int) -> dict[str, Any]:
    """What is to be known of a process, when training starts."""
    return json.loads((folder / f"{rank}.json").read_text())


def weights(folder: Path, rank: int) -> dict[str, Tensor]:
    """The weights of a process, when training ends."""
    return torch.load(folder / f"{rank}.pt", weights_only=True)


def check_hosts(folder: Path, environment: str, main_address: str) -> None:
    """Each process was alone on its host, and both trained together."""
    for rank in range(2):
        seen = facts(folder, rank)
        assert (seen["environment"], seen["world_size"], seen["node"]) == (environment, 2, rank)
        assert seen["main_address"] == main_address


def check_same_weights(folder: Path, reference: Path | None = None) -> None:
    """Both processes have the same weights, to the bit, and those of another run, to rounding."""
    first, second = weights(folder, 0), weights(folder, 1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    if reference is not None:
        torch.testing.assert_close(first, weights(reference, 0), rtol=0, atol=1e-6)
