"""The part of a report on how it was measured: what another needs to judge it, and to do it again."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from lightning_znorm.compare.document import Block, Code, Grid, Heading, Points, Text, code
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.numbers import clock
from lightning_znorm.compare.one_run import command_to_fit, command_to_test
from lightning_znorm.compare.prepare import digest
from lightning_znorm.compare.settings import differences


def pairing(findings: Findings) -> str:
    """What the methods have in common within a seed: what runs say that they began with, and their settings."""
    first, *others = findings.methods
    started = [method for method in others if _starts_elsewhere(findings, method)]
    fed = [method for method in others if any(key.startswith("data.") for key, *_ in _differences(findings, method))]
    if not started and not fed:
        return (
            "Within a seed, all methods start from the same weights and see the same batches in the same order, so "
            "differences are taken seed by seed."
        )
    told = [f"other weights than {first} under {', '.join(started)}"] if started else []
    told += [f"other settings of the data under {', '.join(fed)}"] if fed else []
    return f"Runs of the same seed have {', and '.join(told)}; differences are taken seed by seed all the same."


def conditions(findings: Findings) -> Iterator[Block]:
    """Where and with what the runs were made, how methods' settings differ, and what to type."""
    yield Heading("How it was measured")
    monitor = findings.plan.monitor
    best = f" (that of the epoch with the best {code(monitor[0])}, {monitor[1]})" if monitor else ""
    yield Points(
        [
            f"Tests are of each run's {findings.which} checkpoint{best}; all other metrics are of the last epoch.",
            "Spread is the standard deviation over seeds. The interval is Student's t on the seeds' differences.",
            "Every epoch begins with random numbers that follow from seed and epoch alone.",
        ]
    )
    yield from _tested(findings)
    yield from _surroundings(findings)
    yield from _settings(findings)
    yield from _commands(findings)


def near(path: str | Path) -> str:
    """A path as seen from the working directory, if it is in it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _tested(findings: Findings) -> Iterator[Block]:
    monitor = findings.plan.monitor
    if not findings.tests:
        return
    value = f" and its {code(monitor[0])}" if monitor else ""
    yield Text(
        f"The epoch of the checkpoint that each run was tested at{value}, as the checkpoint itself says. The first "
        f"epoch is 1 here and in the figures, and 0 in {code('results.csv')}:"
    )
    header = ("method", "seed", "epoch", "of", *([code(monitor[0])] if monitor else []))
    rows = []
    for run, tested in findings.tests.items():
        row = (run.method, str(run.seed), str(tested.epoch + 1), str(findings.fits[run]["epochs"]))
        rows.append((*row, *([] if monitor is None else ["-" if tested.value is None else f"{tested.value:.4g}"])))
    yield Grid(header, sorted(rows, key=lambda row: findings.methods.index(row[0])), frozenset(range(1, 5)))


def _surroundings(findings: Findings) -> Iterator[Block]:
    fits = findings.fits.values()
    if not fits:
        return
    points = []
    for key in ("device", "threads", "parameters", "epochs"):
        points.append(f"{key.capitalize()}: {'; '.join(sorted({str(fit[key]) for fit in fits}))}.")
    versions = sorted({", ".join(f"{k} {v}" for k, v in fit["versions"].items()) for fit in fits})
    points.append(f"Versions: {'; '.join(versions)}.")
    points.append(f"Training alone took {clock(sum(fit['seconds'] for fit in fits))}, all runs together.")
    yield Points(points)
    if len(versions) > 1:
        yield Text("The runs were not made with the same versions, so a difference may be theirs.")


def _settings(findings: Findings) -> Iterator[Block]:
    yield Heading("Methods")
    first, *others = findings.methods
    rows = [(method, *difference) for method in others for difference in _differences(findings, method)]
    if rows:
        yield Grid(("method", "setting", first, "its own"), rows)
    elif others:
        yield Text("The methods' settings do not differ.")
    hashes = ", ".join(f"{name} {code(digest(settings))}" for name, settings in findings.plan.settings.items())
    yield Text(f"Hashes of the resulting settings: {hashes}.")


def _commands(findings: Findings) -> Iterator[Block]:
    yield Heading("Commands")
    yield Text("The study:")
    yield Code(findings.command)
    yield Text("One run of it, with the settings that were written for it, and as it would be typed by hand:")
    study = findings.plan.study
    run = study.runs[-1]
    commands = (command_to_fit(run)[:3], command_to_test(run, findings.plan.monitored))
    ours = [f"python -m lightning_znorm {shlex.join(map(near, args))}" for args in commands]
    by_hand = [*study.fit_args(run.method), "--seed_everything", str(run.seed)]
    yield Code("\n".join([*ours, "", f"python -m lightning_znorm {shlex.join(by_hand)}"]))


def _differences(findings: Findings, method: str) -> list[tuple[str, str, str]]:
    return differences(findings.plan.settings[findings.methods[0]], findings.plan.settings[method])


def _starts_elsewhere(findings: Findings, method: str) -> bool:
    weights = {(run.method, run.seed): fit.get("weights") for run, fit in findings.fits.items()}
    pairs = [((method, seed), (findings.methods[0], seed)) for seed in findings.plan.study.seeds]
    return any(weights[own] != weights[first] for own, first in pairs if own in weights and first in weights)
