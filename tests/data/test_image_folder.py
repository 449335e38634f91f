import pickle
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numbered import Recorder
from PIL import Image
from torch.utils.data import SequentialSampler
from torchvision import transforms

from lightning_znorm.cli import main
from lightning_znorm.data import ImageFolderDataModule
from lightning_znorm.data.base import ImageDataModule
from lightning_znorm.data.samplers import SeededSampler
from tests.data.ddp_image_folder import see_folder
from tests.data.jpegs import numbers, pixels, write_image_folder
from tests.distributed import run_distributed
from tests.trainers import trainer

CLASSES, TRAIN, VAL, STEP = 4, 15, 5, 3  # of each class; 60 and 20 images, of blue 0, 3, 6, ... 237
TRAIN_NUMBERS, TEST_NUMBERS = list(range(60)), list(range(60, 80))

# Of Python 3.12 and later, when a loader starts its workers beside torch's threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Return the root of 60 + 20 images, which no test changes."""
    root = tmp_path_factory.mktemp("images") / "my images"
    return write_image_folder(root, classes=CLASSES, train=TRAIN, val=VAL, step=STEP)


@pytest.fixture
def own_images(tmp_path) -> Path:
    """Return the root of 12 + 3 images in three classes, which a test may damage."""
    return write_image_folder(tmp_path / "my images", classes=3, train=4, val=1)


def module(root: Path, **kwargs) -> ImageFolderDataModule:
    small = {"batch_size": 8, "num_workers": 0, "image_size": 32, "resize_size": 36, "val_fraction": 0.2}
    return ImageFolderDataModule(root, **{**small, **kwargs})


def recorder() -> Recorder:
    module = Recorder()
    module.layer = torch.nn.Linear(3, CLASSES)
    return module


def flat(lists: list[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


def seen(data: ImageDataModule, batches: list) -> list[int]:
    return flat([numbers(data, images, STEP) for images, _ in batches])


class TestReading:
    def test_sets(self, images):
        data = module(images)
        assert (data.num_classes, data.classes) == (4, ["n00000000", "n00000001", "n00000002", "n00000003"])
        data.setup("fit")
        assert (len(data.train_set), len(data.val_set)) == (48, 12)
        assert np.bincount(data.train_set.labels).tolist() == [12] * 4
        assert np.bincount(data.val_set.labels).tolist() == [3] * 4
        assert not hasattr(data, "test_set")
        data.setup("test")
        assert len(data.test_set) == 20

    def test_an_image_has_the_label_of_its_folder(self, images):
        data = module(images)
        data.setup("fit")
        data.setup("test")
        for dataset, first, of_each in ((data.train_set, 0, TRAIN), (data.val_set, 0, TRAIN), (data.test_set, 60, VAL)):
            for image, label in dataset:
                assert image.dtype == torch.uint8
                assert image.shape == (3, 32, 32)
                assert label == ((image[2].float().mean() / STEP).round().int() - first) // of_each

    def test_relative_root(self, images, monkeypatch):
        monkeypatch.chdir(images.parent)
        data = module(images.name)
        monkeypatch.chdir("/")
        data.setup("test")
        assert data.test_set[0][0].shape == (3, 32, 32)

    def test_defaults(self):
        data = ImageFolderDataModule()
        assert data.root == Path.cwd() / "data"
        assert dict(data.hparams) == {
            "root": "data",
            "batch_size": 256,
            "num_workers": 8,
            "image_size": 224,
            "resize_size": 256,
            "val_fraction": 0.1,
            "seed": 0,
        }

    @pytest.mark.parametrize(
        ("mode", "suffix", "color", "expected"),
        [
            ("L", ".jpg", 90, (90, 90, 90)),
            ("RGBA", ".png", (10, 20, 30, 128), (10, 20, 30)),
            ("CMYK", ".jpeg", (255, 0, 0, 0), (0, 255, 255)),
            ("1", ".bmp", 1, (255, 255, 255)),
        ],
    )
    def test_images_of_other_modes_become_rgb(self, own_images, mode, suffix, color, expected):
        folder = own_images / "val" / "n00000001"
        for path in folder.iterdir():
            path.unlink()
        Image.new(mode, (50, 40), color).save(folder / f"image{suffix}")
        data = module(own_images)
        data.setup("test")
        image, label = data.test_set[1]
        assert label == 1
        assert (image.int() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 1

    def test_names_that_are_not_ascii(self, own_images):
        folder = own_images / "val" / "n00000001"
        (path,) = folder.iterdir()
        path.rename(folder / "Äpfel und Birnen.JPEG")
        data = module(own_images)
        data.setup("test")
        assert data.test_set[1][0].shape == (3, 32, 32)

    def test_workers_may_be_spawned(self, images):
        data = module(images)
        data.setup("fit")
        copy = pickle.loads(pickle.dumps(data.val_set))
        assert torch.equal(copy[3][0], data.val_set[3][0])


class TestSplit:
    def test_validation_is_apart_from_training(self, images):
        data = module(images)
        data.setup("fit")
        paths = {*data.train_set.paths.tolist(), *data.val_set.paths.tolist()}
        assert len(paths) == 60
        assert all(path.startswith(str(images / "train").encode()) for path in paths)
        data.setup("test")
        assert all(path.startswith(str(images / "val").encode()) for path in data.test_set.paths.tolist())

    def test_the_seed_draws_it(self, images):
        def drawn(seed: int) -> list[bytes]:
            data = module(images, seed=seed)
            data.setup("validate")
            return data.val_set.paths.tolist()

        assert drawn(0) == drawn(0)
        assert sorted(drawn(0)) != sorted(drawn(1))


class TestTransforms:
    def test_evaluation_as_torchvision_does(self, images):
        data = module(images)
        data.setup("fit")
        data.setup("test")
        reference = transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32), transforms.PILToTensor()])
        for dataset in (data.val_set, data.test_set):
            for index in (0, len(dataset) - 1):
                expected = reference(Image.open(dataset.paths[index].decode()))
                assert torch.equal(dataset[index][0], expected)

    def test_training_crops_and_mirrors(self, images):
        """Red and green tell the position of a pixel in the stored image."""
        data = module(images)
        data.setup("fit")
        torch.manual_seed(0)
        crops = torch.stack([data.train_set[index % 48][0] for index in range(960)]).double() / 255
        across, down = crops[:, 0].mean(1), crops[:, 1].mean(2)  # where each column, and each row, comes from
        # The pixels at the edges are half a pixel of 32 inside of the crop.
        widths = (across[:, -1] - across[:, 0]) * 32 / 31
        heights = (down[:, -1] - down[:, 0]) * 32 / 31
        assert (heights > 0.1).all()
        areas = widths.abs() * heights
        assert areas.min() == pytest.approx(0.08, abs=0.03)
        assert areas.max() == pytest.approx(1, abs=0.05)
        assert areas.mean() == pytest.approx(0.5, abs=0.1)
        ratios = (widths.abs() * 48) / (heights * 40)
        assert 3 / 4 - 0.1 < ratios.min() < ratios.max() < 4 / 3 + 0.15
        assert (widths < 0).double().mean() == pytest.approx(0.5, abs=0.05)
        for positions in (across.mean(1), down.mean(1)):
            assert positions.std() > 0.05  # not always around the centre

    def test_the_seed_repeats_them(self, images):
        data = module(images)
        data.setup("fit")
        torch.manual_seed(0)
        first, second = data.train_set[0][0], data.train_set[0][0]
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(data.train_set[0][0], first)


class TestLoaders:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_in_the_trainer(self, images, num_workers):
        data, model = module(images, num_workers=num_workers, batch_size=7), recorder()
        run = trainer(max_epochs=2, num_sanity_val_steps=0)
        run.fit(model, datamodule=data)
        train = [len(labels) for _, labels in model.seen["train"]]
        assert train == [7, 7, 7, 7, 7, 7, 6] * 2  # nothing dropped
        first, second = (seen(data, model.seen["train"][epoch]) for epoch in (slice(0, 7), slice(7, 14)))
        assert first != second
        assert sorted(first) == sorted(second)
        val = seen(data, model.seen["val"][:2])
        assert sorted([*first, *val]) == TRAIN_NUMBERS
        assert seen(data, model.seen["val"][2:]) == val
        run.test(model, datamodule=data, verbose=False)
        run.predict(model, datamodule=data)
        assert seen(data, model.seen["test"]) == seen(data, model.seen["predict"]) == TEST_NUMBERS
        for images_, labels in model.seen["train"]:
            assert images_.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert [number // TRAIN for number in numbers(data, images_, STEP)] == labels.tolist()

    def test_what_travels(self, images):
        data = module(images)
        data.setup("fit")
        batch, labels = next(iter(data.train_dataloader()))
        assert (batch.dtype, batch.shape) == (torch.uint8, (8, 3, 32, 32))
        assert (labels.dtype, labels.shape) == (torch.int64, (8,))

    def test_normalized_on_the_device(self, images):
        data, model = module(images), recorder()
        trainer().test(model, datamodule=data, verbose=False)
        stored = torch.stack([data.test_set[i][0] for i in range(8)])
        expected = transforms.Normalize(data.mean, data.std)(stored / 255)
        torch.testing.assert_close(model.seen["test"][0][0], expected)
        assert torch.equal(pixels(data, model.seen["test"][0][0]), stored)

    def test_only_training_is_shuffled(self, images):
        data = module(images)
        data.setup("fit")
        data.setup("test")
        assert isinstance(data.train_dataloader().sampler, SeededSampler)
        for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
            assert isinstance(loader.sampler, SequentialSampler)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_workers_persist(self, images, num_workers):
        data = module(images, num_workers=num_workers)
        data.setup("fit")
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert loader.num_workers == num_workers
            assert loader.persistent_workers == (num_workers > 0)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_memory_is_pinned_for_cuda_alone(self, images, device):
        data = module(images)
        data.setup("fit")
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        assert data.val_dataloader().pin_memory == (device == "cuda")


def test_two_processes_see_disjoint_halves(images):
    first, second = run_distributed(see_folder, images, STEP)
    # 54 training images, 27 for each process: batches of 8, 8, 8 and 3, in each of two epochs.
    assert [len(batch) for batch in first["train"]] == [len(batch) for batch in second["train"]] == [8, 8, 8, 3] * 2
    val = {*flat(first["val"]), *flat(second["val"])}
    assert len(val) == 6
    for epoch in (slice(0, 4), slice(4, 8)):
        mine, others = flat(first["train"][epoch]), flat(second["train"][epoch])
        assert set(mine).isdisjoint(others)
        assert {*mine, *others, *val} == set(TRAIN_NUMBERS)
    assert set(flat(first["train"][:4])) != set(flat(first["train"][4:]))
    assert sorted([*flat(first["test"]), *flat(second["test"])]) == TEST_NUMBERS


def test_a_checkpoint_holds_plain_values(images, tmp_path):
    run = trainer(enable_checkpointing=True, default_root_dir=tmp_path, limit_train_batches=1, limit_val_batches=1)
    run.fit(recorder(), datamodule=module(images, seed=4))
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["datamodule_hyper_parameters"]["root"] == str(images)
    data = ImageFolderDataModule.load_from_checkpoint(path)
    assert (data.root, data.seed, data.resize_size) == (images, 4, 36)


class TestMistakes:
    @pytest.mark.parametrize("stage", ["fit", "test"])
    @pytest.mark.parametrize("part", ["train", "val"])
    def test_no_folder(self, own_images, part, stage):
        (own_images / part).rename(own_images / "elsewhere")
        with pytest.raises(FileNotFoundError, match=f"No folder {own_images / part}: let root name the folder"):
            module(own_images).setup(stage)

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_no_class_folders(self, own_images, part):
        """ImageNet's validation images are published in one folder."""
        for folder in list((own_images / part).iterdir()):
            for path in folder.iterdir():
                path.rename(own_images / part / path.name)
            folder.rmdir()
        with pytest.raises(FileNotFoundError, match=f"No class folders in {own_images / part}: sort its images into"):
            module(own_images).setup("fit")

    @pytest.mark.parametrize(("part", "other"), [("train", "val"), ("val", "train")])
    def test_different_classes(self, own_images, part, other):
        (own_images / part / "n00000001").rename(own_images / part / "n00000009")
        with pytest.raises(ValueError, match="train and val have different classes") as caught:
            module(own_images).setup("fit")
        assert f"n00000009 only in {own_images / part}" in str(caught.value)
        assert f"n00000001 only in {own_images / other}" in str(caught.value)

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_more_classes(self, own_images, part):
        for number in range(5):
            (own_images / part / f"a{number}").mkdir()
        message = f"(a0, a1, a2 and 2 more only in {own_images / part}): both must hold the same folders."
        with pytest.raises(ValueError, match="different classes") as caught:
            module(own_images).setup("test")
        assert str(caught.value).endswith(message)

    @pytest.mark.parametrize(("part", "stage"), [("train", "fit"), ("val", "test")])
    def test_no_images(self, own_images, part, stage):
        folder = own_images / part / "n00000002"
        for path in list(folder.iterdir()):
            path.rename(path.with_suffix(".txt"))
        with pytest.raises(FileNotFoundError, match=f"No images in {folder}: .* end in .jpg, .jpeg, "):
            module(own_images).setup(stage)

    def test_one_image_of_a_class(self, own_images):
        for path in sorted((own_images / "train" / "n00000002").iterdir())[1:]:
            path.unlink()
        with pytest.raises(ValueError, match=f"{own_images / 'train' / 'n00000002'} holds only one image, "):
            module(own_images).setup("fit")

    @pytest.mark.parametrize("val_fraction", [0.01, 0.99])
    def test_fraction_without_an_image_of_each_class(self, own_images, val_fraction):
        with pytest.raises(ValueError, match=rf"val_fraction={val_fraction} of the 12 images in .* 3 classes"):
            module(own_images, val_fraction=val_fraction).setup("fit")

    @pytest.mark.parametrize("sizes", [(40, 36), (0, 36)])
    def test_sizes(self, own_images, sizes):
        image_size, resize_size = sizes
        with pytest.raises(ValueError, match=f"image_size={image_size} must be .* at most resize_size=36"):
            module(own_images, image_size=image_size, resize_size=resize_size)

    @pytest.mark.parametrize(
        ("damage", "num_workers"), [("truncated", 0), ("no image", 0), ("gone", 0), ("truncated", 2)]
    )
    def test_unreadable_image(self, own_images, damage, num_workers):
        data = module(own_images, num_workers=num_workers)
        data.setup("test")
        path = own_images / "val" / "n00000001" / "n00000001_0000.JPEG"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"<html>404</html>")
        if damage == "gone":
            path.unlink()
        with pytest.raises(RuntimeError) as caught:
            list(data.test_dataloader())
        assert f"{path} cannot be read as an image (" in str(caught.value)
        assert "): convert, replace or remove it." in str(caught.value)
        # They hold the workers, which Python 3.10 ends badly, in some later test, if it is by collecting garbage.
        traceback.clear_frames(caught.tb)

    def test_in_one_sentence(self, own_images, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        command = ["fit", "--config", "configs/imagenet/resnet50.yaml", "--model.init_args.model", "resnet20"]
        with pytest.raises(SystemExit) as exit_info:
            main([*command, "--trainer.accelerator", "cpu"])
        assert str(exit_info.value.code).startswith(f"error: No folder {tmp_path / 'data/imagenet/train'}: ")
        flags = ["--data.init_args.root", str(own_images), "--data.init_args.val_fraction", "0.5"]
        with pytest.raises(SystemExit) as exit_info:
            main([*command, *flags, "--trainer.accelerator", "cpu"])
        assert str(exit_info.value.code) == (
            "error: ImageFolderDataModule has 3 classes, and the task was given num_classes=1000: make it 3 (in YAML, "
            "model.init_args.num_classes)."
        )
