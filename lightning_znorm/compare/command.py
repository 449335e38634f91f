"""The command line of a study: ``python -m lightning_znorm compare``."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from lightning_znorm.compare.conduct import Means, commands, conduct
from lightning_znorm.compare.study import Study, StudyError, parse_timeout

_DESCRIPTION = """\
Does a method help? Runs every method with every seed, each as a process of its own: fit, then test of the best
checkpoint. Writes DIR/report.html, report.md and results.csv. The same command after an interruption runs what is
missing; more seeds or methods may be added. All other options are those of `fit`.

  python -m lightning_znorm compare --config configs/digits/resnet20.yaml \\
      --methods configs/methods/baseline.yaml configs/methods/znorm.yaml --seeds 0 1 2 --output studies/digits
"""


def main(args: Sequence[str]) -> int:
    """Run a study.

    Args:
        args: What is typed behind ``compare``.

    Returns:
        The exit code: 1 if a run failed, or a part of the report could not be written; 130 after an interruption.

    Raises:
        SystemExit: With one sentence on stderr, before the first run, if something is wrong with the study.
    """
    try:
        return _main(args)
    except StudyError as error:
        sys.exit(f"error: {error}")


def _main(args: Sequence[str]) -> int:
    options, rest = _parser().parse_known_args(args)
    study = Study(
        tuple(options.config),
        tuple(options.methods),
        tuple(options.seeds),
        Path(options.output).absolute(),
        options.metric,
        options.mode,
        tuple(rest),
        parse_timeout(options.timeout),
    )
    means = Means(options.jobs, options.ray, options.cpus, options.gpus)
    try:
        if options.dry_run:
            print("\n".join(commands(study, means, Console(stderr=True))))
            return 0
        table, problems = conduct(study, means, Console())
    except KeyboardInterrupt:
        with suppress(OSError):  # of a terminal that is gone
            print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    for outcome in table.failures:
        print(f"\n{outcome.run.name} failed: {outcome.error}", file=sys.stderr)
    print(f"\n{table}\n")
    for problem in problems:
        print(f"error: the report is not complete. {problem}", file=sys.stderr)
    if not problems:
        print(f"report           {table.output / 'report.html'}")
    return 1 if table.failures or problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m lightning_znorm compare",
        usage="python -m lightning_znorm compare --config FILE ... --methods FILE ... --output DIR [--KEY VALUE ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="FILE", help="the experiment")
    add(
        "--methods",
        nargs="+",
        required=True,
        metavar="FILE",
        help="method files; the first is what others are compared with",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--output", required=True, metavar="DIR", help="folder of the study")
    add(
        "--metric",
        metavar="NAME",
        help="metric that decides (default: the test metric of the experiment's ModelCheckpoint)",
    )
    add("--mode", choices=("min", "max"), help="whether less or more of it is better")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs side by side, a GPU each where there are several (default: 1)",
    )
    add(
        "--timeout",
        metavar="TIME",
        help="longest time of one `fit` or `test`, such as 90 (seconds), 30m, 2h or 1d: a run that takes longer is "
        "ended and counts as failed, and the same command goes on from its last checkpoint (default: none)",
    )
    add("--dry-run", action="store_true", help="try every method on one batch, and print a command for each run")
    add("--ray", nargs="?", const="auto", metavar="ADDRESS", help="run on a Ray cluster (default: this machine's)")
    add("--cpus", type=float, default=1, metavar="N", help="CPU cores of each run on Ray (default: 1)")
    add("--gpus", type=float, default=0, metavar="N", help="GPUs of each run on Ray, or a fraction (default: 0)")
    return parser
