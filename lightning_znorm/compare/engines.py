"""Where runs go on: side by side on this machine, or on a Ray cluster.

An engine takes runs and returns futures of their outcomes. Ray (extra ``ray``) needs the study's folder and the working
directory on all machines.
"""

import math
import os
import platform
import queue
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_znorm.compare.cores import notes_on_cores, thread_variables
from lightning_znorm.compare.forks import ForkedProcess
from lightning_znorm.compare.processes import Processes, Stopped, import_paths
from lightning_znorm.compare.runner import fit_and_test
from lightning_znorm.compare.settings import values_by_path
from lightning_znorm.compare.study import Outcome, Plan, Run, StudyError
from lightning_znorm.errors import ZNormImportError, ZNormRuntimeError
from lightning_znorm.requirements import require

_SECONDS_FOR_RAY = 10
"""How long an interrupted study waits for its Ray tasks to end."""
_KILL_AT_END_OF_INPUT = """\
import contextlib, os, psutil, sys
root = psutil.Process(int(sys.argv[1]))
sys.stdin.read()
tree = [root]
with contextlib.suppress(psutil.Error):
    tree += root.children(recursive=True)
if hasattr(os, "killpg"):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(root.pid, 9)
for process in tree:
    with contextlib.suppress(psutil.Error):
        process.kill()
"""
_RAY_REASONS = {
    "OutOfMemoryError": "Ray ended this run, because its machine was about to run out of memory (with more --cpus for "
    "each run, fewer runs share a machine)",
    "WorkerCrashedError": "The Ray worker of this run died, so the run was ended, too: something killed the worker, or "
    "it crashed",
    "NodeDiedError": "The machine of this run has left the Ray cluster, or cannot be reached",
    "LocalRayletDiedError": "Ray has ended on the machine of this run",
    "TaskCancelledError": "This run was cancelled in Ray",
    "CancelledError": "This run was cancelled",
}
"""What Ray's errors mean, by class name: the classes are not the same in all versions of Ray."""


class LostError(ZNormRuntimeError):
    """The Ray worker of a run does not say how the run ended. The message says why."""


@dataclass(frozen=True)
class Resources:
    """What a study runs on.

    Args:
        jobs: Number of runs side by side on this machine.
        ray: Address of a Ray cluster to run on instead.
        cpus: CPU cores of each run on Ray.
        gpus: GPUs of each run on Ray, or a fraction of one.
    """

    jobs: int = 1
    ray: str | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise StudyError(f"--jobs is how many runs go on side by side, at least 1: {self.jobs}.")
        for name, number in (("cpus", self.cpus), ("gpus", self.gpus)):
            if not 0 <= number < math.inf:
                raise StudyError(f"--{name} is what each run takes of a Ray cluster, 0 or more: {number:g}.")


class LocalEngine:
    """Runs each run in a thread, with its share of the CPU cores and GPUs of this machine.

    Args:
        jobs: Number of runs at a time.
        devices: GPUs of each run; ``None`` if runs name their own.
        monitored: Whether runs have a best checkpoint to test.
        processes: Starts their processes.
        processes_each: Number of processes of each run.
    """

    def __init__(
        self, jobs: int, devices: int | None, monitored: bool, processes: Processes, processes_each: int = 1
    ) -> None:
        self.monitored = monitored
        self.processes = processes
        self._threads = ThreadPoolExecutor(jobs)
        self._shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for environment in environments(jobs, devices, processes_each=processes_each):
            self._shares.put(environment)

    def submit(self, run: Run) -> "Future[Outcome]":
        """Submit a run; it starts when a share of the machine is free."""
        return self._threads.submit(self._execute, run)

    def close(self) -> None:
        """Wait until all runs have ended."""
        self._threads.shutdown()

    def stop(self) -> None:
        """Start no more runs, and end the processes of those that go on."""
        try:
            self._threads.shutdown(wait=False, cancel_futures=True)
        finally:  # also if this is interrupted, too
            self.processes.stop()

    def _execute(self, run: Run) -> Outcome:
        environment = self._shares.get()
        try:
            return fit_and_test(run, self.monitored, environment, self.processes)
        except Stopped:
            return Outcome(run, "stopped")
        finally:
            self._shares.put(environment)


class RayEngine:
    """Runs each run as a Ray task.

    Args:
        ray: The module, connected to a cluster.
        cpus: CPU cores of each run.
        gpus: GPUs of each run, or a fraction of one.
        monitored: Whether runs have a best checkpoint to test.
    """

    def __init__(self, ray: Any, cpus: float, gpus: float, monitored: bool) -> None:
        self.monitored = monitored
        self._ray = ray
        self._references: list[Any] = []
        # The same command resumes a run from its last checkpoint, so Ray must not repeat a crash.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0, "scheduling_strategy": "SPREAD"}
        self._task = ray.remote(**options)(_execute_on_ray)

    def submit(self, run: Run) -> "Future[Outcome]":
        """Submit a run; it starts when a machine of the cluster is free."""
        reference = self._task.remote(run, self.monitored, os.getcwd(), [path for path in sys.path if path])
        self._references.append(reference)
        future: Future[Outcome] = Future()
        reference.future().add_done_callback(lambda done: copy_result(done, future))
        return future

    def stop(self) -> None:
        """End all runs, and wait until they have ended."""
        for reference in self._references:
            self._ray.cancel(reference, force=False)  # interrupts the task, so that it ends its processes
        if self._references:
            self._ray.wait(self._references, num_returns=len(self._references), timeout=_SECONDS_FOR_RAY)


def open_engine(
    plan: Plan, resources: Resources, processes: Processes
) -> AbstractContextManager[LocalEngine | RayEngine]:
    """Open the engine that a study runs on.

    Args:
        plan: The study.
        resources: What it runs on.
        processes: Starts the processes of runs on this machine.
    """
    if resources.ray is None:
        return local_engine(resources.jobs, devices_per_run(plan), plan.monitored, processes, processes_per_run(plan))
    return ray_engine(resources.ray, resources.cpus, resources.gpus, plan.monitored)


@contextmanager
def local_engine(
    jobs: int, devices: int | None, monitored: bool, processes: Processes, processes_each: int = 1
) -> Iterator[LocalEngine]:
    """Open an engine on this machine. It ends its processes if an exception leaves the context.

    Args:
        jobs: Number of runs at a time.
        devices: GPUs of each run; ``None`` if runs name their own.
        monitored: Whether runs have a best checkpoint to test.
        processes: Starts their processes.
        processes_each: Number of processes of each run.
    """
    engine = LocalEngine(jobs, devices, monitored, processes, processes_each)
    try:
        yield engine
    except BaseException:
        engine.stop()
        raise
    finally:
        engine.close()


@contextmanager
def ray_engine(address: str, cpus: float, gpus: float, monitored: bool) -> Iterator[RayEngine]:
    """Connect to a Ray cluster. The engine ends its runs if an exception leaves the context.

    Args:
        address: Address of the cluster, as `ray.init` takes it: ``"auto"`` is the one that this machine belongs to.
        cpus: CPU cores of each run.
        gpus: GPUs of each run, or a fraction of one.
        monitored: Whether runs have a best checkpoint to test.

    Raises:
        StudyError: If Ray is not installed, there is no cluster, or none of its machines is large enough.
    """
    try:
        require("--ray", "ray")
    except ZNormImportError as error:
        raise StudyError(str(error)) from error
    import ray

    module: Any = ray  # its types are incomplete
    connects = not module.is_initialized()
    if connects:
        try:
            module.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise StudyError(f"No Ray cluster at {address} ({error}): start one with `ray start --head`.") from error
    try:
        nodes = [node["Resources"] for node in module.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise StudyError(f"No machine of the Ray cluster has {cpus:g} CPU cores and {gpus:g} GPUs for a run.")
        engine = RayEngine(module, cpus, gpus, monitored)
        try:
            yield engine
        except BaseException:
            engine.stop()
            raise
    finally:
        if connects:
            module.shutdown()


def environments(
    jobs: int, devices: int | None, gpus: list[str] | None = None, processes_each: int = 1
) -> list[dict[str, str]]:
    """Return the environment variables of each of several runs side by side.

    Args:
        jobs: Number of runs; a single one has the whole machine.
        devices: GPUs of each run; ``None`` if runs name their own.
        gpus: Names of the GPUs as in ``CUDA_VISIBLE_DEVICES``; by default this machine's.
        processes_each: Number of processes of each run, which share its cores.

    Example:
        >>> [environment["CUDA_VISIBLE_DEVICES"] for environment in environments(3, 1, ["0", "1"])]
        ['0', '1', '0']
    """
    shared = thread_variables(jobs * processes_each)
    if jobs == 1:
        return [shared]
    gpus = visible_gpus() if gpus is None else gpus
    if not gpus or devices is None:
        return [shared] * jobs
    each = [[gpus[(job * devices + i) % len(gpus)] for i in range(devices)] for job in range(jobs)]
    return [shared | {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(names))} for names in each]


def devices_per_run(plan: Plan) -> int | None:
    """Return how many GPUs each run asks for; ``None`` if a run names its own."""
    asked = _devices_asked(plan)
    return None if any(named for _, named in asked) else max(count for count, _ in asked)


def processes_per_run(plan: Plan) -> int:
    """Return how many processes a run has on its machine at most, one for each device."""
    return max(1, *(count for count, _ in _devices_asked(plan)))


def _devices_asked(plan: Plan) -> list[tuple[int, bool]]:
    """Return the number of devices that each method's runs ask for, and whether they name them."""
    asked = []
    for settings in plan.settings.values():
        devices = settings["trainer"].get("devices", "auto")
        if isinstance(devices, (list, tuple)):
            asked.append((len(devices), True))
        elif "," in str(devices):
            asked.append((len([name for name in devices.split(",") if name.strip()]), True))
        else:  # "auto" and -1 ask for all GPUs: such a run gets a share of them
            asked.append((int(devices) if str(devices).isdecimal() else 1, False))
    return asked


def notes_on_sharing(plan: Plan, resources: Resources) -> list[str]:
    """Return sentences for the user about runs that are more than the cores of this machine can take."""
    if resources.ray is not None:
        return []
    paths = (values_by_path(settings.get("data", {})).items() for settings in plan.settings.values())
    workers = [number for values in paths for path, number in values if path.rpartition(".")[2] == "num_workers"]
    count = max((number for number in workers if isinstance(number, int)), default=0)
    has_gpus = resources.jobs > 1 and bool(visible_gpus())
    return list(notes_on_cores(resources.jobs, count, has_gpus, processes=processes_per_run(plan)))


def visible_gpus() -> list[str]:
    """Return the names of this machine's GPUs, as in ``CUDA_VISIBLE_DEVICES``."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


class LeashedProcesses(Processes):
    """Processes that are killed when this one dies, because Ray gives the resources of a dead worker to the next run.

    Args:
        timeout: Seconds after which each is ended; ``None`` for any time.
    """

    @contextmanager
    def started(
        self, args: Sequence[str], environment: Mapping[str, str], options: Mapping[str, Any]
    ) -> Iterator["subprocess.Popen[bytes] | ForkedProcess"]:
        """Start a command, as `Processes.started` does."""
        with super().started(args, environment, options) as process, _killed_with_this_process(process.pid):
            yield process


def copy_result(done: "Future[Outcome]", future: "Future[Outcome]") -> None:
    """Complete a future as Ray's future was completed, with an error in plain words.

    Args:
        done: Ray's future.
        future: The future to complete. It is completed in any case, so that nobody waits for it forever.
    """
    try:
        future.set_result(done.result())
    except BaseException as error:
        future.set_exception(_explained(error))


def _execute_on_ray(run: Run, monitored: bool, folder: str, paths: list[str]) -> Outcome:
    import ray

    machine = f"{platform.node()}, Ray node {ray.get_runtime_context().get_node_id()}"
    if not run.config.is_file():
        return Outcome(run, f"{run.config} is not on {machine}: --output must be a folder that all machines share.")
    with run.log.open("a", encoding="utf-8") as log:
        log.write(f"# on {machine}\n")
    os.chdir(folder)
    sys.path += [path for path in paths if path not in sys.path]
    return fit_and_test(run, monitored, processes=LeashedProcesses(run.timeout))


@contextmanager
def _killed_with_this_process(pid: int) -> Iterator[None]:
    """Let a small process watch this one, and kill another one and all that it started if this one dies early.

    The watcher reads from a pipe to which nobody else writes. It ends with this process however that ends, also by
    SIGKILL.
    """
    watcher = subprocess.Popen(
        [sys.executable, "-c", _KILL_AT_END_OF_INPUT, str(pid)],
        env={**os.environ, **import_paths()},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # otherwise a signal to this process's group would end the watcher, too
    )
    try:
        yield
    finally:
        watcher.kill()  # before its pipe is closed
        watcher.communicate()


def _explained(error: BaseException) -> LostError:
    for kind in type(error).__mro__:
        if kind.__name__ in _RAY_REASONS:
            return LostError(f"{_RAY_REASONS[kind.__name__]}.")
    cause = getattr(error, "cause", None)  # the exception that was raised in the worker
    what = "failed" if cause else "was lost"
    first_line = str(cause or error).strip().partition("\n")[0]
    return LostError(f"The Ray worker of this run {what}: {type(cause or error).__name__}: {first_line}")
