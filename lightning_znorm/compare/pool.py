"""Runs side by side on this machine."""

import os
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from lightning_znorm.compare.one_run import Outcome, do_run
from lightning_znorm.compare.process import Processes, Stopped
from lightning_znorm.compare.study import Run


class Pool:
    """A thread for each run that goes on, with its share of the CPU cores and GPUs.

    Args:
        jobs: How many runs go on at a time.
        devices: How many GPUs each run asks for; none where runs name their own.
        monitored: Whether runs have a best checkpoint to test.
        processes: Starts their processes.
    """

    def __init__(self, jobs: int, devices: int | None, monitored: bool, processes: Processes) -> None:
        self.monitored = monitored
        self.processes = processes
        self._threads = ThreadPoolExecutor(jobs)
        self._places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for environment in environments(jobs, devices):
            self._places.put(environment)

    def submit(self, run: Run) -> "Future[Outcome]":
        """Do a run as soon as there is place for it."""
        return self._threads.submit(self._do, run)

    def _do(self, run: Run) -> Outcome:
        environment = self._places.get()
        try:
            return do_run(run, self.monitored, environment, self.processes)
        except Stopped:
            return Outcome(run, "stopped")
        finally:
            self._places.put(environment)


@contextmanager
def pool(jobs: int, devices: int | None, monitored: bool, processes: Processes) -> Iterator[Pool]:
    """A pool, which ends its processes when it is left early."""
    opened = Pool(jobs, devices, monitored, processes)
    try:
        yield opened
    except BaseException:
        try:
            opened._threads.shutdown(wait=False, cancel_futures=True)
        finally:  # also if this is interrupted in turn
            processes.stop()
        raise
    finally:
        opened._threads.shutdown()


def environments(jobs: int, devices: int | None, gpus: list[str] | None = None) -> list[dict[str, str]]:
    """The environment of each of ``jobs`` runs side by side.

    Args:
        jobs: Runs side by side; one alone has the whole machine.
        devices: How many GPUs each asks for; none where runs name their own.
        gpus: The GPUs there are, by the names that ``CUDA_VISIBLE_DEVICES`` knows; by default this machine's.

    Example:
        >>> [environment["CUDA_VISIBLE_DEVICES"] for environment in environments(3, 1, ["0", "1"])]
        ['0', '1', '0']
    """
    if jobs == 1:
        return [{}]
    shared = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    gpus = visible_gpus() if gpus is None else gpus
    if not gpus or devices is None:
        return [shared] * jobs
    each = [[gpus[(job * devices + i) % len(gpus)] for i in range(devices)] for job in range(jobs)]
    return [shared | {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(names))} for names in each]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """This machine's GPUs, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
