"""The Triton kernel without a GPU: how it is chosen, what it computes, and what it is compiled to."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_znorm.errors import ZNormImportError, ZNormRuntimeError, ZNormValueError
from lightning_znorm.gradients import ZScore
from lightning_znorm.gradients import kernels as kernels_package
from lightning_znorm.gradients.kernels import dispatch, transform_segments_, transform_unsharded_
from lightning_znorm.gradients.shards import Segment
from tests.gradients.reference import wide, zscore
from tests.processes import run_python

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton: pip install triton")

HERE = Path(__file__).parent


@needs_triton
@pytest.mark.parametrize(
    ("chosen", "number"),
    [
        ("methods_with_chunks or layouts or counts or routes or last_element or (boundaries and float32)", 10),
        pytest.param("not TestComparison", 90, marks=pytest.mark.full),
        pytest.param("TestComparison and passes", 7, marks=pytest.mark.full),
        pytest.param("TestComparison and not passes", 11, marks=pytest.mark.full),
    ],
    ids=["some", "all", "right", "wrong"],
)
def test_in_the_interpreter(chosen: str, number: int) -> None:
    # In a process of its own, because Triton reads the variable for all programs of a process.
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted_triton.py", "-k", chosen)
    finished = run_python(*arguments, timeout=290, cwd=HERE.parents[1], TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stdout
    (passed,) = re.findall(r"(\d+) passed", finished.stdout)
    assert int(passed) > number


@needs_triton
def test_programs_take_several_narrow_rows_but_one_tensor() -> None:
    """A choice of speed alone: what is computed is the same."""
    from lightning_znorm.gradients.kernels import triton

    cpu = torch.device("cpu")
    rows, tensors = (triton._LaunchPlan(sizes, torch.float32, cpu) for sizes in ([torch.Size([64, 4])], [256]))
    assert (rows.constants["BY_ROW"], tensors.constants["BY_ROW"]) == (True, False)
    assert rows.long > tensors.long
    assert (rows.num_stats, tensors.num_stats) == (64, 1)


@pytest.mark.full
@needs_triton
def test_programs_compile_and_load_and_store_16_bytes(tmp_path: Path) -> None:
    file = "tests.gradients.compiled_triton"
    finished = run_python("-W", "ignore", "-m", file, timeout=200, cwd=HERE.parents[1], TRITON_CACHE_DIR=str(tmp_path))
    assert finished.returncode == 0, finished.stdout
    printed = json.loads(finished.stdout.splitlines()[-1])
    programs = printed["loads and stores"]
    assert printed["comparison"] == 18
    assert len(programs) == 8
    for name, instructions in programs.items():
        double = "float64" in name
        vector = "v2.b64" if double else "v4.b32"
        # A thread's part of a tile, 4096 elements (of float64 half as many) among 128 threads.
        loads = (2048 if double else 4096) // 128 * (2 if "bfloat16" in name else 8 if double else 4) // 16
        # The first pass reads what it measures, chunks and short runs, and rewrites short runs.
        assert instructions[f"ld.global.{vector}"] == (3 * loads if name.startswith("first") else loads), name
        assert instructions[f"st.global.{vector}"] == loads, name
        assert not any("local" in instruction for instruction in instructions), name


@pytest.fixture
def grad(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A gradient on the CPU, which is taken for a device that Triton is chosen for."""
    monkeypatch.setattr(dispatch, "is_on_cpu", lambda tensor: False)
    monkeypatch.setenv("LIGHTNING_ZNORM_KERNEL", "triton")
    return torch.arange(30.0)


@needs_triton
def test_refuses_a_device_that_it_cannot_run_on(grad: torch.Tensor) -> None:
    # It cannot run on a CPU; the comparison finds that out.
    with pytest.raises(
        ZNormRuntimeError, match=r"cannot run ZScore.* of torch.float32 gradients on cpu \(.*Unset LIGH"
    ):
        transform_segments_([Segment(grad)], ZScore())
    assert torch.equal(grad, torch.arange(30.0))


def test_refuses_without_triton(grad: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "triton_programs"):
        monkeypatch.delattr(kernels_package, name, raising=False)
        monkeypatch.delitem(sys.modules, f"{kernels_package.__name__}.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ZNormImportError, match=r"Triton cannot be imported \(.*: install .* Unset LIGHTNING_ZNORM_KER"):
        transform_segments_([Segment(grad)], ZScore())
    assert torch.equal(grad, torch.arange(30.0))


@pytest.mark.parametrize("value", ["Triton", "cuda", " "])
def test_refuses_a_kernel_that_does_not_exist(value: str, grad: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ZNORM_KERNEL", value)
    message = f"variable LIGHTNING_ZNORM_KERNEL must be 'triton', or unset or empty for PyTorch's .*, got {value!r}"
    for transform_ in (transform_segments_, transform_unsharded_):
        with pytest.raises(ZNormValueError, match=message):
            transform_([Segment(grad)] if transform_ is transform_segments_ else [grad], ZScore())
    monkeypatch.setattr(dispatch, "is_on_cpu", lambda tensor: tensor is not grad)
    on_cpu = torch.arange(20.0)
    with pytest.raises(ZNormValueError, match=message):
        transform_unsharded_([on_cpu, grad], ZScore())
    assert torch.equal(grad, torch.arange(30.0))
    assert torch.equal(on_cpu, torch.arange(20.0))


def test_empty_is_unset(grad: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ZNORM_KERNEL", "")
    want = zscore(grad)
    transform_segments_([Segment(grad)], ZScore())
    torch.testing.assert_close(wide(grad), want, rtol=0, atol=1e-5)


WITHOUT_THE_VARIABLE = """
import sys, torch
from lightning_znorm.gradients import ZScore
from lightning_znorm.gradients.kernels import dispatch, transform_unsharded_
dispatch.is_on_cpu = lambda tensor: False
sys.modules["triton"] = None  # as if it were not installed
transform_unsharded_([torch.arange(30.0)], ZScore())
print([name for name in sys.modules if name.endswith((".kernels.triton", ".kernels.triton_programs"))])
"""


def test_is_not_imported_unless_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_ZNORM_KERNEL", raising=False)
    finished = run_python("-W", "ignore", "-c", WITHOUT_THE_VARIABLE, timeout=100)
    assert (finished.returncode, finished.stdout.split()) == (0, ["[]"]), finished.stdout
