"""The commands of many-machines.md and gpus.md in docs/how-to, reduced to two processes and a few seconds."""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

HOW_TO = Path(__file__).parents[2] / "docs/how-to"


def bash_blocks(page: str) -> list[str]:
    text = (HOW_TO / page).read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


TORCHRUN, SBATCH, TIMEOUT = bash_blocks("many-machines.md")
(LAUNCHER,) = (block for block in bash_blocks("gpus.md") if "--trainer.strategy ddp\n" in block)

# Two epochs of 41 steps, in each of two processes.
SHORT = shlex.split(
    "--data.init_args.batch_size 16 --trainer.max_epochs 2 --trainer.enable_model_summary false"
    " --trainer.accelerator cpu"
)


def words(block: str) -> list[str]:
    """Return the words of the command in a block."""
    return shlex.split(block.replace("\\\n", ""))


def with_values(command: list[str], values: Mapping[str, object]) -> list[str]:
    """Return the command with other values for some of its flags, which it must have."""
    command = list(command)
    for flag, value in values.items():
        command[command.index(flag) + 1] = str(value)
    return command


def witnessed(folder: Path) -> list[str]:
    """Return flags that make each process write its facts into a folder."""
    return ["--trainer.callbacks+=witness.Witness", f"--trainer.callbacks.folder={folder}"]


def torchrun(node: int, address: str, port: int, flags: list[str]) -> list[str]:
    """Return the documented command for one of two machines, with one process each."""
    program, *arguments = words(TORCHRUN)
    assert program == "torchrun"
    values = {"--nproc_per_node": 1, "--node_rank": node, "--master_addr": address, "--master_port": port}
    arguments = with_values(arguments, {**values, "--trainer.devices": 1})
    return [sys.executable, "-m", "torch.distributed.run", *arguments, *SHORT, *flags]


def one_machine(flags: list[str]) -> list[str]:
    """Return the documented command for one machine, with two processes."""
    python, *arguments = words(LAUNCHER)
    assert python == "python"
    return [sys.executable, *with_values(arguments, {"--trainer.devices": 2}), *SHORT, *flags]


def timeout_flags(timeout: str) -> list[str]:
    """Return the documented flags that change the timeout of a collective."""
    return with_values(words(TIMEOUT), {"--trainer.strategy.init_args.timeout": timeout})


def free_port(first: int = 20000, last: int = 30000) -> int:
    """Return a port on which nobody listens."""
    # Each process starts its search at another port, because tests that run side by side search at the same time.
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
