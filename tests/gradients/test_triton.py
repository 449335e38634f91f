"""The Triton kernel without a GPU: what it computes, and what it is compiled to."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from lightning_znorm.gradients import ZScore
from lightning_znorm.gradients.kernels import dispatch, transform_segments_
from lightning_znorm.gradients.shards import Segment
from tests.gradients.reference import wide, zscore
from tests.processes import run_python

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton: pip install triton")

HERE = Path(__file__).parent


@needs_triton
@pytest.mark.parametrize(
    ("chosen", "number"),
    [
        ("methods_with_chunks or layouts or counts or (boundaries and float32)", 8),
        pytest.param("test", 70, marks=pytest.mark.full),
    ],
    ids=["some", "all"],
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
def test_loads_and_stores_are_16_bytes_wide(tmp_path: Path) -> None:
    file = "tests.gradients.compiled_triton"
    finished = run_python("-W", "ignore", "-m", file, timeout=200, cwd=HERE.parents[1], TRITON_CACHE_DIR=str(tmp_path))
    assert finished.returncode == 0, finished.stdout
    programs = json.loads(finished.stdout.splitlines()[-1])
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


def test_falls_back_without_a_word(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    # A device that Triton does not know, which is what it takes the CPU for.
    monkeypatch.setattr(dispatch, "DEVICE_TYPES", frozenset({"cpu"}))
    dispatch.runs_triton.cache_clear()
    grad = torch.randn(30)
    want = zscore(grad)
    transform_segments_([Segment(grad)], ZScore())
    assert not dispatch.runs_triton(grad.device)
    torch.testing.assert_close(wide(grad), want, rtol=0, atol=1e-5)
    assert not recwarn.list
    dispatch.runs_triton.cache_clear()
