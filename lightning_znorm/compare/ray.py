"""Runs on the machines of a Ray cluster (extra ``ray``), which share the study's folder and the working directory."""

import os
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from lightning_znorm.compare.one_run import Outcome, do_run
from lightning_znorm.compare.study import Run, StudyError

_SECONDS_TO_END = 10
"""How long an interrupted study waits for its tasks elsewhere."""


class RayCluster:
    """Does each run as a Ray task.

    Args:
        ray: The module, connected to a cluster.
        cpus: CPU cores of each run.
        gpus: GPUs of each run, or a fraction of one.
        monitored: Whether runs have a best checkpoint to test.
    """

    def __init__(self, ray: Any, cpus: float, gpus: float, monitored: bool) -> None:
        self._ray = ray
        self._monitored = monitored
        self._references: list[Any] = []
        # A run goes on from its last checkpoint when the same command is given again; Ray is not to repeat a crash.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0, "scheduling_strategy": "SPREAD"}
        self._task = ray.remote(**options)(_do_run_there)

    def submit(self, run: Run) -> "Future[Outcome]":
        """Do a run as soon as the cluster has place for it."""
        reference = self._task.remote(run, self._monitored, os.getcwd(), [path for path in sys.path if path])
        self._references.append(reference)
        future: Future[Outcome] = reference.future()
        return future

    def stop(self) -> None:
        """End all that run, and wait until they have."""
        for reference in self._references:
            self._ray.cancel(reference, force=False)  # an interruption there, so that processes of the run are ended
        if self._references:
            self._ray.wait(self._references, num_returns=len(self._references), timeout=_SECONDS_TO_END)


@contextmanager
def ray_cluster(address: str, cpus: float, gpus: float, monitored: bool) -> Iterator[RayCluster]:
    """Connect to a cluster.

    Args:
        address: Of the cluster, as `ray.init` knows it: ``"auto"`` is the one that this machine belongs to.
        cpus: CPU cores of each run.
        gpus: GPUs of each run, or a fraction of one.
        monitored: Whether runs have a best checkpoint to test.

    Raises:
        StudyError: If Ray is not installed, no cluster is there, or none of its machines is large enough.
    """
    try:
        import ray
    except ImportError:
        raise StudyError("--ray needs Ray: pip install 'lightning-znorm[ray]'.") from None
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise StudyError(f"No Ray cluster at {address} ({error}): start one with `ray start --head`.") from error
    try:
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in _nodes(ray)):
            raise StudyError(f"No machine of the Ray cluster has {cpus:g} CPU cores and {gpus:g} GPUs for a run.")
        cluster = RayCluster(ray, cpus, gpus, monitored)
        try:
            yield cluster
        except BaseException:
            cluster.stop()
            raise
    finally:
        if mine:
            ray.shutdown()


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _do_run_there(run: Run, monitored: bool, folder: str, paths: list[str]) -> Outcome:
    import ray

    place = f"{platform.node()}, Ray node {ray.get_runtime_context().get_node_id()}"
    if not run.config.is_file():
        return Outcome(run, f"{run.config} is not on {place}: --output must be a folder that all machines share.")
    with run.log.open("a", encoding="utf-8") as log:
        log.write(f"# on {place}\n")
    os.chdir(folder)
    sys.path += [path for path in paths if path not in sys.path]
    return do_run(run, monitored)
