"""The commands of docs/many-machines.md, cut down to two processes and a few seconds."""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs/many-machines.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
TORCHRUN, SBATCH, LAUNCHER, TIMEOUT = BLOCKS

# Two epochs of 41 steps in each of two processes.
SHORT = shlex.split(
    "--data.init_args.batch_size 16 --trainer.max_epochs 2 --trainer.enable_model_summary false"
    " --trainer.accelerator cpu"
)


def words(block: str) -> list[str]:
    """The command in a block."""
    return shlex.split(block.replace("\\\n", ""))


def with_values(command: list[str], values: Mapping[str, object]) -> list[str]:
    """Give flags of a command, which must be there, other values."""
    command = list(command)
    for flag, value in values.items():
        command[command.index(flag) + 1] = str(value)
    return command


def witnessed(folder: Path) -> list[str]:
    """Flags that let each process write down in a folder what it has seen."""
    return ["--trainer.callbacks+=witness.Witness", f"--trainer.callbacks.folder={folder}"]


def torchrun(node: int, address: str, port: int, flags: list[str]) -> list[str]:
    """The documented command for one of two machines, here with one process each."""
    program, *arguments = words(TORCHRUN)
    assert program == "torchrun"
    values = {"--nproc_per_node": 1, "--node_rank": node, "--master_addr": address, "--master_port": port}
    arguments = with_values(arguments, {**values, "--trainer.devices": 1})
    return [sys.executable, "-m", "torch.distributed.run", *arguments, *SHORT, *flags]


def one_machine(flags: list[str]) -> list[str]:
    """The documented command for one machine, here with two processes."""
    python, *arguments = words(LAUNCHER)
    assert python == "python"
    return [sys.executable, *with_values(arguments, {"--trainer.devices": 2}), *SHORT, *flags]


def timeout_flags(timeout: str) -> list[str]:
    """The documented flags that change the time after which a collective is given up."""
    return with_values(words(TIMEOUT), {"--trainer.strategy.init_args.timeout": timeout})


def free_port(first: int = 20000, last: int = 30000) -> int:
    """A port that nobody listens at."""
    # From a place of its own, because tests that run side by side look for one at the same time.
    start = os.getpid() % (last - first)
    for port in (first + (start + step) % (last - first) for step in range(last - first)):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"No port from {first} to {last} is free.")
