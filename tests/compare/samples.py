"""Files as the runs of a study write them."""

import json
from pathlib import Path

from lightning_znorm.compare.study import Run

FIT = {
    "epochs": 2,
    "seconds": 8.0,
    "parameters": 10,
    "weights": "0123456789ab",
    "optimizers": ["SGD(lr=0.1)"],
    "methods": {"given": [], "added": [], "attached": []},
    "logged": ["train/loss", "val/accuracy"],
    "logged_epochs": [0, 1],
    "logged_numbers": 6,
    "device": "1 x cpu: x86_64",
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.6"},
}
TEST = {
    "checkpoint": {"path": "best.ckpt", "epoch": 1, "monitor": "val/accuracy", "value": 0.75},
    "metrics": {"test/accuracy": 0.5},
}
LOG = """\
compare/train_seconds,epoch,step,train/loss,val/accuracy
,0,9,,0.5
4.0,0,9,,
,0,9,1.0,
,1,19,,0.75
8.0,1,19,,
,1,19,0.5,
"""


def write_run(run: Run) -> None:
    """Write all files of a finished run, except checkpoints."""
    attempt = run.logs / "version_0"
    attempt.mkdir(parents=True)
    (attempt / "metrics.csv").write_bytes(LOG.replace("\n", "\r\n").encode())
    for path, content in (
        (run.fit_file, FIT),
        (run.test_file, TEST),
        (run.progress_file, {"epoch": 2, "share": 1.0}),
        (attempt / "attempt.json", {"step": 0}),
    ):
        path.write_text(json.dumps(content))


def write_answers(folder: Path) -> None:
    """Write ``fit.json`` and ``test.json``, for a shell script that is to copy them."""
    (folder / "fit.json").write_text(json.dumps(FIT | {"epochs": 0, "logged_epochs": [], "logged_numbers": 0}))
    (folder / "test.json").write_text(json.dumps(TEST))
