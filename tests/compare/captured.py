"""What a command of a study prints, without a process of its own."""

import io
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from typing import TextIO

import pytest

from lightning_znorm.cli import main
from lightning_znorm.compare.processes import Processes

ONE_AT_A_TIME = threading.Lock()


class OfThisThread(io.StringIO):
    """Takes what the thread that made it prints. The study prints its progress in other threads meanwhile."""

    def __init__(self, others: TextIO) -> None:
        super().__init__()
        self.others = others
        self.thread = threading.get_ident()

    def write(self, text: str) -> int:
        return super().write(text) if threading.get_ident() == self.thread else self.others.write(text)


def capture_here(self: Processes, args: list[str]) -> tuple[int, str, str]:
    """In place of ``Processes.capture``, whose process would import for seconds."""
    with ONE_AT_A_TIME:
        out, errors = OfThisThread(sys.stdout), OfThisThread(sys.stderr)
        with redirect_stdout(out), redirect_stderr(errors), pytest.raises(SystemExit) as exit_info:
            main(list(args))
    return exit_info.value.code or 0, out.getvalue(), errors.getvalue()
