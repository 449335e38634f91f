import re
from pathlib import Path

import pytest

from tests.processes import run_python


def test_prints_its_table_and_the_ratio():
    root = Path(__file__).parents[2]
    process = run_python("-m", "benchmarks.data", "--images", "600", "--rounds", "1", timeout=120, cwd=root)
    assert process.returncode == 0, process.stdout
    rows = dict(re.findall(r"^\| (\w[^|]*?) +\| +(\d+) \|$", process.stdout, flags=re.MULTILINE))
    assert list(rows) == [
        "lightning_znorm, uint8",
        "lightning_znorm, normalized",
        "torchvision, normalized, 0 workers",
        "torchvision, normalized, 2 workers",
    ]
    _, ours, *theirs = map(int, rows.values())
    (ratio,) = re.findall(r"normalized: ([\d.]+) times torchvision's faster row", process.stdout)
    assert float(ratio) == pytest.approx(ours / max(theirs), rel=0.02, abs=0.06)
