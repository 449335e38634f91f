"""Read and check the files that witness.py writes."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WITNESS = {"PYTHONPATH": str(Path(__file__).parent)}
"""Environment variables with which a program finds witness.py."""


def facts(folder: Path, rank: int) -> dict[str, Any]:
    """Return the facts about a process when training starts."""
    return json.loads((folder / f"{rank}.json").read_text())


def weights(folder: Path, rank: int) -> dict[str, Tensor]:
    """Return the weights of a process when training ends."""
    return torch.load(folder / f"{rank}.pt", weights_only=True)


def check_hosts(folder: Path, environment: str, main_address: str) -> None:
    """Check that each process was alone on its host, and that both trained together."""
    for rank in range(2):
        seen = facts(folder, rank)
        assert (seen["environment"], seen["world_size"], seen["node"]) == (environment, 2, rank)
        assert seen["main_address"] == main_address


def check_same_weights(folder: Path, reference: Path | None = None) -> None:
    """Check that both processes have the same weights to the bit, and equal those of another run up to rounding."""
    first, second = weights(folder, 0), weights(folder, 1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    if reference is not None:
        torch.testing.assert_close(first, weights(reference, 0), rtol=0, atol=1e-6)
