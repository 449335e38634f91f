"""A study whose measurements are made up: `plan` is what was to be run, `done` writes and returns what it logged."""

import json
from pathlib import Path

from lightning_znorm.compare.results import Measurement
from lightning_znorm.compare.study import Plan, Study

FIT = {
    "epochs": 4,
    "seconds": 8.0,
    "parameters": 10,
    "device": "1 x cpu: x86_64",
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.6"},
}


def plan(output: Path, methods: tuple[str, ...] = ("baseline", "znorm"), seeds: tuple[int, ...] = (0, 1, 2)) -> Plan:
    study = Study(("exp.yaml",), tuple(f"m/{name}.yaml" for name in methods), seeds, output)
    settings = {name: {"trainer": {"lr": i}} for i, name in enumerate(methods)}
    return Plan(study, settings, ("val/accuracy", "max"), "test/accuracy", "max", [])


def done(plan: Plan) -> list[Measurement]:
    """Runs that are done: znorm is as fast in two epochs as the baseline in four, at twice the time per step."""
    found = []
    for run in plan.study.runs:
        run.folder.mkdir(parents=True)
        run.fit_file.write_text(json.dumps(FIT))
        factor = 1 + list(plan.study.files).index(run.method)
        checkpoint = {"path": "best.ckpt", "epoch": 2, "monitor": "val/accuracy", "value": 0.75}
        metrics = {"test/accuracy": 0.8 + 0.01 * factor * (1 + run.seed)}
        run.test_file.write_text(json.dumps({"checkpoint": checkpoint, "metrics": metrics}))
        for epoch in range(4):
            accuracy = 0.5 + 0.1 * min(4, factor * (epoch + 1)) + 0.01 * run.seed
            for metric, value in (
                ("val/accuracy", accuracy),
                ("train/loss", 1 - accuracy),
                ("compare/train_seconds", (epoch + 1) * factor),
                ("compare/step_seconds", (9.0, 0.05, 0.1, 0.15)[epoch] * factor),
                ("compare/gradient_norm", 10.0 / (epoch + 1)),
            ):
                found.append(Measurement(run.name, run.seed, run.method, epoch, metric, value))
        found += [Measurement(run.name, run.seed, run.method, 2, metric, value) for metric, value in metrics.items()]
    return found
