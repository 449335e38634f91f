"""Which processes are there."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def is_gone(pid: int) -> bool:
    """Whether a process is not there any more, soon: the system takes its time to end one that was killed."""
    for _ in range(100):
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


def processes_of(folder: Path) -> list[int]:
    """Process ids of what runs in a run's folder."""
    listed = subprocess.run(["ps", "-axww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    pids = [int(line.split()[0]) for line in listed.splitlines() if f"{folder}{os.sep}run.yaml" in line]
    for links in Path("/proc").glob("[0-9]*/fd"):  # copies of another process keep its command line
        with suppress(OSError):
            if (links / "1").readlink() == folder.resolve() / "log.txt":
                pids.append(int(links.parent.name))
    return sorted(set(pids))
