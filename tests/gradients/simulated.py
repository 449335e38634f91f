"""Processes simulated by threads, so that many random cases of what they exchange run in little time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

T = TypeVar("T")
_thread = threading.local()


class Group:
    """A process group of some ranks: all the kernel asks of one."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.barrier = threading.Barrier(len(self.ranks), timeout=20)
        self.calls = 0
        self._device_types = [torch.device("cpu")]
        self._given: dict[int, Tensor] = {}

    def all_reduce(self, tensor: Tensor) -> None:
        self._given[_thread.rank] = tensor
        if self.barrier.wait() == 0:
            self.calls += 1
        given = [self._given[rank] for rank in self.ranks]
        assert len({(one.shape, one.dtype) for one in given}) == 1, "ranks disagree on what they sum"
        total = torch.stack(given).sum(0)
        self.barrier.wait()
        tensor.copy_(total)


@contextmanager
def _collectives() -> Iterator[None]:
    def all_reduce(tensor: Tensor, op: Any = None, group: Any = None) -> None:
        assert op is None
        group.all_reduce(tensor)

    with patch("torch.distributed.all_reduce", all_reduce):
        yield


def on_ranks(size: int, groups: Sequence[Group], function: Callable[[int], T]) -> list[T]:
    """Return what a function of the rank returns on each rank; all run at once, and fail together."""

    def run(rank: int) -> T:
        _thread.rank = rank
        try:
            return function(rank)
        except BaseException:
            for group in groups:
                group.barrier.abort()
            raise

    with _collectives(), ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        if errors:
            raise errors[0]
        return [future.result() for future in futures]
