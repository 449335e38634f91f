"""Base of the data modules whose sets are drawn by patient."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_znorm.arguments import checked_folder, checked_number
from lightning_znorm.data.array_file import cache_folder
from lightning_znorm.data.base import ImageDataModule
from lightning_znorm.data.listing import some
from lightning_znorm.data.splits import split_patients
from lightning_znorm.data.transforms import Described, checked_transform
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.hyperparameters import plain_values


class PatientDataModule(ImageDataModule):
    """Base of the data modules of images and masks whose sets are drawn by patient.

    No patient is in two sets. The lists of patients are in `patients`, in the log, in the hyperparameters and in every
    checkpoint. A checkpoint is refused if it was trained on patients that it would be validated or tested on.

    A subclass calls `draw_patients` in ``setup``, and sets ``predict_set``, too.

    Args:
        batch_size: Images per batch and process.
        val_fraction: Share of the patients to validate on.
        test_fraction: Share of the patients to test on.
        seed: Draws the patients to validate and test on, and nothing else.
        num_workers: Worker processes per loader and process.
        train_transform: Transforms of each training image and its mask.
        predict_root: Folder of images to predict for. Without it, the test images.
        max_memory_gb: Size of the decoded images, in GB, up to which they are held in memory.
        cache_dir: Folder for larger ones.

    Raises:
        ValueError: If one of these is out of range.
        TypeError: If one is of another type.
    """

    predict_set: Dataset[Any]
    patients_are_named = True
    """Whether patients have names of their own, so that the log lists them."""

    def __init__(
        self,
        batch_size: int,
        val_fraction: float,
        test_fraction: float,
        seed: int,
        num_workers: int = 0,
        train_transform: Described = None,
        predict_root: str | Path | None = None,
        max_memory_gb: float = 4.0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers)
        test_fraction, predict_root, max_memory_gb, cache_dir = plain_values(
            test_fraction=test_fraction, predict_root=predict_root, max_memory_gb=max_memory_gb, cache_dir=cache_dir
        )
        self.test_fraction = checked_number("test_fraction", test_fraction)
        self.max_memory = checked_number("max_memory_gb", max_memory_gb, minimum=0) * 1e9
        if not 0 < test_fraction < 1 - self.val_fraction:
            raise ZNormValueError(
                f"test_fraction is the share of patients to test on, in (0, 1 - val_fraction): {test_fraction}."
            )
        self.train_transform = checked_transform("train_transform", train_transform)
        self.predict_root = None if predict_root is None else checked_folder("predict_root", predict_root)
        self.cache = cache_folder(cache_dir)
        self.patients: dict[str, list[str]] = {}
        """The patients of ``"train"``, ``"val"`` and ``"test"``, once they are drawn in `setup`."""

    def draw_patients(self, shares: Mapping[str, float]) -> None:
        """Draw the patients of each set.

        Args:
            shares: How much each patient has of what is marked, so that each set gets patients with little and much.

        Raises:
            ValueError: If no patient remains for training.
        """
        self.patients = split_patients(shares, self.val_fraction, self.test_fraction, self.seed)
        self.save_hyperparameters({"patients": self.patients})
        data = type(self).__name__.removesuffix("DataModule")
        for name, listed in self.patients.items():
            listing = f": {', '.join(listed)}" if self.patients_are_named else ""
            rank_zero_info(f"{data} {name} patients ({len(listed)}){listing}")

    def refuse_other_settings(self, *names: str) -> None:
        """Refuse a `SegmentationTask` that was given other settings than these data.

        Lightning would say so after all images are decoded, in words that name neither.

        Args:
            names: Of attributes that both have.

        Raises:
            ValueError: If one differs.
        """
        module = getattr(self.trainer, "lightning_module", None)
        # By name, because data modules do not import tasks. Another module may mean something else by these words.
        if not any(base.__name__ == "SegmentationTask" for base in type(module).__mro__):
            return
        for name in names:
            ours = getattr(self, name)
            theirs = getattr(module, name, ours)
            if theirs != ours:
                value = theirs if ours is None else ours
                way_out = f"write {name}: {value} in both" if None in (ours, theirs) else "set both to one number"
                raise ZNormValueError(
                    f"data.init_args.{name} is {_in_yaml(ours)}, and model.init_args.{name} is {_in_yaml(theirs)}: "
                    f"{way_out}."
                )

    def refuse_idle_processes(self, count: int, what: str) -> None:
        """Refuse to predict for fewer images than processes, at which Lightning's sampler fails without a word.

        Args:
            count: Number of images to predict for.
            what: What an image is called.

        Raises:
            ValueError: If there are more processes.
        """
        processes = self.processes().get("num_replicas", 1)
        if count < processes:
            are = f"1 {what} is" if count == 1 else f"{count} {what}s are"
            raise ZNormValueError(
                f"{are} too few for {processes} processes: set trainer.devices to {count} or less to predict."
            )

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the images to predict for."""
        return self.loader(self.predict_set, shuffle=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the lists of patients, and the seed of the orders."""
        return {"patients": self.patients, **super().state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on the patients that it would be judged by.

        A resumed training warns if its patients are not those of the checkpoint.
        """
        super().load_state_dict(state_dict)
        if self.trainer is None:  # in `load_from_checkpoint`, which judges nothing yet
            return
        trained = state_dict["patients"]
        seen = {"val": trained["train"], "test": trained["train"] + trained["val"]}
        # The checkpoint of a resumed training holds the sets of that training only, so both sets must be right there.
        judged_by: dict[TrainerFn | None, list[str]] = {
            TrainerFn.VALIDATING: ["val"],
            TrainerFn.TESTING: ["test"],
            TrainerFn.PREDICTING: [],
        }
        for name in judged_by.get(self.trainer.state.fn, ["test", "val"]):
            if shared := set(self.patients[name]) & set(seen[name]):
                raise ZNormValueError(
                    f"The checkpoint was trained or chosen on {len(shared)} of the patients of the {name} set "
                    f"({some(shared)}): use the seed, the fractions and the data that it was trained with."
                )
        if self.trainer.state.fn == TrainerFn.FITTING and (changes := _changes(trained, self.patients)):
            rank_zero_warn(
                f"The training that is resumed had other patients ({some(changes)}): its scores so far, by which the "
                "best checkpoint is chosen, are not of the patients of the scores to come. Use the seed, the fractions "
                "and the data that it began with, or train anew."
            )


def _changes(before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> list[str]:
    """Return which patients are in another set than before, in words."""
    was, is_in = ({patient: name for name in sets for patient in sets[name]} for sets in (before, now))
    changes = [
        f"{each} moved from {was[each]} to {is_in[each]}" for each in was if is_in.get(each, was[each]) != was[each]
    ]
    changes += [f"{each} of {name} is gone" for each, name in was.items() if each not in is_in]
    return changes + [f"{each} is new in {name}" for each, name in is_in.items() if each not in was]


def _in_yaml(value: Any) -> Any:
    return "null" if value is None else value
