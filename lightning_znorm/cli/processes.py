"""Processes that torchrun or srun has started must train together, not each by itself, and under the same settings."""

from collections.abc import Mapping, Sequence

from lightning_znorm.errors import ZNormValueError

# Who starts processes, and in which variables it says how many: in all, and on each machine.
# With SLURM those of the step, because a batch script that runs without srun sees those of the whole job.
_LAUNCHERS = {
    "torchrun": ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE"),
}


def check_processes(environment: Mapping[str, str], world_size: int) -> None:
    """Refuse to train in fewer processes than there are.

    Lightning compares the two as well, but not where each process has a single device and is the only one of its
    machine as far as the Trainer knows: then all of them would train by themselves, and write to the same folder.

    Args:
        environment: Of this process.
        world_size: Number of processes that the Trainer works with.

    Raises:
        ValueError: If a launcher has started more.

    Example:
        >>> check_processes({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, world_size=16)
    """
    for launcher, (total, on_each_machine) in _LAUNCHERS.items():
        started = int(environment.get(total, 1))
        if started > world_size:
            devices = int(environment.get(on_each_machine, 1))
            raise ZNormValueError(
                f"{launcher} has started {started} processes ({total}), but the Trainer works with {world_size}, so "
                "that each would train by itself and write to the same folder: name them all with "
                f"--trainer.num_nodes {-(-started // devices)} --trainer.devices {devices}, or start fewer."
            )


def started_processes(environment: Mapping[str, str]) -> int:
    """Return how many processes a launcher has started, of which this is one; 1 if none has.

    Args:
        environment: Of this process.

    Example:
        >>> started_processes({"SLURM_STEP_NUM_TASKS": "4"})
        4
    """
    numbers = [environment.get(total, "") for total, _ in _LAUNCHERS.values()]
    return max((int(number) for number in numbers if number.isdecimal()), default=1)


def check_streams(streams: Sequence[str], processes: int) -> None:
    """Refuse settings from a pipe where several processes would each read a part of it, or nothing.

    Args:
        streams: Names of the config files that can be read only once.
        processes: Number of processes that read them.

    Raises:
        ValueError: If there are several processes.

    Example:
        >>> check_streams(["-"], processes=1)
    """
    if processes > 1:
        refuse_streams(streams, f"each of {processes} processes reads the settings")


def refuse_streams(streams: Sequence[str], readers: str) -> None:
    """Refuse settings from a pipe.

    Args:
        streams: Names of the config files that can be read only once.
        readers: Who would read them more than once.

    Raises:
        ValueError: If there is such a file.
    """
    if streams:
        names = " and ".join(streams)
        raise ZNormValueError(f"{names} can be read only once, and {readers}: write a file, and name that.")
