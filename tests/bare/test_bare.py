"""The plugin where there is nothing but torch and lightning: it trains, and other features say what they need.

The default tier hides all other packages from a program. The full tier builds the wheel, and installs it without its
dependencies into a fresh virtual environment.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lightning_znorm
from lightning_znorm import callbacks, data, metrics, models, tasks
from tests.bare.closure import closure, import_names, link
from tests.processes import ROOT, run_python

HERE = Path(__file__).parent
CONFIGS = Path(ROOT) / "configs"
NEEDED = closure("torch", "lightning")
ALONE = import_names(NEEDED)
SENTENCE = re.compile(
    r"(?P<feature>.+) needs (?P<packages>[\w-]+(, [\w-]+)*( and [\w-]+)?): (?P<install>pip install .+)"
)

# What each feature needs that torch and lightning do not bring along.
STUDY = ["docstring-parser", "jsonargparse", "matplotlib", "psutil", "rich", "scipy", "typeshed-client"]
COMMAND = ["docstring-parser", "jsonargparse", "typeshed-client"]
FEATURES: dict[str, list[str]] = {
    "GradientCentralizationCallback": [],
    "GradientMonitor": [],
    "GradientTransform": [],
    "LastCheckpoint": [],
    "MaskOverlay": ["pillow", "scipy"],
    "MaskWriter": ["pillow"],
    "SINGCallback": [],
    "ScoreWriter": ["scipy"],
    "ZNormCallback": [],
    "CIFAR10DataModule": ["scikit-learn", "torchvision"],
    "DigitsDataModule": ["scikit-learn"],
    "ImageFolderDataModule": ["pillow", "scikit-learn", "torchvision"],
    "LGGDataModule": ["pillow", "rich"],
    "MaskFolderDataModule": ["pillow", "rich"],
    "PCamDataModule": ["h5py", "pillow", "rich", "scikit-learn"],
    "VolumeDataModule": ["monai", "nibabel", "rich"],
    "DiceScore": [],
    "HausdorffDistance": ["scipy"],
    "MaskCount": [],
    "PatientCount": [],
    "PatientDiceScore": [],
    "TverskyIndex": [],
    "ResNet": [],
    "resnet20": [],
    "resnet56": [],
    "ClassificationTask": [],
    "SegmentationTask": ["monai"],
    "MaskWriter, png": ["pillow"],
    "MaskWriter, tif": ["pillow"],
    "MaskWriter, nifti": ["nibabel"],
    "SegmentationTask, own network": ["monai"],  # the loss
    "SegmentationTask, own network, loss and scores": [],
    "plot": ["matplotlib"],
    "monai.transforms.RandFlipd": ["monai"],
    "torchvision.transforms.v2.ColorJitter": ["torchvision"],
    "compare.run": STUDY,
    "command compare": STUDY,
    "command fit": COMMAND,
    **{f"command {command} --help": [] for command in ("fit", "validate", "test", "predict")},
    "command validate": COMMAND,
    "command test": COMMAND,
    "command predict": COMMAND,
    "command --help": [],
    "command --version": [],
    "ClassificationTask densenet121": ["timm"],
    "ClassificationTask densenet169": ["timm"],
    "ClassificationTask legacy_xception": ["timm"],
    "ClassificationTask mobilenetv2_100": ["timm"],
    "ClassificationTask resnet101": ["timm"],
    "ClassificationTask resnet152": ["timm"],
    "ClassificationTask resnet20": [],
    "ClassificationTask resnet50": ["timm"],
    "ClassificationTask resnet56": [],
    "ClassificationTask vgg16_bn": ["timm"],
    "SegmentationTask attention_unet": ["monai"],
    "SegmentationTask resnet50_unet": ["monai"],
    "SegmentationTask unetpp": ["monai"],
}

Runner = Callable[..., str]


def hidden(allowed: set[str], tmp_path: Path) -> Runner:
    """Return a function that runs a program of this folder in which only these packages can be imported."""

    def run(program: str | Path, *arguments: str | Path) -> str:
        started = [HERE / "only.py", ",".join(sorted(allowed)), HERE / program, *arguments]
        return run_python("-W", "ignore", *started, timeout=200, cwd=tmp_path).stdout

    return run


def answer(output: str) -> Any:
    """Return the JSON in the last line of a program's output."""
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("{"), output
    return json.loads(last)


def check_training(said: Any) -> None:
    differences = said["differences"]
    assert differences.pop("moved") > 0.1
    assert max(differences.values()) < 1e-6, differences
    assert len(differences) == 5
    assert set(said["said"]) == {
        "GradientMonitor logs its numbers, and draws no pictures. Drawing needs matplotlib and pillow: "
        "pip install lightning-znorm"
    }
    assert {"grad/norm", "grad/cosine_median", "grad/mean_share_max"} <= set(said["logged"])
    assert said["pictures"] == []
    assert said["looked_up"] == [], "the callbacks look at no package's version"
    assert said["version"] == lightning_znorm.__version__
    # Cython and torch make some modules at run time.
    made = re.compile(r"_cython_\w+|cython_runtime|_remote_module_\w+|_sysconfigdata[\w-]+|__main__|__mp_main__")
    others = {name for name in said["imported"] if not made.fullmatch(name)}
    assert others - ALONE - set(sys.stdlib_module_names) == {"lightning_znorm"}


def check_features(said: dict[str, str]) -> None:
    assert set(said) == set(FEATURES)
    for name, sentence in said.items():
        assert bool(sentence) == bool(FEATURES[name]), f"{name}: {sentence}"
        if not sentence:
            continue
        match = SENTENCE.fullmatch(sentence)
        assert match, f"{name}: {sentence}"
        assert sorted(re.split(", | and ", match["packages"])) == FEATURES[name], name
        extra = "nibabel" in FEATURES[name]
        assert match["install"] == (
            "pip install 'lightning-znorm[volumes]'" if extra else "pip install lightning-znorm"
        )
        asked = name.partition(",")[0].partition(" ")[0]
        if asked in vars(lightning_znorm) or asked.endswith("Task"):
            assert match["feature"].startswith(asked)


def test_every_public_class_is_tried() -> None:
    for room in (callbacks, data, metrics, models, tasks):
        assert set(room.__all__) <= set(FEATURES)


def test_training_where_other_packages_are_hidden(tmp_path: Path) -> None:
    run = hidden(ALONE, tmp_path)
    check_training(answer(run("bare_training.py", tmp_path)))


def test_features_where_other_packages_are_hidden(tmp_path: Path) -> None:
    check_features(answer(hidden(ALONE, tmp_path)("features.py", CONFIGS)))


def test_lightning_comes_with_numpy(tmp_path: Path) -> None:
    """No test is without NumPy and with Lightning, because Lightning imports it."""
    output = hidden(ALONE - {"numpy"}, tmp_path)("bare_training.py", tmp_path)
    assert "No module named 'numpy'" in output
    assert "lightning_znorm" not in output


FUNCTIONAL = """
import sys
import torch
from lightning_znorm.functional import attach, zscore_grads_
weight = torch.nn.Parameter(torch.zeros(2))
attach(torch.optim.SGD([weight], lr=1.0))
weight.grad = torch.tensor([1.0, 3.0])
zscore_grads_([weight])
print(weight.grad.tolist(), *sorted({name.partition(".")[0] for name in sys.modules} & {"numpy", "lightning"}))
"""


def test_functional_where_there_is_torch_alone(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(FUNCTIONAL)
    alone = import_names(closure("torch")) - {"numpy"}
    assert "lightning" not in alone
    output = hidden(alone, tmp_path)(tmp_path / "program.py")
    assert output.splitlines()[-1] == "[-1.0, 1.0]", output


WHERE_IT_WORKS = {
    "DigitsDataModule": ["scikit-learn"],
    "HausdorffDistance": ["scipy"],
    "MaskFolderDataModule": ["pillow", "rich"],
    "MaskOverlay": ["pillow", "scipy"],
    "VolumeDataModule": ["monai", "nibabel", "rich"],
    "GradientMonitor": ["matplotlib", "pillow"],
}


@pytest.mark.full
@pytest.mark.parametrize("feature", WHERE_IT_WORKS)
def test_a_feature_works_with_what_it_asks_for(feature: str, tmp_path: Path) -> None:
    """So it asks for all that it needs."""
    asked = WHERE_IT_WORKS[feature]
    assert FEATURES[feature] in (asked, [])
    allowed = import_names(closure("torch", "lightning", *asked))
    output = hidden(allowed, tmp_path)("working.py", feature, tmp_path)
    assert output.splitlines()[-1] == f"{feature} works", output


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh virtual environment with torch, lightning and the wheel of this package."""
    folder = tmp_path_factory.mktemp("bare")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")],
        [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), ROOT],
    ):
        subprocess.run(command, check=True, timeout=240)
    interpreter = folder / "venv/bin/python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([interpreter, "-c", where], check=True, capture_output=True, text=True, timeout=60).stdout
    link(NEEDED.values(), Path(site.strip()))
    (wheel,) = folder.glob("*.whl")
    install = ["--python", str(interpreter), "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=120)
    return interpreter


def run_in(environment: Path, cwd: Path, *arguments: str | Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [environment, "-W", "ignore", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**variables, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.stdout + done.stderr if done.returncode else done.stdout


@pytest.mark.full
class TestFreshEnvironment:
    def test_it_holds_nothing_else(self, environment: Path, tmp_path: Path) -> None:
        program = (
            "import importlib.metadata as metadata, json, re, lightning_znorm;"
            "names = [each.metadata['Name'] for each in metadata.distributions()];"
            "print(json.dumps({'names': [re.sub('[-_.]+', '-', name).lower() for name in names],"
            "'file': lightning_znorm.__file__}))"
        )
        found = answer(run_in(environment, tmp_path, "-c", program))
        assert set(found["names"]) == {*NEEDED, "lightning-znorm"}
        assert Path(found["file"]).is_relative_to(environment.parents[1])

    def test_training(self, environment: Path, tmp_path: Path) -> None:
        check_training(answer(run_in(environment, tmp_path, HERE / "bare_training.py", tmp_path)))

    def test_features(self, environment: Path, tmp_path: Path) -> None:
        check_features(answer(run_in(environment, tmp_path, HERE / "features.py", CONFIGS)))

    def test_command(self, environment: Path, tmp_path: Path) -> None:
        config = "configs/digits/resnet20.yaml"
        output = run_in(environment, tmp_path, "-m", "lightning_znorm", "fit", "--config", config)
        assert output.startswith("error: fit needs jsonargparse, docstring-parser and typeshed-client: pip install ")
        assert "Traceback" not in output
