"""Two hosts on one machine: network namespaces with an address each, joined by a cable."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

ADDRESSES = ("10.213.7.1", "10.213.7.2")
INTERFACE = "znorm0"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Yield the names of two network namespaces, joined only by `INTERFACE`; skip if the machine has no namespaces."""
    names = [f"znorm-{os.getpid()}-{i}" for i in range(2)]
    with ExitStack() as stack:
        try:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "delete", name)  # the cable goes with them
            ends = [argument for name in names for argument in ("name", INTERFACE, "netns", name)]
            _ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
            for name, address in zip(names, ADDRESSES, strict=True):
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
                _ip("netns", "exec", name, "true")
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or ""
            pytest.skip(f"needs network namespaces (Linux, iproute2, root): {error} {output}".strip())
        yield names
