"""Processes of a study that are copies of the test's, which need not import anything."""

import threading
from pathlib import Path

import pytest

from lightning_znorm.compare.processes import Processes
from tests.processes import run_forked


def fork_processes(patch: pytest.MonkeyPatch) -> None:
    """Let studies fork their processes, and find the modules of this folder."""
    patch.syspath_prepend(str(Path(__file__).parent))
    patch.setattr(Processes, "run", lambda self, args, log, *rest, **options: run_forked(args, log))
    captured: dict[str, tuple[int, str, str]] = {}
    one_at_a_time = threading.Lock()

    def capture(self: Processes, args: list[str]) -> tuple[int, str, str]:
        key = Path("exp.yaml").read_text() + str(args)  # asked again, it says the same
        with one_at_a_time:
            if key not in captured:
                log = Path("captured.txt").absolute()
                log.unlink(missing_ok=True)
                code = run_forked(args, log)
                captured[key] = code, log.read_text(), log.read_text()
        return captured[key]

    patch.setattr(Processes, "capture", capture)
