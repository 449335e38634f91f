"""Notebooks: whether a program runs in one, and how to show something there."""

import multiprocessing
import sys
from typing import Any


def is_notebook() -> bool:
    """Return whether this process serves the cells of a notebook.

    A terminal of IPython is none, because it shows no pictures. Neither is a process that a notebook has started, which
    cannot reach its page.
    """
    # A notebook has loaded IPython, so nothing is imported for other programs.
    ipython: Any = sys.modules.get("IPython")
    if ipython is None or multiprocessing.parent_process() is not None:
        return False
    return getattr(ipython.get_ipython(), "kernel", None) is not None


def show_in_notebook(*objects: object) -> None:
    """Show objects below the running cell of a notebook."""
    sys.modules["IPython"].display.display(*objects)
