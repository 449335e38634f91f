"""The name by which a user has called the program, for help and for commands in messages."""

import sys
from pathlib import Path

SCRIPT = "lightning-znorm"
"""The console script."""

MODULE = "python -m lightning_znorm"
"""The module, which can be run wherever the package can be imported."""


def program() -> str:
    """Return what the user types in front of a command.

    Returns:
        The console script if the process was started by it, and otherwise the module.
    """
    # On Windows, the script is a program: lightning-znorm.exe.
    return SCRIPT if Path(sys.argv[0]).name.removesuffix(".exe") == SCRIPT else MODULE
