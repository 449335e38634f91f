"""Files that are damaged, gone, unreadable or too few give an error that names them, or a correct run."""

import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.data import PCamDataModule
from lightning_znorm.data.splits import stratified_indices
from lightning_znorm.tasks import ClassificationTask
from tests.data.somebody_else import as_somebody_else
from tests.fuzz.mutations import read_mutated
from tests.fuzz.readers import RUN, SENTENCE, TARGETS, outcome
from tests.medical import PCAM, write_pcam
from tests.processes import run_python
from tests.trainers import trainer


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_a_folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


# A bit of an uncompressed image, or of a label, is not guarded by anything; but it makes no impossible data.
UNGUARDED = {
    "PCam images, h5",
    "PCam labels, h5",
    "PCam image, Kaggle tif",
    "LGG slice, tif",
    "LGG slice, tif LZW",
    "image to predict, bmp",
    "own image, npy",
    "own image, tif",
    "image folder, JPEG",
}


@pytest.mark.parametrize("name", [name for name in TARGETS if "YAML" not in name])
@pytest.mark.parametrize(
    "damage", [cut(0), cut(0.01), cut(0.5), cut(0.97), flip_a_bit, put_a_folder_in_its_place, Path.unlink]
)
def test_damaged_file(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    target = TARGETS[name]
    folder = tmp_path / "földer with 空白"
    folder.mkdir()
    path = target.make(folder)
    assert outcome(target, folder, path) == RUN
    damage(path)
    found = outcome(target, folder, path)
    if damage is flip_a_bit and name in UNGUARDED:
        assert found in (RUN, SENTENCE)
    else:
        assert found == SENTENCE


@pytest.mark.skipif(sys.platform == "win32", reason="chmod keeps nobody from reading on Windows")
@pytest.mark.parametrize("name", [name for name in TARGETS if "YAML" not in name])
def test_unreadable_file(name: str) -> None:
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as made:  # not tmp_path, where others than its owner see nothing at all
        os.chmod(made, 0o777)
        folder = Path(made)
        path = target.make(folder)
        assert outcome(target, folder, path) == RUN  # which imports what others may not be allowed to read
        shutil.rmtree(folder / "cache", ignore_errors=True)
        path.chmod(0)

        def read(folder: Path) -> None:
            with as_somebody_else():
                target.read(folder)

        assert outcome(dataclasses.replace(target, read=read), folder, path) == SENTENCE


@pytest.mark.parametrize("name", [name for name in TARGETS if "YAML" in name])
def test_config_as_it_is(name: str, tmp_path: Path) -> None:
    path = TARGETS[name].make(tmp_path)
    assert outcome(TARGETS[name], tmp_path, path) == RUN


@pytest.mark.parametrize("case", range(66))
def test_mutated_file(case: int, tmp_path: Path) -> None:
    """A few of the thousands of changes that `python -m tests.fuzz.mutations` tries."""
    names = list(TARGETS)
    assert read_mutated(TARGETS[names[case % len(names)]], (7, case), tmp_path) in (RUN, SENTENCE)


SEEDS = Path(__file__).parents[1] / "fuzz" / "seeds"


@pytest.mark.parametrize("seed", sorted(SEEDS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_fuzzing_found(seed: Path, tmp_path: Path) -> None:
    target = TARGETS[seed.parent.name]
    path = target.make(tmp_path)
    path.write_bytes(seed.read_bytes())
    assert outcome(target, tmp_path, path) in (RUN, SENTENCE)


def pcam(root: Path, **dataset: object) -> tuple[PCamDataModule, Path]:
    """Return a data module that is ready to train, and the file of its training images."""
    write_pcam(root, (6, 4, 4), **dataset)
    data = PCamDataModule(root, batch_size=3, cache_dir=root / "cache")
    data.prepare_data()
    data.setup("fit")
    return data, root / "pcam" / PCAM.format(split="train", what="x")


def test_file_that_vanishes_before_training(tmp_path: Path) -> None:
    data, path = pcam(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match=f"{path} cannot be read any more \\(No such file or directory\\): put it back."):
        next(iter(data.train_dataloader()))


def test_file_that_vanishes_during_training_is_read_to_its_end(tmp_path: Path) -> None:
    data, path = pcam(tmp_path)
    expected = dict.fromkeys(image.numpy().tobytes() for batch in data.train_dataloader() for image in batch[0])
    batches = iter(data.train_dataloader())
    read = [image.numpy().tobytes() for image in next(batches)[0]]
    path.unlink()
    read += [image.numpy().tobytes() for batch in batches for image in batch[0]]
    assert len(read) == 6
    assert set(read) == set(expected)


def test_file_that_shrinks_before_training(tmp_path: Path) -> None:
    data, path = pcam(tmp_path)
    cut(0.5)(path)
    with pytest.raises(OSError, match="has become shorter since it was opened"):
        next(iter(data.train_dataloader()))


SHORTENED = """
import os, sys
from pathlib import Path
from tests.data.test_bad_files import pcam

data, path = pcam(Path(sys.argv[1]))
batches = iter(data.train_dataloader())
next(batches)
print("training", flush=True)
os.truncate(path, 1)
print("read", len(list(batches)))
"""


@pytest.mark.full
def test_file_that_is_shortened_during_training_ends_the_process(tmp_path: Path) -> None:
    """The system kills a process that reads mapped memory behind the end of the file: it gets no wrong images."""
    finished = run_python("-c", SHORTENED, tmp_path, timeout=120)
    assert finished.returncode == -signal.SIGBUS
    assert finished.stdout.splitlines()[-1] == "training"


@pytest.mark.parametrize("damage", [cut(0), cut(0.5)])
def test_decoded_file_that_is_incomplete_is_made_anew(damage: Callable[[Path], None], tmp_path: Path) -> None:
    data, _ = pcam(tmp_path, compression="gzip")
    (cached,) = (tmp_path / "cache").glob("pcam-train*")
    whole = cached.read_bytes()
    damage(cached)
    data.prepare_data()
    assert cached.read_bytes() == whole


def test_cache_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=f"{tmp_path / 'cache'} takes no files .*: let cache_dir name a folder that does"):
        pcam(tmp_path, compression="gzip")


def test_one_image(tmp_path: Path) -> None:
    write_pcam(tmp_path, (1, 1, 1))
    data = PCamDataModule(tmp_path)
    task = ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(96 * 96 * 3, 2)), num_classes=2)
    fitted = trainer()
    fitted.fit(task, data)
    assert fitted.global_step == 1


@pytest.mark.parametrize("labels", [[0], [0, 1, 1], [0] * 5 + [1] * 5])
def test_too_few_to_split(labels: list[int]) -> None:
    classes = len(set(labels))
    with pytest.raises(ValueError, match=f"{len(labels)} images of {classes} classes cannot be split .* share of 0.1"):
        stratified_indices(np.array(labels), 0.1, seed=0)


def last_batch_of_one(size: int) -> tuple[ClassificationTask, DataLoader]:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * size * size, 2))
    images = TensorDataset(torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0]))
    return ClassificationTask(network, num_classes=2), DataLoader(images, batch_size=4)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_last_batch_of_one_for_batch_normalization() -> None:
    with pytest.raises(ValueError, match=r"Batch 1 holds one image, and batch normalization needs two .* batch_size"):
        trainer().fit(*last_batch_of_one(size=1))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_last_batch_of_one_with_larger_maps() -> None:
    fitted = trainer()
    fitted.fit(*last_batch_of_one(size=2))
    assert fitted.global_step == 2
