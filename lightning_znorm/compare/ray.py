"""Runs on the machines of a Ray cluster (extra ``ray``), which share the study's folder and the working directory."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from lightning_znorm.compare.one_run import Outcome, do_run
from lightning_znorm.compare.process import Processes
from lightning_znorm.compare.study import Run, StudyError
from lightning_znorm.errors import ZNormRuntimeError


class LostError(ZNormRuntimeError):
    """A run whose Ray worker does not tell what became of it; the message says why, in words."""


_SECONDS_TO_END = 10
"""How long an interrupted study waits for its tasks elsewhere."""
_KILL_AT_END_OF_INPUT = "import os, sys; sys.stdin.read(); getattr(os, 'killpg', os.kill)(int(sys.argv[1]), 9)"
_REASONS = {
    "OutOfMemoryError": "Ray ended this run, for its machine was about to run out of memory (more --cpus for each run "
    "make fewer go on there at a time)",
    "WorkerCrashedError": "The Ray worker of this run died, so that it was ended too: something killed the worker, or "
    "it crashed",
    "NodeDiedError": "The machine of this run has left the Ray cluster, or is out of reach",
    "LocalRayletDiedError": "Ray has ended on the machine of this run",
    "TaskCancelledError": "This run was cancelled in Ray",
    "CancelledError": "This run was cancelled",
}
"""What Ray's errors mean, by their names, which are not the same in all of its versions."""


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
        future: Future[Outcome] = Future()
        reference.future().add_done_callback(lambda done: _hand_on(done, future))
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
    return do_run(run, monitored, processes=_LeashedProcesses(run.timeout))


class _LeashedProcesses(Processes):
    """Processes that are killed when this one dies: Ray gives the place of a worker that died to the next run."""

    @contextmanager
    def _started(
        self, args: Sequence[str], environment: Mapping[str, str], options: Mapping[str, Any]
    ) -> Iterator["subprocess.Popen[bytes]"]:
        with super()._started(args, environment, options) as process, _killed_with_this_process(process.pid):
            yield process


@contextmanager
def _killed_with_this_process(group: int) -> Iterator[None]:
    """Let a small process watch this one, and kill a group of processes if this one dies before the end.

    It reads from a pipe that nobody else writes to, which ends with this process whatever ends it, SIGKILL among it.
    """
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _KILL_AT_END_OF_INPUT, str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # else what is sent to this process's group would end it too
    )
    try:
        yield
    finally:
        watch.kill()  # before its pipe is closed
        watch.communicate()


def _hand_on(done: "Future[Outcome]", future: "Future[Outcome]") -> None:
    """End a future as Ray's has ended, with an error in plain words; whatever happens, nobody waits for it forever."""
    try:
        future.set_result(done.result())
    except BaseException as error:
        future.set_exception(_explained(error))


def _explained(error: BaseException) -> LostError:
    for kind in type(error).__mro__:
        if kind.__name__ in _REASONS:
            return LostError(f"{_REASONS[kind.__name__]}.")
    cause = getattr(error, "cause", None)  # of what was raised in the worker
    what = "failed" if cause else "was lost"
    first_line = str(cause or error).strip().partition("\n")[0]
    return LostError(f"The Ray worker of this run {what}: {type(cause or error).__name__}: {first_line}")
