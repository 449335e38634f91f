"""Two processes score different numbers of batches. Called by test_mask_metric.py."""

import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_znorm.metrics import DiceScore, HausdorffDistance, TverskyIndex
from lightning_znorm.metrics.mask_metric import MaskMetric

METRICS: dict[str, Any] = {
    "dice": DiceScore,
    "tversky": TverskyIndex,
    "hausdorff": HausdorffDistance,
    "hd95": lambda: HausdorffDistance(95, spacing=(0.5, 2)),
}
# Numbers of batches of the two processes.
SCENARIOS = {"uneven": (4, 1), "one idle": (3, 0), "nothing": (2, 1)}


def batch_of(scenario: str, number: int) -> tuple[Tensor, Tensor]:
    """Return batches of different sizes, some or all of whose masks are empty."""
    generator = torch.Generator().manual_seed(number)
    preds, target = torch.rand(2, 2 + number, 2, 12, 10, generator=generator)
    preds[0, 0] = target[0] = 0
    if scenario == "nothing":
        preds, target = torch.zeros_like(preds), torch.zeros_like(target)
    return preds, target > 0.9


def score() -> dict[str, dict[str, Any]]:
    """Return for each scenario what one of two processes counts, and the result of both."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    records = {}
    for scenario, batches in SCENARIOS.items():
        record: dict[str, Any] = {}
        metrics = MetricCollection({name: make() for name, make in METRICS.items()})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first = batches[0] if rank else 0
            for number in range(first, first + batches[rank]):
                metrics.update(*batch_of(scenario, number))
            for name, value in metrics.compute().items():
                metric = metrics[name]
                assert isinstance(metric, MaskMetric)
                own = [int(metric.counted), int(metric.skipped)]
                with metric.sync_context():
                    synchronised = [int(metric.counted), int(metric.skipped)]
                record[name] = {"value": value.item(), "own": own, "synchronised": synchronised}
        record["warnings"] = [str(w.message) for w in caught if "before the ``update``" not in str(w.message)]
        records[scenario] = record
    torch.distributed.barrier()  # gloo aborts a process whose partner has left in mid-talk
    # The group is not destroyed: torch 2.6 may hang there, as it holds the GIL and joins a thread that needs it to free
    # the tensors of a collective.
    return records
