"""Warnings of others, which pytest's policy (every warning is an error) would turn into failures."""

import pytest

THIRD_PARTY = (
    # Lightning 2.6 with torch 2.15.
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    # Of machines with more than two CPU cores: workers would do nothing for data that is in memory.
    r"ignore:The '\w+_dataloader' does not have many workers",
)


def pytest_configure(config: pytest.Config) -> None:
    for warning in THIRD_PARTY:
        config.addinivalue_line("filterwarnings", warning)
