"""A DataLoader whose epoch can be resumed in the middle."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_znorm.data.samplers import EpochSampler
from lightning_znorm.errors import ZNormValueError

T = TypeVar("T")


@dataclass
class _Pass:
    """An iteration over all images.

    Args:
        epoch: Its epoch.
        number: Of the pass, within the epoch.
        skipped: Batches that it left out at its beginning.
        begun: Batches of the epoch that the trainer had processed before this pass gave its first.
        former: The pass before it, whose batches may not all be processed yet.
    """

    epoch: int
    number: int = 0
    skipped: int = 0
    begun: int = 0
    former: "_Pass | None" = None
    ended = False

    def __post_init__(self) -> None:
        self.batches = self.skipped
        """Batches that it has left out or given."""

    def processed(self, of_epoch: int) -> int:
        """Return how many of its batches are processed, given the number of the epoch's batches that are."""
        return min(self.batches, max(self.skipped, self.skipped + of_epoch - self.begun))


class ResumableLoader(DataLoader[T]):
    """A DataLoader that continues after the batches that an interrupted training has processed.

    Lightning writes the state of a loader that has one into each checkpoint, and loads it if a training is resumed in
    the middle of an epoch. Processed batches are skipped without being read. A loader that is cycled beside a longer
    one (`CombinedLoader` in the mode ``max_size_cycle``) has another order in each pass. With a sampler other than
    `EpochSampler` it is a plain DataLoader.

    torchdata's StatefulDataLoader is not used: it counts the batches that it gave, and Lightning may have fetched one
    that it has not trained on; nor does it know Lightning's epochs.
    """

    trainer: Trainer | None = None
    """Knows the epoch and how many of its batches are processed. One more has been given if a step fails."""
    _pass: _Pass | None = None
    _loaded: dict[str, Any] | None = None

    @override
    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        """Iterate over all images; the order is drawn with the first batch, because Lightning sets the epoch late."""
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):
            yield from super().__iter__()
            return
        current = self._pass = self._next_pass(sampler)
        sampler.epoch, sampler.pass_number = current.epoch, current.number
        sampler.skip = current.skipped * (self.batch_size or 1)
        for batch in super().__iter__():
            current.batches += 1
            self._pass = current  # a callback may have begun another iteration meanwhile
            yield batch
        current.ended = True

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch, the pass within it, and the number of its batches that are processed."""
        if self._loaded is not None:  # nothing was iterated since it was loaded
            return self._loaded
        current = self._pass or _Pass(-1)
        batches = current.batches
        if self.trainer is not None:
            _, processed = _processed(self.trainer)
            if current.former is not None and processed <= current.begun:
                current = current.former
            batches = current.processed(processed)
        return {"epoch": current.epoch, "pass": current.number, "batches": batches, **self._batching()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position in the next iteration, if that is in the same epoch."""
        self._loaded = state_dict

    def _next_pass(self, sampler: EpochSampler) -> _Pass:
        last, trainer = self._pass, self.trainer
        running = (TrainerFn.FITTING, TrainerStatus.RUNNING)
        if trainer is not None and (trainer.state.fn, trainer.state.status) == running:
            epoch, processed = _processed(trainer)
        else:
            trainer, epoch, processed = None, sampler.epoch, 0
            if last is not None and last.epoch == epoch and not sampler.epoch_was_set:
                epoch += 1
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded["epoch"] == epoch:
            self._check(loaded)
            return _Pass(epoch, loaded.get("pass", 0), loaded["batches"], processed)
        if last is None or last.epoch != epoch:
            return _Pass(epoch, begun=processed)
        if trainer is not None and not last.ended and processed <= last.begun:
            # No batch of the last iteration was processed: a callback has looked at the first one.
            return _Pass(epoch, last.number, last.skipped, processed, last.former)
        last.former = None
        if trainer is not None and math.isinf(trainer.num_training_batches):
            processed += 1  # where Lightning does not know which batch is the last, it fetches one ahead
        return _Pass(epoch, last.number + 1, begun=processed, former=last)

    def _batching(self) -> dict[str, Any]:
        processes = getattr(self.sampler, "num_replicas", 1)
        return {"batch_size": self.batch_size, "processes": processes, "images": len(self.dataset)}  # type: ignore[arg-type]

    def _check(self, loaded: dict[str, Any]) -> None:
        current = self._batching().items()
        changed = [f"{name} was {loaded[name]} and is {value}" for name, value in current if loaded[name] != value]
        if changed:
            raise ZNormValueError(
                f"The checkpoint is from the middle of an epoch, after {loaded['batches']} batches, and the batches "
                f"have changed ({', '.join(changed)}): restore that, or resume from the end of an epoch."
            )


def _processed(trainer: Trainer) -> tuple[int, int]:
    """Return how many epochs a trainer has processed, and how many batches of its current epoch."""
    loop: Any = trainer.fit_loop  # its counts are declared too widely
    return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.processed
