"""Start each task with SLURM's variables, as srun does. A test runs this as ``srun``."""

import json
import os
import subprocess
import sys


def main(arguments: list[str]) -> int:
    while arguments[0].startswith("--"):  # srun's own options, written --key=value
        del arguments[0]
    assert arguments[0] == "python"
    command = [sys.executable, *arguments[1:], *json.loads(os.environ["FLAGS_OF_THE_TEST"])]
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for task in range(int(os.environ["SLURM_NTASKS"])):
        place = {"SLURM_PROCID": task, "SLURM_NODEID": task // per_node, "SLURM_LOCALID": task % per_node}
        tasks.append(subprocess.Popen(command, env={**os.environ, **{key: str(value) for key, value in place.items()}}))
    return max(task.wait() for task in tasks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
