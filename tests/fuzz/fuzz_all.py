"""Fuzz all readers, one after the other, and print the results.

python -m tests.fuzz.fuzz_all FOUND [--seconds 60] [--seed 1] [--target NAME ...]

FOUND keeps, for each reader, the inputs that reach new code, a log, and inputs that end in a fault or take longer than
20 seconds (crash-*, timeout-*). Exits with 1 if there are any.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from tests.fuzz.readers import TARGETS

LIMIT = 20  # seconds for one input


def fuzz(name: str, folder: Path, seconds: int, seed: int) -> tuple[dict[str, int], list[Path]]:
    """Return libFuzzer's statistics, and the inputs that ended in a fault."""
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-timeout={LIMIT}", f"-seed={seed}", "-print_final_stats=1"]
    command = [sys.executable, "-m", "tests.fuzz.fuzz_readers", name, folder / "corpus", *options]
    with (folder / "log").open("w") as log:
        subprocess.run([*command, f"-artifact_prefix={folder}/"], stdout=log, stderr=subprocess.STDOUT, check=False)
    said = (folder / "log").read_text(errors="replace")
    covered = re.findall(r"cov: (\d+) ft: (\d+)", said)
    figures = {key: int(value) for key, value in re.findall(r"stat::(\w+): +(\d+)", said)}
    if not covered or "number_of_executed_units" not in figures:
        raise RuntimeError(f"{name} was not fuzzed:\n{said[-2000:]}")
    figures["covered"], figures["features"] = map(int, covered[-1])
    return figures, sorted(path for path in folder.iterdir() if "-" in path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", type=Path)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    args = parser.parse_args()
    faults: list[Path] = []
    total = 0
    print("| file | inputs | a second | branches | features | kept | faults |\n| --- |" + " --: |" * 6, flush=True)
    for name in args.target:
        folder = args.found.absolute() / name
        figures, found = fuzz(name, folder, args.seconds, args.seed)
        faults += found
        total += figures["number_of_executed_units"]
        kept = len(list((folder / "corpus").iterdir()))
        row = (figures["number_of_executed_units"], figures["average_exec_per_sec"], figures["covered"])
        print("|", " | ".join(map(str, (name, *row, figures["features"], kept, len(found)))), "|", flush=True)
    print(f"\n{total} inputs, {len(faults)} faults")
    for path in faults:
        print(path)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
