"""How much of a study's time is training, and where the rest goes.

A study of the handwritten digits, with the methods baseline, gc and znorm, one run at a time. The times are those at
which the files of the study were written, so that any version of the package can be measured:

    python -m benchmarks.study_overhead --seeds 0 1 2
    PYTHONPATH=OTHER_VERSION python benchmarks/study_overhead.py --seeds 0 1 2
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

METHODS = ("baseline", "gc", "znorm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: those of the experiment")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.seeds, options.epochs, options.jobs)
    print(f"python {platform.python_version()}, torch {version('torch')}, lightning {version('lightning')}; ", end="")
    print(f"load {os.getloadavg()[0]:.1f} at the end; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}\n")
    print("| part | seconds | share, % |\n| --- | ---: | ---: |")
    whole = rows["the whole study"]
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.1f} | {100 * seconds / whole:.0f} |")


def measure(folder: Path, seeds: list[int], epochs: int | None, jobs: int) -> dict[str, float]:
    """Run a study in a folder, and return the seconds of its parts."""
    words = [sys.executable, "-m", "lightning_znorm", "compare", "--config", "configs/digits/resnet20.yaml"]
    words += ["--methods", *(f"configs/methods/{name}.yaml" for name in METHODS)]
    words += ["--seeds", *map(str, seeds), "--output", "out", "--jobs", str(jobs)]
    words += ["--trainer.max_epochs", str(epochs)] if epochs else []
    runs = [folder / "out" / "runs" / f"{method}-{seed}" for seed in seeds for method in METHODS]
    begun: dict[Path, float] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(runs, begun, ended))
    watcher.start()
    start = time.time()
    process = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    end = time.time()
    ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(process.stdout + process.stderr)
    first = min(begun.values())
    starts = fits = tests = training = 0.0
    last = 0.0
    for run in runs:
        trains, fitted, tested = (
            (run / name).stat().st_mtime for name in ("logs/version_0/attempt.json", "fit.json", "test.json")
        )
        starts += trains - begun[run]
        fits += fitted - trains
        tests += tested - fitted
        last = max(last, tested)
        training += json.loads((run / "fit.json").read_text())["seconds"]
    runs_take = last - first
    return {
        "until the first run: settings, first tries": first - start,
        "start of `fit`, until the first batch": starts,
        "training batches": training,
        "validation, checkpoints and logs": fits - training,
        "`test`, with its start": tests,
        "between runs": max(0.0, runs_take - starts - fits - tests),
        "end of the last run, report": end - last,
        "the whole study": end - start,
        "all but training batches": end - start - training / jobs,
    }


def watch(runs: list[Path], begun: dict[Path, float], ended: threading.Event) -> None:
    """Write down when each run begins."""
    while not ended.wait(0.02):
        for run in runs:
            if run not in begun and (run / "log.txt").exists():
                begun[run] = time.time()


if __name__ == "__main__":
    main()
