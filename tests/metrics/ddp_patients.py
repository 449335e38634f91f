"""Two processes hold different slices of the same patients. Called by test_patients.py."""

import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_znorm.metrics import MaskCount, PatientCount, PatientDiceScore

METRICS: dict[str, Any] = {
    "dice": PatientDiceScore,
    "best": lambda: PatientDiceScore(empty="best"),
    "counted": PatientCount,
    "left out": lambda: PatientCount(left_out=True),
    "masks": MaskCount,
    "masks left out": lambda: MaskCount(left_out=True),
}
# Numbers of batches of the two processes.
SCENARIOS = {"uneven": (4, 1), "one idle": (3, 0), "idle first": (0, 2), "nothing": (2, 1)}


def batch_of(scenario: str, number: int) -> tuple[Tensor, Tensor, list[str | None]]:
    """Return slices of patients that are also in other batches, of a patient without a mask, and of an unknown one."""
    generator = torch.Generator().manual_seed(number)
    preds, target = torch.rand(2, 4 + number, 2, 6, 5, generator=generator)
    preds[0] = target[0] = 0
    if scenario == "nothing":
        preds, target = torch.zeros_like(preds), torch.zeros_like(target)
    names = ["empty", "anna", "ben", None, *["anna", "ben", "cem", "anna"][:number]]
    return preds, target > 0.8, names


def score(together: bool) -> dict[str, dict[str, Any]]:
    """Return for each scenario the results of two processes, and what one of them has for itself afterwards."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    records = {}
    for scenario, batches in SCENARIOS.items():
        record: dict[str, Any] = {}
        metrics = MetricCollection({name: make() for name, make in METRICS.items()}, compute_groups=together)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first = batches[0] if rank else 0
            for number in range(first, first + batches[rank]):
                preds, target, names = batch_of(scenario, number)
                metrics.update(preds, target, patient=names)
            for _ in range(2):  # the second time, the states have been synchronised and put back
                record["values"] = {name: value.item() for name, value in metrics.compute().items()}
                metrics["dice"]._computed = None
            dice: Metric = metrics["dice"]
            assert isinstance(dice, PatientDiceScore)
            record["own"] = [int(dice.counted), int(dice.skipped)]
            with dice.sync_context():
                record["synchronised"] = [int(dice.counted), int(dice.skipped)]
            metrics.reset()
            record["reset"] = [int(dice.counted), int(dice.skipped)]
        record["warnings"] = [str(w.message) for w in caught if "before the ``update``" not in str(w.message)]
        records[scenario] = record
    torch.distributed.barrier()  # gloo aborts a process whose partner has left in mid-talk
    # The group is not destroyed: torch 2.6 may hang there, as it holds the GIL and joins a thread that needs it to free
    # the tensors of a collective.
    return records
