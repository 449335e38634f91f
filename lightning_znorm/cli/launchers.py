"""Processes that torchrun or srun has started: they must train together."""

from collections.abc import Mapping

from lightning_znorm.errors import ZNormValueError

# The variables in which a launcher says how many processes it has started: in all, and on each machine.
# With SLURM they are those of the step, because a batch script that runs without srun sees those of the whole job.
_LAUNCHERS = {
    "torchrun": ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE"),
}
# The variables in which launchers, Lightning's own among them, number the processes.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def check_processes(environment: Mapping[str, str], world_size: int) -> None:
    """Refuse to train in fewer processes than the launcher has started.

    Lightning compares the two as well, except where each process has a single device and knows of no other process on
    its machine. Then all of them would train by themselves, and write to the same folder.

    Args:
        environment: The environment variables of this process.
        world_size: The number of processes that the Trainer works with.

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
    """Return how many processes a launcher has started, this one included; 1 without a launcher.

    Args:
        environment: The environment variables of this process.

    Example:
        >>> started_processes({"SLURM_STEP_NUM_TASKS": "4"})
        4
    """
    numbers = [environment.get(total, "") for total, _ in _LAUNCHERS.values()]
    return max((int(number) for number in numbers if number.isdecimal()), default=1)


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Return whether this process is the first of those that a launcher has started, or the only one.

    Args:
        environment: The environment variables of this process.

    Example:
        >>> is_first_process({}), is_first_process({"RANK": "1", "LOCAL_RANK": "0"})
        (True, False)
    """
    return all(environment.get(name, "0") == "0" for name in _RANKS)
