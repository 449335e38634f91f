"""Two processes test slices of shared patients. Called by test_scores.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_znorm.tasks import SegmentationTask

PATIENTS = ["anna", "ben", "anna", "carl", "carl", "ben", "anna", "dora"]


class Slices(Dataset):
    """Eight slices of four patients, whose logits are the images; no slice of the last patient is marked."""

    def __init__(self, classes: int = 3, patients: Sequence[str] | None = PATIENTS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(len(PATIENTS), classes, 6, 7, generator=generator)
        self.masks = torch.randint(classes, (len(PATIENTS), 1, 6, 7), generator=generator)
        self.masks[[0, 3, 7]] = 0
        self.images[7, 0] = 9  # the background is predicted there
        self.images[3, 0] = 9
        self.patients = patients

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        said = {"slice": index, "name": f"{index}.png"}
        return (
            self.images[index],
            self.masks[index],
            said | ({"patient": self.patients[index]} if self.patients else {}),
        )


def task(**kwargs: Any) -> SegmentationTask:
    """Return a task whose network returns its images; a parameter is there for the optimizer."""
    network = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
    return SegmentationTask(network, **{"num_classes": 3, "activation": "softmax", **kwargs})


def with_names_in_one_process() -> Mapping[str, float]:
    """Return what was logged of slices of which one process names the patients, and the other says None."""
    return _tested(Slices(patients=["anna", None] * 4))


def test_in_two_processes() -> Mapping[str, float]:
    """Return what was logged."""
    return _tested(Slices())


def _collated(samples: list[Any]) -> tuple[Tensor, Tensor, dict[str, list[Any]]]:
    images, masks, said = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(masks), {"patient": [each["patient"] for each in said]}


def _tested(data: Slices) -> Mapping[str, float]:
    run = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=3, collate_fn=_collated)
    (result,) = run.test(task(class_names=["kidney", "tumour"]), loader, verbose=False)
    return result
