"""A DataLoader whose epoch can be taken up again in its middle."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_znorm.data.shuffle import EpochShuffle
from lightning_znorm.errors import ZNormValueError

T = TypeVar("T")


@dataclass
class _Pass:
    """An iteration over all images.

    Args:
        epoch: Its epoch.
        number: Of the pass, within the epoch.
        skipped: Batches that it left out at its beginning.
        begun: Batches of the epoch that the trainer had used up before this pass handed out the first.
        former: The pass before it, which may not be used up yet.
    """

    epoch: int
    number: int = 0
    skipped: int = 0
    begun: int = 0
    former: "_Pass | None" = None
    ended = False

    def __post_init__(self) -> None:
        self.batches = self.skipped
        """Batches that it has left out or handed out."""

    def used(self, processed: int) -> int:
        """Return how many of them are used up, of the number of batches that the trainer has used up in the epoch."""
        return min(self.batches, max(self.skipped, self.skipped + processed - self.begun))


class ResumableLoader(DataLoader[T]):
    """A DataLoader that goes on behind the batches that an interrupted training has had.

    Lightning writes the state of a loader that has one into each checkpoint, and loads it if a training is resumed in
    the middle of an epoch. Batches that were had are left out without being read. A loader that is cycled beside a
    longer one (`CombinedLoader` in the mode ``max_size_cycle``) has an order of its own in each pass. With another
    sampler than `EpochShuffle` it is a plain DataLoader.
    """

    trainer: Trainer | None = None
    """Knows which epoch it is and how many batches were used up: one more has been handed out, if a step fails."""
    _pass: _Pass | None = None
    _loaded: dict[str, Any] | None = None

    @override
    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        """Iterate over all images, in an order that is drawn with the first batch: Lightning says late which epoch."""
        sampler = self.sampler
        if not isinstance(sampler, EpochShuffle):
            yield from super().__iter__()
            return
        current = self._pass = self._next_pass(sampler)
        sampler.epoch, sampler.pass_number = current.epoch, current.number
        sampler.skip = current.skipped * (self.batch_size or 1)
        for batch in super().__iter__():
            current.batches += 1
            self._pass = current  # a callback may have begun an iteration of its own meanwhile
            yield batch
        current.ended = True

    def state_dict(self) -> dict[str, Any]:
        """Return the place: the epoch, the pass within it, and the number of its batches that were used up."""
        if self._loaded is not None:  # and not gone on from yet
            return self._loaded
        current = self._pass or _Pass(-1)
        batches = current.batches
        if self.trainer is not None:
            _, processed = _processed(self.trainer)
            if current.former is not None and processed <= current.begun:
                current = current.former
            batches = current.used(processed)
        return {"epoch": current.epoch, "pass": current.number, "batches": batches, **self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place, in the next iteration if it is one over the same epoch."""
        self._loaded = state_dict

    def _next_pass(self, sampler: EpochShuffle) -> _Pass:
        last, trainer = self._pass, self.trainer
        running = (TrainerFn.FITTING, TrainerStatus.RUNNING)
        if trainer is not None and (trainer.state.fn, trainer.state.status) == running:
            epoch, processed = _processed(trainer)
        else:
            trainer, epoch, processed = None, sampler.epoch, 0
            if last is not None and last.epoch == epoch and not sampler.counted:
                epoch += 1
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded["epoch"] == epoch:
            self._check(loaded)
            return _Pass(epoch, loaded.get("pass", 0), loaded["batches"], processed)
        if last is None or last.epoch != epoch:
            return _Pass(epoch, begun=processed)
        if trainer is not None and not last.ended and processed <= last.begun:
            # Nothing of the last iteration was used up: somebody took a look at the first batch.
            return _Pass(epoch, last.number, last.skipped, processed, last.former)
        last.former = None
        if trainer is not None and math.isinf(trainer.num_training_batches):
            processed += 1  # where Lightning does not know which batch is the last, it fetches one ahead
        return _Pass(epoch, last.number + 1, begun=processed, former=last)

    def _layout(self) -> dict[str, Any]:
        processes = getattr(self.sampler, "num_replicas", 1)
        return {"batch_size": self.batch_size, "processes": processes, "images": len(self.dataset)}  # type: ignore[arg-type]

    def _check(self, loaded: dict[str, Any]) -> None:
        layout = self._layout().items()
        changed = [f"{name} was {loaded[name]} and is {value}" for name, value in layout if loaded[name] != value]
        if changed:
            raise ZNormValueError(
                f"The checkpoint is of the middle of an epoch, after {loaded['batches']} batches, and batches are "
                f"others now ({', '.join(changed)}): restore that, or go on from the end of an epoch."
            )


def _processed(trainer: Trainer) -> tuple[int, int]:
    """How many epochs a trainer has used up, and how many batches of the epoch that it is in."""
    loop: Any = trainer.fit_loop  # whose counts are declared too widely
    return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.processed
