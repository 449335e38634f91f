"""Tests of what other users than the owner of a file may do."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def as_somebody_else() -> Iterator[None]:
    """Become another user for a while, because root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
