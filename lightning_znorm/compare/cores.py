"""How many CPU cores this process may use, and how processes side by side share them.

Threads that outnumber the cores wait for one another at every step: two of them on one core train several times as
slowly as one.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Environment variables with the number of threads of PyTorch and NumPy. MKL's overrides OpenMP's in PyTorch."""
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """Return how many CPU cores this process may use, by its affinity and its control groups (containers)."""
    return max(1, math.floor(min(_affine_cores(), quota())))


def quota(root: Path = _CONTROL_GROUPS, own: Path = _OWN_GROUPS) -> float:
    """Return how many cores' time the control groups of this process allow; infinity without a limit.

    Args:
        root: Where the control groups are mounted.
        own: File with the names of this process's groups.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # not Linux
        return math.inf
    limits = [math.inf]
    for line in lines:
        base, files = root, ["cpu.max"]
        _, controllers, name = line.split(":", 2)
        if "cpu" in controllers.split(","):  # version 1
            base, files = root / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        elif controllers:
            continue
        # In a container, the name may be that of the host, where the container sees its group as the root.
        folder = base / name.lstrip("/")
        limits += [_limit(path, files) for path in (folder, *folder.parents) if path.is_relative_to(base)]
    return min(limits)


def thread_variables(jobs: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables with which processes side by side have no more threads than there are cores.

    Args:
        jobs: Number of processes.
        environment: What the user has set: smaller numbers of threads stay.

    Example:
        >>> thread_variables(10**6, {"OMP_NUM_THREADS": "4"})
        {'OMP_NUM_THREADS': '1'}
    """
    share = max(1, cores() // jobs)
    given = {name: threads_of(environment, name) for name in VARIABLES if name in environment}
    changed = {name: str(share) for name, threads in given.items() if threads is None or threads > share}
    # By itself, PyTorch takes the cores that this process may use, and does not know of control groups.
    if "OMP_NUM_THREADS" not in given and (jobs > 1 or share < _affine_cores()):
        changed["OMP_NUM_THREADS"] = str(min([share, *filter(None, given.values())]))
    return changed


def threads_of(environment: Mapping[str, str], name: str = "OMP_NUM_THREADS") -> int | None:
    """Return the number of threads that a variable asks for; ``None`` if it does not say.

    OpenMP takes a list, whose first number counts here.
    """
    found = re.match(r"\s*0*([1-9]\d*)\s*(,|$)", environment.get(name, ""))
    return int(found[1]) if found else None


def notes_on_cores(
    jobs: int, workers: int, has_gpus: bool, environment: Mapping[str, str] = os.environ, processes: int = 1
) -> Iterator[str]:
    """Yield sentences for the user about runs side by side that are more than the cores can take.

    Args:
        jobs: Number of runs.
        workers: Number of DataLoader workers of each process.
        has_gpus: Whether they train on GPUs, so that the cores do not have to train.
        environment: What the user has set.
        processes: Number of processes of each run, one for a device.
    """
    number = cores()
    share = max(1, number // (jobs * processes))
    of_processes = f" of {processes} processes each" if processes > 1 else ""
    are = f"{number} CPU core{'s' if number > 1 else ''}"
    if jobs > 1 and jobs * processes > number and not has_gpus:
        with_runs = f", with runs{of_processes}," if of_processes else ""
        yield (
            f"--jobs {jobs}{with_runs} is more than the {are} that this process may use: the runs slow one another "
            f"down, so that --jobs {max(1, number // processes)} is at least as fast."
        )
    for name in VARIABLES:
        threads = threads_of(environment, name)
        if threads is not None and threads > share:
            kind = "runs" if processes == 1 else "processes"
            side_by_side = f" in each of {jobs * processes} {kind} side by side" if jobs * processes > 1 else ""
            yield (
                f"{name} is {threads}, and becomes {share}{side_by_side}, because more threads than the {are} would "
                "slow training down."
            )
    threads = min(share, threads_of(environment) or share)
    if jobs > 1 and workers and jobs * processes * (threads + workers) > number:
        yield (
            f"{jobs} runs{of_processes} with {threads} thread{'s' if threads > 1 else ''} and {workers} DataLoader "
            f"worker{'s' if workers > 1 else ''} each share {are}: if the workers have much to do, set a smaller "
            "num_workers of the data, or --jobs."
        )


def _affine_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _limit(folder: Path, files: Sequence[str]) -> float:
    """Return the number of cores that a control group allows, by its quota and period."""
    try:
        words = " ".join((folder / name).read_text(encoding="utf-8") for name in files).split()
        allowed, period = map(float, words)
    except (OSError, ValueError):  # no limit: "max", or no such file
        return math.inf
    return allowed / period if allowed > 0 and period > 0 else math.inf
