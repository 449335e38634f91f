"""Tests of what the kernels compute run with those for a CPU, and with the one for devices, on tensors of a CPU."""

from collections.abc import Iterator

import pytest

from lightning_znorm.gradients.kernels import dispatch


@pytest.fixture(scope="module", params=["cpu", "device"])
def each_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which kernels take the gradients of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "device":
            patch.setattr(dispatch, "is_on_cpu", lambda tensor: False)
        yield request.param
