"""Which processes are there."""

import os
import subprocess
from pathlib import Path


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def processes_of(folder: Path) -> list[int]:
    """Process ids of what runs in a run's folder."""
    listed = subprocess.run(["ps", "-axww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if f"{folder}{os.sep}run.yaml" in line]
