"""Try every feature, and print what each says, as JSON: what is missing, or nothing."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import lightning_znorm
from lightning_znorm import callbacks, compare, data, metrics, models, tasks
from lightning_znorm.cli import main
from lightning_znorm.data.transforms import built

ROOMS = (callbacks, data, metrics, models, tasks)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "ClassificationTask": ("resnet20", 10),
    "GradientTransform": (lightning_znorm.gradients.ZScore(),),
    "ResNet": (1,),
    "SegmentationTask": ("attention_unet",),
}


def features() -> Iterator[tuple[str, Callable[[], Any]]]:
    for room in ROOMS:
        for name in room.__all__:
            yield name, lambda room=room, name=name: getattr(room, name)(*ARGUMENTS.get(name, ()))
    for written in ("png", "tif", "nifti"):
        yield f"MaskWriter, {written}", lambda written=written: callbacks.MaskWriter(format=written)
    yield "SegmentationTask, own network", lambda: tasks.SegmentationTask(torch.nn.Conv2d(3, 1, 1))
    yield (
        "SegmentationTask, own network, loss and scores",
        lambda: tasks.SegmentationTask(
            torch.nn.Conv2d(3, 1, 1), loss=torch.nn.BCEWithLogitsLoss(), metrics={"dice": metrics.DiceScore()}
        ),
    )
    yield "plot", lambda: metrics.DiceScore().plot(torch.tensor(0.5))
    for path in ("monai.transforms.RandFlipd", "torchvision.transforms.v2.ColorJitter"):
        transform = {"class_path": path, "init_args": {}}
        yield path, lambda transform=transform: built("train_transform", transform)
    yield "compare.run", lambda: compare.run("a.yaml", ["b.yaml", "c.yaml"], output="out")
    study = ["--config", "a.yaml", "--methods", "b.yaml", "c.yaml", "--seeds", "0", "--output", "out"]
    yield "command compare", lambda: main(["compare", *study])
    for command in ("fit", "validate", "test", "predict"):
        yield f"command {command}", lambda command=command: main([command, "--help_all"])
        yield f"command {command} --help", lambda command=command: main([command, "--help"])
    yield "command --help", lambda: main(["--help"])
    yield "command --version", lambda: main(["--version"])
    for file in sorted(Path(sys.argv[1]).rglob("*.yaml")):
        model = (yaml.safe_load(file.read_text()) or {}).get("model", {})
        arguments = model.get("init_args", {})
        if "class_path" in model and isinstance(arguments.get("model"), str):
            given = {key: arguments[key] for key in ("model", "num_classes", "in_chans") if key in arguments}
            task = getattr(tasks, model["class_path"])
            yield (
                f"{task.__name__} {given['model']}",
                lambda task=task, given=given: task(**{"num_classes": 1, **given}),
            )


def said(feature: Callable[[], Any]) -> str:
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            feature()
    except ImportError as error:
        cause = error.__cause__
        names = isinstance(error, lightning_znorm.errors.ZNormError) and isinstance(cause, ImportError)
        return str(error) if names else f"{type(error).__name__} from {cause!r}: {error}"
    except SystemExit as end:
        return str(end.code or "")
    return ""


if __name__ == "__main__":
    json.dump({name: said(feature) for name, feature in features()}, sys.stdout)
