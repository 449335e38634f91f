"""The part of a report on what each method is: all that it does with gradients, and with what optimizer."""

from collections.abc import Iterator
from typing import Any

from lightning_znorm.compare.document import Block, Grid, Heading, Text, code
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.gradient_setup import described, gradient_callbacks, same_settings
from lightning_znorm.compare.run_config import kept_callbacks
from lightning_znorm.compare.settings import class_name


def setups(findings: Findings) -> Iterator[Block]:
    """Each method's gradient callbacks, clipping, accumulation and optimizers, as its runs had them."""
    yield Heading("Methods as they were run")
    rows = []
    for method in findings.methods:
        settings = findings.plan.settings[method]
        callbacks = [code(described(entry)) for entry in gradient_callbacks(settings)]
        work = "; then ".join([*callbacks, *_by_code(findings, method)])
        rows.append((method, work or "none", *_trainer(settings), _optimizers(findings, method)))
    yield Grid(("method", "gradient callbacks", "gradient clipping", "batches per step", "optimizer"), rows)
    for methods in same_settings(findings.plan.settings):
        yield Text(f"{' and '.join(methods)} have the same settings: what differs between them is chance.")
    yield from _dropped(findings)


def _trainer(settings: dict[str, Any]) -> tuple[str, str]:
    trainer = settings["trainer"]
    clip = trainer.get("gradient_clip_val")
    clipping = f"{trainer.get('gradient_clip_algorithm') or 'norm'}, {clip}" if clip else "none"
    schedulers = [entry for entry in kept_callbacks(settings) if class_name(entry) == "GradientAccumulationScheduler"]
    batches = [str(trainer.get("accumulate_grad_batches") or 1), *map(described, schedulers)]
    return clipping, ", ".join(batches)


def _by_code(findings: Findings, method: str) -> list[str]:
    """Say which gradient callbacks code has added, and which optimizers had a method attached."""
    found = [fit.get("methods", {}) for run, fit in findings.fits.items() if run.method == method]
    added = dict.fromkeys(name for methods in found for name in methods.get("added", []))
    attached = dict.fromkeys(name for methods in found for name in methods.get("attached", []))
    return [*(f"{code(name)}, added by code" for name in added), *(f"a method attached to {name}" for name in attached)]


def _optimizers(findings: Findings, method: str) -> str:
    found = [fit.get("optimizers") for run, fit in findings.fits.items() if run.method == method]
    names = dict.fromkeys(" and ".join(map(code, optimizers)) for optimizers in found if optimizers)
    return "; ".join(names) or "not recorded"


def _dropped(findings: Findings) -> Iterator[Block]:
    """Say where a method's file replaces callbacks of the experiment."""
    first, *others = findings.methods
    known = {class_name(entry) for entry in _others(findings, first)}
    for method in others:
        own = {class_name(entry) for entry in _others(findings, method)}
        for one, other, missing in ((method, first, known - own), (first, method, own - known)):
            if missing:
                yield Text(f"{one} trains without {', '.join(sorted(missing))}, which {other} has.")


def _others(findings: Findings, method: str) -> list[dict[str, Any]]:
    """Callbacks that transform no gradients."""
    settings = findings.plan.settings[method]
    transforms = gradient_callbacks(settings)
    return [entry for entry in kept_callbacks(settings) if entry not in transforms]
