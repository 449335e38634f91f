import pickle
import tarfile
from collections.abc import Iterator
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from numbered import Recorder
from torchvision.datasets import CIFAR10

from lightning_znorm.data import CIFAR10DataModule
from lightning_znorm.data.augmentation import random_crop_and_flip


def fit(data: CIFAR10DataModule, **kwargs) -> Recorder:
    recorder = Recorder()
    recorder.layer = torch.nn.Linear(3, 10)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **kwargs},
    )
    trainer.fit(recorder, datamodule=data)
    return recorder


def pixels(data: CIFAR10DataModule, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


class TestReading:
    def test_as_torchvision_reads_it(self, fake_cifar10):
        for train, count in ((True, 200), (False, 40)):
            reference = CIFAR10(fake_cifar10, train=train)
            images, labels = CIFAR10DataModule(fake_cifar10).load(train)
            assert images.shape == (count, 3, 32, 32)
            for i in (0, 7, count - 1):
                image, label = reference[i]
                assert np.array_equal(images[i].transpose(1, 2, 0), np.asarray(image))
                assert labels[i] == label

    def test_sets(self, fake_cifar10):
        data = CIFAR10DataModule(root=fake_cifar10, val_fraction=0.1)
        data.setup("fit")
        assert (len(data.train_set), len(data.val_set)) == (180, 20)
        assert np.bincount(data.val_set.labels).tolist() == [2] * 10
        assert not hasattr(data, "test_set")
        data.setup("test")
        assert len(data.test_set) == 40

    def test_relative_root(self, fake_cifar10, monkeypatch):
        monkeypatch.chdir(fake_cifar10.parent)
        data = CIFAR10DataModule(root=fake_cifar10.name)
        monkeypatch.chdir("/")
        data.setup("test")
        assert len(data.test_set) == 40

    def test_defaults(self):
        data = CIFAR10DataModule()
        assert data.root == Path.cwd() / "data"
        assert dict(data.hparams) == {
            "root": "data",
            "batch_size": 256,
            "val_fraction": 0.1,
            "seed": 0,
            "augment": False,
            "download": False,
        }

    def test_prepare_data_sets_no_state(self, fake_cifar10):
        data = CIFAR10DataModule(fake_cifar10, download=True)
        before = dict(vars(data))
        data.prepare_data()
        assert vars(data) == before


class TestMistakes:
    def test_no_data(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        data = CIFAR10DataModule("no such folder")
        with pytest.raises(FileNotFoundError) as caught:
            data.setup("fit")
        message = str(caught.value)
        assert f"No CIFAR-10 at {tmp_path / 'no such folder'}: " in message
        assert "--data.init_args.download=true" in message
        assert "download=True" in message
        assert "cifar-10-batches-py" in message

    @pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
    @pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
    @pytest.mark.parametrize("damage", ["corrupted", "truncated", "missing"])
    def test_damaged_file(self, fake_cifar10, name, damage, stage):
        path = fake_cifar10 / "cifar-10-batches-py" / name
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if damage == "truncated" else bytes(len(content)))
        with pytest.raises(RuntimeError) as caught:
            CIFAR10DataModule(fake_cifar10).setup(stage)
        state = "missing" if damage == "missing" else "corrupted"
        assert f"{path} is {state}: download CIFAR-10 again with download=True" in str(caught.value)

    def test_every_damaged_file_is_named(self, fake_cifar10):
        folder = fake_cifar10 / "cifar-10-batches-py"
        (folder / "data_batch_1").write_bytes(b"")
        (folder / "data_batch_5").unlink()
        with pytest.raises(RuntimeError, match=r"data_batch_1 is corrupted and .*data_batch_5 is missing: "):
            CIFAR10DataModule(fake_cifar10).setup("fit")

    def test_a_damaged_file_is_not_unpickled(self, fake_cifar10, tmp_path):
        class Opened:
            def __reduce__(self):
                return Path.touch, (tmp_path / "unpickled",)

        (fake_cifar10 / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Opened()))
        with pytest.raises(RuntimeError, match="data_batch_1 is corrupted"):
            CIFAR10DataModule(fake_cifar10).setup("fit")
        assert not (tmp_path / "unpickled").exists()

    def test_raised_before_training(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No CIFAR-10 at"):
            fit(CIFAR10DataModule(tmp_path))


class TestDownload:
    @pytest.fixture
    def archive(self, fake_cifar10, tmp_path, monkeypatch) -> Iterator[Path]:
        """Pack the fake data, and offer them for download in place of CIFAR-10's archive."""
        archive = tmp_path / "server" / CIFAR10.filename
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(fake_cifar10 / CIFAR10.base_folder, CIFAR10.base_folder)
        handler = partial(SimpleHTTPRequestHandler, directory=archive.parent)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
            monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive.read_bytes()).hexdigest())
            Thread(target=server.serve_forever).start()
            yield archive
            server.shutdown()

    def test_downloads_what_is_missing(self, archive, tmp_path, capfd):
        data = CIFAR10DataModule(tmp_path / "new" / "root", download=True)
        data.prepare_data()
        assert "100%" in capfd.readouterr().err  # torchvision's progress
        data.setup("fit")
        assert len(data.train_set) == 180

    def test_replaces_what_is_damaged(self, archive, fake_cifar10):
        (fake_cifar10 / CIFAR10.base_folder / "data_batch_2").write_bytes(b"half a fi")
        data = CIFAR10DataModule(fake_cifar10, download=True)
        data.prepare_data()
        data.setup("fit")
        assert len(data.train_set) == 180

    def test_an_archive_that_is_not_the_published_one_is_not_unpacked(self, archive, tmp_path):
        """The archive might write outside of root."""
        (tmp_path / "letter").write_text("mine")
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "letter", "../outside")
        with pytest.raises(RuntimeError, match="not found or corrupted"):
            CIFAR10DataModule(tmp_path / "new" / "root", download=True).prepare_data()
        assert not (tmp_path / "new" / "outside").exists()

    def test_only_if_asked_to(self, archive, tmp_path):
        data = CIFAR10DataModule(tmp_path / "new")
        data.prepare_data()
        assert not (tmp_path / "new").exists()

    def test_failure(self, archive, tmp_path):
        archive.unlink()
        root = tmp_path / "new"
        with pytest.raises(RuntimeError, match=f"could not be downloaded into {root} .*: fetch http://.* unpack"):
            CIFAR10DataModule(root, download=True).prepare_data()


class TestAugment:
    def test_training_images_are_cropped_and_mirrored_and_others_are_not(self, fake_cifar10, monkeypatch):
        given = []
        monkeypatch.setattr(
            "lightning_znorm.data.cifar10.random_crop_and_flip",
            lambda images: (given.append(images), random_crop_and_flip(images))[1],
        )
        data = CIFAR10DataModule(fake_cifar10, batch_size=180, augment=True)
        recorder = fit(data)
        originals = {image.numpy().tobytes() for image in given[0]}
        assert originals == {image.tobytes() for image in data.train_set.images}
        views = [image.numpy().tobytes() for image in pixels(data, recorder.seen["train"][0][0])]
        assert sum(view in originals for view in views) < 10  # 1 in 162 is the image itself
        val = pixels(data, recorder.seen["val"][-1][0])
        assert np.array_equal(val.numpy(), data.val_set.images)

    def test_not_by_default(self, fake_cifar10):
        data = CIFAR10DataModule(fake_cifar10, batch_size=180)
        views = pixels(data, fit(data).seen["train"][0][0])
        assert {image.numpy().tobytes() for image in views} == {image.tobytes() for image in data.train_set.images}

    def test_the_seed_repeats_it(self, fake_cifar10):
        def images() -> torch.Tensor:
            torch.manual_seed(3)
            return fit(CIFAR10DataModule(fake_cifar10, augment=True)).seen["train"][0][0]

        assert torch.equal(images(), images())


def test_a_checkpoint_holds_plain_values(fake_cifar10, tmp_path):
    fit(
        CIFAR10DataModule(fake_cifar10, batch_size=90, seed=4),
        enable_checkpointing=True,
        default_root_dir=tmp_path / "run",
    )
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    assert saved["root"] == str(fake_cifar10)
    data = CIFAR10DataModule.load_from_checkpoint(path)
    assert (data.batch_size, data.seed, data.root) == (90, 4, fake_cifar10)


class TestRealImages:
    def test_sets(self, real_cifar10):
        data = CIFAR10DataModule(real_cifar10)
        data.setup("fit")
        data.setup("test")
        assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (45_000, 5_000, 10_000)
        assert np.bincount(data.val_set.labels).tolist() == [500] * 10

    @pytest.mark.full
    def test_mean_and_std_are_those_of_the_training_images(self, real_cifar10):
        data = CIFAR10DataModule(real_cifar10)
        images, _ = data.load(train=True)
        counts = np.stack([np.bincount(images[:, c].ravel(), minlength=256) for c in range(3)])
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(1)
        std = np.sqrt(counts @ values**2 / counts.sum(1) - mean**2)
        assert data.mean == pytest.approx(mean, abs=5e-5)
        assert data.std == pytest.approx(std, abs=5e-5)
