"""A DataLoader whose epoch can be taken up again in its middle."""

from collections.abc import Iterator
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_znorm.data.shuffle import EpochShuffle

T = TypeVar("T")


class ResumableLoader(DataLoader[T]):
    """A DataLoader that goes on behind the batches that an interrupted training has had.

    Lightning writes the state of a loader that has one into each checkpoint, and loads it if a training is resumed in
    the middle of an epoch. Batches that were had are left out without being read. With another sampler than
    `EpochShuffle` it is a plain DataLoader.
    """

    trainer: Trainer | None = None
    """Knows how many batches were used up: one more has been handed out, if a step fails halfway."""
    _epoch = -1
    _batches = 0
    _loaded: dict[str, Any] | None = None

    @override
    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        """Iterate over an epoch, which is drawn when its first batch is asked for: Lightning says late which it is."""
        sampler = self.sampler
        if not isinstance(sampler, EpochShuffle):
            yield from super().__iter__()
            return
        if sampler.epoch == self._epoch:  # no trainer counts
            sampler.set_epoch(self._epoch + 1)
        self._epoch, self._batches = sampler.epoch, 0
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded["epoch"] == self._epoch:
            self._check(loaded)
            self._batches = loaded["batches"]
            sampler.skip = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place: the epoch and the number of its batches that were used up."""
        batches = self._batches
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current  # declared too widely
            batches = min(batches, progress.processed)
        return {"epoch": self._epoch, "batches": batches, **self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place, in the next iteration if it is one over the same epoch."""
        self._loaded = state_dict

    def _layout(self) -> dict[str, Any]:
        processes = getattr(self.sampler, "num_replicas", 1)
        return {"batch_size": self.batch_size, "processes": processes, "images": len(self.dataset)}  # type: ignore[arg-type]

    def _check(self, loaded: dict[str, Any]) -> None:
        layout = self._layout().items()
        changed = [f"{name} was {loaded[name]} and is {value}" for name, value in layout if loaded[name] != value]
        if changed:
            raise ValueError(
                f"The checkpoint is of the middle of an epoch, after {loaded['batches']} batches, and batches are "
                f"others now ({', '.join(changed)}): restore that, or go on from the end of an epoch."
            )
