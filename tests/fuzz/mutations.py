"""Change valid files at random, read them, and count the outcomes.

python -m tests.fuzz.mutations [--cases 1000] [--seed 0] [--target NAME]

Each file is read in a process of its own, so that a crash or a hang is counted too. Prints a table, and every fault
with the seed that repeats it; exits with 1 if there is any.
"""

import argparse
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from tests.fuzz.readers import RUN, SENTENCE, TARGETS, Target, outcome

LIMIT = 60  # seconds for one file


def mutated(content: bytes, rng: np.random.Generator, is_text: bool) -> bytes:
    """Return content with one to four random changes of bytes or lines, most of them near the beginning."""
    for _ in range(rng.integers(1, 5)):
        content = _lines_changed(content, rng) if is_text and rng.random() < 0.6 else _bytes_changed(content, rng)
    return content


def _bytes_changed(content: bytes, rng: np.random.Generator) -> bytes:
    made = bytearray(content)
    # What a format keeps in its head, and at its end, is more telling than its pixels.
    size = max(1, len(made) if rng.random() < 0.4 else min(len(made), 1024))
    start = int(rng.integers(size))
    if rng.random() < 0.15:
        start = max(0, len(made) - start)
    length = int(rng.choice([1, 1, 2, 4, 8, 64]))
    span = slice(start, start + length)
    match rng.integers(8):
        case 0 if start < len(made):
            made[start] ^= 1 << int(rng.integers(8))
        case 1:
            made[span] = bytes(len(made[span]))
        case 2:
            made[span] = b"\xff" * len(made[span])
        case 3:
            made[span] = rng.bytes(len(made[span]))
        case 4:
            del made[span]
        case 5:
            made[start:start] = rng.bytes(length)
        case 6:
            made[start:start] = made[span]
        case _:
            if rng.random() < 0.3:
                del made[start:]
    return bytes(made)


VALUES = [
    *("", "null", "-1", "0", "1e999", "1e-10", ".nan", "true", "[]", "{}", "[1, 2]", "{a: 1}", "text", "2001-13-01"),
    *("ä ö", "'", '"', "&a", "*a", "!!python/name:os.system", ">", "- 1", "a: b: c", "%", ",", "%YAML 9.9", "---"),
]


def _lines_changed(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    number = int(rng.integers(len(lines)))
    line = lines[number]
    value = str(rng.choice(VALUES)).encode()
    match rng.integers(8):
        case 0:
            del lines[number]
        case 1:
            lines.insert(int(rng.integers(len(lines))), line)
        case 2:
            lines[number] = b"  " + line
        case 3:
            lines[number] = line[2:]
        case 4:
            key, colon, _ = line.partition(b":" if b":" in line else b",")
            lines[number] = key + colon + b" " + value
        case 5:
            lines[number] = line + value
        case 6 if line.strip():
            place = int(rng.integers(len(line)))
            lines[number] = line[:place] + line[place + 1 : place + 2] + line[place : place + 1] + line[place + 2 :]
        case _:
            other = int(rng.integers(len(lines)))
            lines[number], lines[other] = lines[other], line
    return b"\n".join(lines)


def read_mutated(target: Target, seed: tuple[int, ...], folder: Path) -> str:
    """Return the outcome of one case."""
    rng = np.random.default_rng(seed)
    path = target.make(folder)
    path.write_bytes(mutated(path.read_bytes(), rng, target.is_text))
    return outcome(target, folder, path)


def _in_a_process(target: Target, seed: tuple[int, ...]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        (child := Path(folder) / "files").mkdir()
        pid = os.fork()
        if not pid:
            signal.alarm(LIMIT)
            report.write_text(read_mutated(target, seed, child))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if report.exists():
            return report.read_text()
    number = os.waitstatus_to_exitcode(status)
    return f"hangs for {LIMIT} s" if -number == signal.SIGALRM else f"ends with {number}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = list(TARGETS) if args.target is None else [args.target]
    counts = {name: Counter[str]() for name in names}
    for case in range(args.cases):
        name = names[case % len(names)]
        found = _in_a_process(TARGETS[name], (args.seed, case))
        counts[name][found if found in (RUN, SENTENCE) else "fault"] += 1
        if found not in (RUN, SENTENCE):
            print(f"FAULT seed {args.seed}, case {case}, {name}: {found}", file=sys.stderr, flush=True)
    print("| file | read | refused in a sentence | faults |\n| --- | ---: | ---: | ---: |")
    for name, count in counts.items():
        print(f"| {name} | {count[RUN]} | {count[SENTENCE]} | {count['fault']} |")
    total = sum(counts.values(), Counter[str]())
    print(f"| all {args.cases} | {total[RUN]} | {total[SENTENCE]} | {total['fault']} |")
    return int(total["fault"] > 0)


if __name__ == "__main__":
    sys.exit(main())
