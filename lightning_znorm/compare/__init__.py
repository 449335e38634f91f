"""A study: the same experiment under several methods and seeds, and what the results tell.

``python -m lightning_znorm compare``, or `run` from Python. A study's way through the files of this package:

1. ``command`` takes what was typed, and hands it on from step to step.
2. ``study`` says what is to be run; ``plan`` validates it, and writes the ``settings`` of every run.
3. ``runner`` trains and tests one run in ``processes`` (on Linux, copies that ``forks`` makes), on one of the
   ``engines``, with its share of the ``cores``; ``progress`` shows how far they are.
4. ``results`` reads what the runs logged, as one tidy table.
5. ``statistics`` compares the methods: differences, intervals, verdicts, speed. ``power`` says how many seeds a new
   study needs, and ``looks`` keeps what was first looked at.
6. ``sweep`` chooses each method's values, if there are several. ``advice`` says what to try, if there are not.
7. ``report`` writes all of it, with ``plots``, by ``templates/``.

Within a run, ``recorder`` logs what the study needs, and ``checkpoints`` keeps the best one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_znorm.compare.statistics import Row, Table
from lightning_znorm.compare.study import StudyError
from lightning_znorm.requirements import STUDY, require

__all__ = ["Row", "StudyError", "Table", "run"]


def run(
    config: str | Path | Sequence[str | Path],
    methods: Sequence[str | Path],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    output: str | Path,
    metric: str | None = None,
    mode: str | None = None,
    jobs: int = 1,
    ray: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    timeout: float | str | None = None,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    args: Sequence[str] = (),
) -> Table:
    """Run what is missing of a study, write its report, and return its table.

    Args:
        config: File of the experiment, or several in order.
        methods: Method files; the others are compared with the first.
        seeds: Seeds, each for every method.
        output: Folder of the study; the same call again continues it.
        metric: Metric that decides; by default the test metric that belongs to what the experiment's `ModelCheckpoint`
            monitors.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better; by default the `ModelCheckpoint`'s.
        jobs: Number of runs side by side; if there are several GPUs, each run has its own.
        ray: Address of a Ray cluster to run on, such as ``"auto"``.
        cpus: CPU cores of each run on Ray.
        gpus: GPUs of each run on Ray.
        timeout: Longest time of one ``fit`` or ``test``, in seconds or such as ``"2h"``: a run that takes longer is
            ended and counts as failed, and the same call resumes it from its last checkpoint.
        sweep: Settings with the values to try, such as ``{"model.init_args.optimizer.init_args.lr": [0.01, 0.1]}``.
            Every method runs at every value (of several settings, at every combination) with every seed. The validation
            metric, mean over seeds, chooses the values of each method, and the methods are compared at those.
        args: Further options of ``fit``, such as ``["--trainer.max_epochs", "10"]``.

    Returns:
        The table. A run that fails raises nothing, and is among the table's ``failures``. If the report cannot be
        written, a warning says why.

    Raises:
        StudyError: Before the first run, if something is wrong with the study.
        ImportError: Before the first run, if a package that a study needs is missing.
        KeyboardInterrupt: Upon Ctrl-C; and in the main thread upon SIGTERM, SIGHUP and SIGQUIT, unless the program
            handles or ignores them. The processes of the runs are ended before.

    Example:
        >>> from lightning_znorm import compare
        >>> methods = ["configs/methods/baseline.yaml", "configs/methods/znorm.yaml"]
        >>> table = compare.run("configs/digits/resnet20.yaml", methods, output="studies/digits")  # doctest: +SKIP
        >>> table.row("znorm").difference, table.row("znorm").verdict  # doctest: +SKIP
    """
    require("compare", *STUDY)

    import warnings

    from rich.console import Console

    from lightning_znorm.compare.command import run_study
    from lightning_znorm.compare.engines import Resources
    from lightning_znorm.compare.study import Study, parse_sweep, parse_timeout

    configs = [config] if isinstance(config, str | Path) else config
    study = Study(
        tuple(map(str, configs)),
        tuple(map(str, methods)),
        tuple(seeds),
        Path(output).absolute(),
        metric,
        mode,
        tuple(args),
        parse_timeout(timeout),
        parse_sweep(sweep or {}),
    )
    table, problems = run_study(study, Resources(jobs, ray, cpus, gpus), Console())
    for problem in problems:
        warnings.warn(f"The report of the study is not complete. {problem}", stacklevel=2)
    return table
