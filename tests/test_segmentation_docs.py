"""docs/how-to/segmentation.md: its Python runs on a generated checkpoint, and its sums fit.

test_howto_docs.py has the command line read its YAML and run its commands.
"""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_znorm.cli import main

REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "docs/how-to/segmentation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
EXPERIMENT = str(REPOSITORY / "configs/lgg/attention-unet.yaml")


def holds(resolved: Any, written: Any) -> bool:
    """Return whether the resolved settings have all that is written."""
    if isinstance(written, list) and isinstance(resolved, list):
        return len(resolved) == len(written) and all(map(holds, resolved, written))
    if not isinstance(written, dict):
        # YAML reads 1e-4 as a text, and the command line reads it as the number that is meant.
        return resolved == (float(written) if isinstance(resolved, float) else written)
    for key, value in written.items():
        if key == "callbacks+":
            if not holds(resolved["callbacks"][-len(value) :], value):
                return False
        elif key == "class_path":
            if resolved[key].rpartition(".")[2] != value.rpartition(".")[2]:
                return False
        elif not holds(resolved[key], value):
            return False
    return True


# Lightning warns about a checkpoint that another run has written.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_from_a_checkpoint_to_masks(fake_lgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {
        "model": {"init_args": {"model_kwargs": {"channels": [4, 8], "strides": [2]}}},
        "data": {
            "init_args": {"root": str(fake_lgg), "batch_size": 4, "val_fraction": 0.3, "test_fraction": 0.3},
        },
        "trainer": {"max_epochs": 5, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    Path("small.yaml").write_text(yaml.safe_dump(settings))
    small = ["--config", EXPERIMENT, "--config", "small.yaml"]
    main(["fit", *small])
    shutil.move(next(tmp_path.rglob("last.ckpt")), "best.ckpt")
    files = sorted(path for path in fake_lgg.rglob("*.tif") if "mask" not in path.name)[:3]
    images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in files])).permute(0, 3, 1, 2)
    (code,) = (code for language, code in BLOCKS if language == "python")
    names: dict[str, Any] = {"images": images}
    exec(compile(code, "docs/how-to/segmentation.md", "exec"), names)
    masks = names["masks"]
    assert (masks.dtype, masks.shape) == (torch.bool, (3, 1, 32, 32))

    # `predict` of the same checkpoint writes the same masks.
    (tmp_path / "new").mkdir()
    for path in files:
        shutil.copy(path, tmp_path / "new")
    main(["predict", *small, "--ckpt_path", "best.ckpt", "--data.init_args.predict_root", "new"])
    for path, mask in zip(files, masks[:, 0], strict=True):
        (written,) = (each for each in tmp_path.rglob(f"masks/**/{path.stem}*") if each.is_file())
        assert np.array_equal(np.asarray(Image.open(written)) > 0, mask.numpy())
    assert masks.any()
    assert not masks.all()


def table(title: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins so."""
    lines = TEXT[TEXT.index(title) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def measured() -> dict[tuple[str, str], list[float]]:
    """Return MiB of an image, once and of the weights by network and precision, as the benchmark printed them."""
    text = (REPOSITORY / "benchmarks/results/activations.md").read_text()
    rows = re.findall(r"^\| (\w+) +\| (32-true|bf16-mixed) +\| +([\d.]+) \| +([\d.]+) \| +([\d.]+) \|", text, re.M)
    return {(network, precision): list(map(float, numbers)) for network, precision, *numbers in rows}


def test_memory_is_what_was_measured() -> None:
    needs = measured()
    assert len(needs) == 6
    for network, *cells in table("| network | float32: MiB"):
        for precision, image, batch in (("32-true", *cells[:2]), ("bf16-mixed", *cells[2:])):
            of_image, *once = needs[network.strip("`"), precision]
            assert float(image) == round(of_image)
            assert float(batch) == round((128 * of_image + sum(once)) / 1024)


def test_cards_follow_from_it() -> None:
    needs, network = measured(), ""
    for name, precision, *cards, jobs in table("| network | precision | 24 GB"):
        network = name.strip("`") or network
        image, *once = needs[network, precision.replace("float32", "32-true")]
        for memory, cell in zip((24, 40, 80), cards, strict=True):
            free = 0.8 * 1024 * memory
            fits = 2 ** int(math.log2((free - sum(once)) / image))
            assert cell.split(" (")[0] == ("128" if fits >= 128 else f"{fits} x {128 // fits}")
        assert int(jobs) == int(0.8 * 1024 * 80 // (128 * image + sum(once)))


def test_script_of_table_3_follows_from_it() -> None:
    script = (REPOSITORY / "examples/paper/table3_lgg.sh").read_text()
    (row,) = (row for row in table("| network | precision | 24 GB") if row[:2] == ["`resnet50_unet`", "float32"])
    assert f"MODELS=resnet50-unet sh examples/paper/table3_lgg.sh --jobs {row[-1]} " in script
    sizes = [row[2] for row in table("| network | float32: MiB")]
    assert re.search(r"takes {} \(resnet50-unet\), {} \(unetpp\) or {} GiB".format(*sizes), script)
