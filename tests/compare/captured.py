"""What a command of a study prints, without a process of its own."""

import io
import threading
from contextlib import redirect_stderr, redirect_stdout

import pytest

from lightning_znorm.cli import main
from lightning_znorm.compare.processes import Processes

ONE_AT_A_TIME = threading.Lock()


def capture_here(self: Processes, args: list[str]) -> tuple[int, str, str]:
    """In place of ``Processes.capture``, whose process would import for seconds."""
    out, errors = io.StringIO(), io.StringIO()
    with ONE_AT_A_TIME, redirect_stdout(out), redirect_stderr(errors), pytest.raises(SystemExit) as exit_info:
        main(list(args))
    return exit_info.value.code or 0, out.getvalue(), errors.getvalue()
