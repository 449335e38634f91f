"""Fixtures, and warnings of others, which pytest's policy (every warning is an error) would turn into failures."""

import pytest
import torch

from tests.cifar10 import fake_cifar10, real_cifar10  # noqa: F401
from tests.medical import fake_lgg, fake_pcam, real_lgg, real_pcam  # noqa: F401

THIRD_PARTY = (
    # Lightning 2.6 with torch 2.15.
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    # torchvision unpacks CIFAR-10's archive, on Python 3.12 and 3.13.
    "ignore:Python 3.14 will, by default, filter extracted tar archives:DeprecationWarning",
    # torch.compile, on Python 3.13.0 alone.
    r"ignore:Guards may run slower on Python 3\.13\.0:RuntimeWarning",
    # Of machines with more than two CPU cores: workers would do nothing for data that is in memory.
    r"ignore:The '\w+_dataloader' does not have many workers",
    # Of machines with fewer CPU cores than a test has workers.
    r"ignore:This DataLoader will create \d+ worker processes in total",
    # LightningCLI's own calls.
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    # Of machines with a GPU: tests choose the CPU.
    r"ignore:GPU available but not used",
)


def pytest_configure(config: pytest.Config) -> None:
    for warning in THIRD_PARTY:
        config.addinivalue_line("filterwarnings", warning)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
