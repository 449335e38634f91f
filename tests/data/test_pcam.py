import csv
import gzip
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from numbered import Recorder
from PIL import Image
from torch.utils.data import SequentialSampler
from torchvision.datasets import PCAM as TorchvisionPCAM

from lightning_znorm.data import PCamDataModule
from lightning_znorm.data.samplers import BlockSampler
from tests.data.ddp_pcam import see
from tests.distributed import run_distributed
from tests.medical import PCAM, patches, write_kaggle_pcam, write_pcam
from tests.trainers import trainer

CHUNKED = [
    {"chunks": (1, 96, 96, 3), "compression": "gzip"},
    {"chunks": (9, 96, 96, 3), "compression": "lzf", "shuffle": True},
    {"chunks": (7, 12, 24, 1)},
    {"chunks": True, "compression": "gzip"},
]


class Patches(Recorder):
    """Records the batches of every stage, as they reach a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)


@pytest.fixture
def recorded():
    def run(data: PCamDataModule, **kwargs) -> Patches:
        module, run = Patches(), trainer(num_sanity_val_steps=0, **kwargs)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
        return module

    return run


def set_up(root: Path, *stages: str, **kwargs) -> PCamDataModule:
    data = PCamDataModule(root, **kwargs)
    for stage in stages or ("fit", "test"):
        data.setup(stage)
    return data


def flat(lists: list[list[float]]) -> list[float]:
    return [value for values in lists for value in values]


def counted(images, labels) -> Counter:
    return Counter((np.asarray(image).tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def in_set(data_set) -> Counter:
    images, labels = data_set.__getitems__(list(range(len(data_set))))
    return counted(images.permute(0, 2, 3, 1), labels)


def in_batches(data: PCamDataModule, batches: list) -> Counter:
    """Undo the normalization."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return counted(((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1), labels)


class TestHDF5:
    @pytest.mark.parametrize("dataset", [{}, *CHUNKED], ids=str)
    def test_the_given_split_in_the_trainer(self, tmp_path, recorded, dataset):
        written = write_pcam(tmp_path, **dataset)
        data = PCamDataModule(tmp_path, batch_size=16, cache_dir=tmp_path / "cache")
        module = recorded(data)
        for split, stage in (("train", "train"), ("valid", "val"), ("test", "test")):
            assert in_batches(data, module.seen[stage]) == counted(*written[split])
        images, labels = module.seen["train"][0]
        assert images.shape == (16, 3, 96, 96)
        assert images.dtype == torch.float32
        assert labels.shape == (16,)
        assert labels.dtype == torch.int64
        assert (tmp_path / "cache").exists() == bool(dataset)

    @pytest.mark.parametrize("storage", ["user block", "other file"])
    def test_where_the_offset_is_another(self, tmp_path, storage):
        """An HDF5 file may begin with a block of the user's, and its values may be in another file."""
        write_pcam(tmp_path)
        path = tmp_path / "pcam" / PCAM.format(split="train", what="x")
        images, labels = patches(40, seed=9)
        elsewhere = {"external": [(str(tmp_path / "raw"), 0, images.nbytes)]} if storage == "other file" else {}
        with h5py.File(path, "w", userblock_size=1024 if storage == "user block" else 0) as file:
            file.create_dataset("x", data=images, **elsewhere)
        data = set_up(tmp_path, "fit", cache_dir=tmp_path / "cache")
        assert in_set(data.train_set) == counted(images, labels)

    def test_as_torchvision_reads_it(self, fake_pcam):
        data = set_up(fake_pcam)
        for split, rows in (("train", data.train_set), ("val", data.val_set), ("test", data.test_set)):
            reference = TorchvisionPCAM(fake_pcam, split)
            assert len(rows) == len(reference)
            for i in (0, 5, len(reference) - 1):
                image, label = reference[i]
                assert np.array_equal(rows[i][0].permute(1, 2, 0), image)
                assert rows[i][1] == label

    def test_larger_than_memory(self, tmp_path, recorded):
        """A contiguous array is never read as a whole: this sparse file has 26 GB."""
        write_pcam(tmp_path)
        count = 1_000_000
        with h5py.File(tmp_path / "pcam" / PCAM.format(split="train", what="x"), "w") as file:
            images = file.create_dataset("x", (count, 96, 96, 3), "u1", track_times=False)
            images[count - 1] = 9
        with h5py.File(tmp_path / "pcam" / PCAM.format(split="train", what="y"), "w") as file:
            file["y"] = np.ones((count, 1, 1, 1), np.uint8)
        data = PCamDataModule(tmp_path, batch_size=8, cache_dir=tmp_path / "cache")
        module = recorded(data, limit_train_batches=2)
        assert not (tmp_path / "cache").exists()
        assert sum(in_batches(data, module.seen["train"]).values()) == 16
        assert (data.train_set[count - 1][0] == 9).all()

    @pytest.mark.parametrize("below", ["", "pcam"])
    def test_root(self, fake_pcam, below):
        assert len(set_up(fake_pcam / below).train_set) == 40

    def test_relative_root(self, fake_pcam, monkeypatch):
        monkeypatch.chdir(fake_pcam.parent)
        data = PCamDataModule(fake_pcam.name)
        monkeypatch.chdir("/")
        data.setup("fit")
        assert len(data.train_set) == 40

    @pytest.mark.parametrize(("stage", "others"), [("fit", ["test"]), ("test", ["train", "valid"])])
    def test_a_stage_needs_its_own_files_alone(self, fake_pcam, stage, others):
        for split in others:
            for what in "xy":
                (fake_pcam / "pcam" / PCAM.format(split=split, what=what)).unlink()
        data = PCamDataModule(fake_pcam)
        data.prepare_data()
        data.setup(stage)
        assert len({"fit": data.train_dataloader, "test": data.test_dataloader}[stage]()) > 0


class TestDecoding:
    @pytest.fixture
    def chunked(self, tmp_path):
        write_pcam(tmp_path, **CHUNKED[0])
        return {"root": tmp_path, "cache_dir": tmp_path / "cache"}

    def test_once_for_all_runs(self, chunked, monkeypatch):
        PCamDataModule(**chunked).prepare_data()
        files = sorted(chunked["cache_dir"].iterdir())
        assert [path.stat().st_size for path in files] == [count * 96 * 96 * 3 for count in (12, 40, 10)]
        monkeypatch.setattr("lightning_znorm.data.array_file._make", lambda *_: pytest.fail("decoded again"))
        data = set_up(**chunked)
        assert data.train_set.images.path == files[1]
        assert sorted(chunked["cache_dir"].iterdir()) == files

    def test_prepare_data_sets_no_state(self, chunked):
        data = PCamDataModule(**chunked)
        before = dict(vars(data))
        data.prepare_data()
        assert vars(data) == before

    def test_progress(self, chunked, capsys):
        set_up(**chunked)
        captured = capsys.readouterr()
        assert captured.err.count("Decompressing PCam") == 3
        assert captured.out == ""

    def test_damaged_chunk(self, chunked):
        path = chunked["root"] / "pcam" / PCAM.format(split="train", what="x")
        with h5py.File(path) as file:
            chunk = file["x"].id.get_chunk_info(20)
        content = bytearray(path.read_bytes())
        content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
        path.write_bytes(content)
        with pytest.raises(
            RuntimeError, match=rf"^{path} cannot be read \(.*: it is damaged or half downloaded; get it"
        ):
            PCamDataModule(**chunked).prepare_data()
        assert list(chunked["cache_dir"].iterdir()) == []

    def test_no_room(self, chunked, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(OSError, match=r"^.*cache has no room for .*No space left.*let cache_dir name a folder"):
            PCamDataModule(**chunked).prepare_data()


class TestMistakes:
    def path(self, root: Path, split: str = "train", what: str = "x") -> Path:
        return root / "pcam" / PCAM.format(split=split, what=what)

    def refused(self, root: Path, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match) as caught:
            trainer().fit(Patches(), datamodule=PCamDataModule(root))
        assert "https://github.com/basveeling/pcam" in str(caught.value)

    def test_nothing_there(self, tmp_path):
        self.refused(tmp_path, FileNotFoundError, f"No PatchCamelyon at {tmp_path}, neither pcam/camelyonpatch_level_2")

    @pytest.mark.parametrize("missing", [("train", "x"), ("valid", "y")])
    def test_missing_file(self, fake_pcam, missing):
        path = self.path(fake_pcam, *missing)
        path.unlink()
        self.refused(fake_pcam, FileNotFoundError, f"^No {path}: get it from https://.* with gunzip")

    def test_both_missing(self, fake_pcam):
        for what in "xy":
            self.path(fake_pcam, what=what).unlink()
        self.refused(fake_pcam, FileNotFoundError, "^No .*train_x.h5 and no .*train_y.h5: get it")

    def test_still_packed(self, fake_pcam):
        for path in list((fake_pcam / "pcam").iterdir()):
            with gzip.open(f"{path}.gz", "wb") as file:
                file.write(b"...")
            path.unlink()
        with pytest.raises(
            FileNotFoundError, match=r"still packed: unpack .*test_x.h5.gz, .*valid_y.h5.gz with gunzip"
        ):
            set_up(fake_pcam)

    @pytest.mark.parametrize("what", ["x", "y"])
    @pytest.mark.parametrize("damage", ["truncated", "empty", "packed"])
    def test_damaged(self, fake_pcam, what, damage):
        path = self.path(fake_pcam, what=what)
        content = path.read_bytes()
        path.write_bytes({"truncated": content[:-1], "empty": b"", "packed": gzip.compress(content)}[damage])
        self.refused(fake_pcam, RuntimeError, rf"^{path} cannot be read \(.*\): it is damaged or half downloaded; get")

    @pytest.mark.parametrize(
        ("images", "said"),
        [
            (np.zeros((40, 3, 96, 96), np.uint8), r"shape \(40, 3, 96, 96\) and type uint8"),
            (np.zeros((40, 64, 64, 3), np.uint8), r"shape \(40, 64, 64, 3\) and type uint8"),
            (np.zeros((40, 96, 96, 3), np.float32), r"shape \(40, 96, 96, 3\) and type float32"),
            (np.zeros(40, np.uint8), r"shape \(40,\) and type uint8"),
        ],
        ids=str,
    )
    def test_other_images(self, fake_pcam, images, said):
        path = self.path(fake_pcam)
        with h5py.File(path, "w") as file:
            file["x"] = images
        self.refused(
            fake_pcam, ValueError, rf"^'x' of {path} has {said}, and PatchCamelyon's images have shape \(N, 96"
        )

    @pytest.mark.parametrize(
        ("labels", "said"),
        [
            (np.zeros((40, 2), np.uint8), r"has shape \(40, 2\) and type uint8"),
            (np.zeros((40, 1, 1, 1), np.float32), r"has shape \(40, 1, 1, 1\) and type float32"),
            (np.zeros((), np.uint8), r"has shape \(\) and type uint8"),
            (np.zeros((0, 1, 1, 1), np.uint8), "is empty"),
        ],
        ids=str,
    )
    def test_other_labels(self, fake_pcam, labels, said):
        path = self.path(fake_pcam, what="y")
        with h5py.File(path, "w") as file:
            file["y"] = labels
        self.refused(fake_pcam, ValueError, f"^'y' of {path} {said}")

    def test_label_values(self, fake_pcam):
        path = self.path(fake_pcam, what="y")
        with h5py.File(path, "r+") as file:
            file["y"][[7, 30], 0, 0, 0] = 2
        self.refused(fake_pcam, ValueError, f"^Label 7 of {path} is 2, and 2 labels in total are neither 0")

    def test_lengths_differ(self, fake_pcam):
        path = self.path(fake_pcam, what="y")
        with h5py.File(path, "w") as file:
            file["y"] = np.zeros((39, 1, 1, 1), np.uint8)
        with pytest.raises(ValueError, match=f"train_x.h5 holds 40 images, and {path} 39 labels"):
            set_up(fake_pcam)

    def test_other_names_inside(self, fake_pcam):
        path = self.path(fake_pcam)
        with h5py.File(path, "w") as file:
            file["images"] = patches(40, 0)[0]
            file.create_group("x")
        self.refused(fake_pcam, ValueError, rf"^{path} holds no data set 'x', but \['images', 'x'\]")

    @pytest.mark.parametrize("name", ["val_fraction", "test_fraction"])
    @pytest.mark.parametrize("value", [0, 1, -0.5])
    def test_fractions(self, name, value):
        with pytest.raises(ValueError, match=rf"{name} .* in \(0, 1\): {value}"):
            PCamDataModule(**{name: value})

    def test_h5py_is_missing(self, fake_pcam, monkeypatch):
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match=r"^PCamDataModule needs h5py: pip install lightning-znorm$"):
            set_up(fake_pcam)


class TestKaggle:
    @pytest.fixture
    def written(self, tmp_path) -> dict:
        return write_kaggle_pcam(tmp_path)

    @pytest.fixture
    def kaggle(self, written, tmp_path) -> dict:
        return {"root": tmp_path, "cache_dir": tmp_path / "cache"}

    def tif(self, kaggle: dict, index: int) -> Path:
        return sorted((kaggle["root"] / "histopathologic-cancer-detection" / "train").iterdir())[index]

    @pytest.mark.parametrize("below", ["", "histopathologic-cancer-detection"])
    def test_every_labelled_image_in_one_of_three_sets(self, kaggle, written, below):
        data = set_up(**{**kaggle, "root": kaggle["root"] / below}, val_fraction=0.25, test_fraction=0.2)
        sets = (data.train_set, data.val_set, data.test_set)
        assert [len(rows) for rows in sets] == [36, 12, 12]
        assert sum(map(in_set, sets), Counter()) == counted(*zip(*written.values(), strict=True))
        assert [int(rows.labels.sum()) for rows in sets] == [18, 6, 6]
        assert all((np.diff(rows.rows) > 0).all() for rows in sets)

    def test_in_the_trainer(self, kaggle, written, recorded):
        data = PCamDataModule(**kaggle, batch_size=16)
        module = recorded(data)
        seen = [in_batches(data, module.seen[stage]) for stage in ("train", "val", "test")]
        assert sum(seen, Counter()) == counted(*zip(*written.values(), strict=True))

    def test_the_seed_draws_both_and_the_validation_fraction_not_the_test(self, kaggle):
        first, again, other = (set_up(**kaggle, seed=seed) for seed in (0, 0, 1))
        for name in ("val_set", "test_set"):
            assert in_set(getattr(first, name)) == in_set(getattr(again, name)) != in_set(getattr(other, name))
        assert in_set(first.test_set) == in_set(set_up(**kaggle, val_fraction=0.5).test_set)

    def test_decoded_once_for_all_runs(self, kaggle, monkeypatch):
        PCamDataModule(**kaggle).prepare_data()
        monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
        set_up(**kaggle)
        assert len(list(kaggle["cache_dir"].iterdir())) == 1

    def test_labels_change(self, kaggle):
        before = set_up(**kaggle)
        path = kaggle["root"] / "histopathologic-cancer-detection" / "train_labels.csv"
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([rows[0], *((name, 1 - int(label)) for name, label in rows[1:])])
        after = set_up(**kaggle)
        assert sum(before.train_set.labels) + sum(after.train_set.labels) == 48

    def test_images_and_labels_that_do_not_belong_together(self, kaggle):
        folder = kaggle["root"] / "histopathologic-cancer-detection"
        labels = folder / "train_labels.csv"
        known = labels.read_text().splitlines()
        labels.write_text("\n".join([*known[:-1], f"{known[3][:40]},1", "bad,2", "gone,0"]))
        (folder / "train" / "._of a mac.tif").write_bytes(b"")
        unlabelled = folder / "train" / f"{known[-1][:40]}.tif"
        with pytest.raises(ValueError, match=f"^{folder} cannot be used as it is, for 4 reasons") as caught:
            set_up(**kaggle)
        assert str(caught.value).splitlines()[1:] == [
            f"  {labels}: line 61 names {known[3][:40]} again",
            f"  {labels}: line 62 labels bad '2', which is neither 0 nor 1",
            f"  {unlabelled}: has no label in train_labels.csv",
            f"  {folder / 'train' / 'gone.tif'}: is missing",
        ]

    def test_damaged_images(self, kaggle):
        truncated, small, grey = (self.tif(kaggle, index) for index in (3, 7, 20))
        truncated.write_bytes(truncated.read_bytes()[:-1])
        Image.fromarray(np.zeros((95, 96, 3), np.uint8)).save(small)
        Image.fromarray(np.zeros((96, 96), np.uint8)).save(grey)
        with pytest.raises(ValueError, match="for 3 reasons") as caught:
            PCamDataModule(**kaggle).prepare_data()
        lines = str(caught.value).splitlines()[1:]
        assert lines[0].startswith(f"  {truncated}: cannot be read as an image")
        assert lines[1] == f"  {small}: is 95x96 pixels, and 96x96 are expected"
        assert lines[2] == f"  {grey}: has pixels of Pillow's mode L, and RGB is expected"
        assert list(kaggle["cache_dir"].iterdir()) == []

    @pytest.mark.parametrize(
        ("content", "said"), [("name,class\na,1", "its columns must be"), ("id,label\n", "no labels")]
    )
    def test_no_labels(self, kaggle, content, said):
        path = kaggle["root"] / "histopathologic-cancer-detection" / "train_labels.csv"
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            set_up(**kaggle)

    def test_the_published_files_go_first(self, kaggle):
        write_pcam(kaggle["root"])
        assert len(set_up(**kaggle).train_set) == 40


class TestLoaders:
    def test_the_order_follows_from_the_seed_and_the_epoch(self, fake_pcam, monkeypatch):
        def epochs(seed: int, **kwargs) -> list[list[int]]:
            seed_everything(seed)
            module = Patches()
            data = PCamDataModule(fake_pcam, batch_size=40)
            trainer(num_sanity_val_steps=0, **kwargs).fit(module, datamodule=data)
            return [images[:, 0, 0, 0].tolist() for images, _ in module.seen["train"]]

        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # to be put back
        first = epochs(1, max_epochs=3)
        assert first == epochs(1, max_epochs=3)
        assert first != epochs(2, max_epochs=3)
        assert first[0] != first[1] != first[2]
        assert sorted(first[0]) == sorted(first[1])

    def test_a_resumed_training_goes_on_in_its_order(self, fake_pcam, tmp_path):
        def run(max_epochs: int, **kwargs) -> list[list[float]]:
            module = Patches()
            torch.manual_seed(len(kwargs))  # to resume takes no seed
            fitted = trainer(max_epochs=max_epochs, num_sanity_val_steps=0)
            fitted.fit(module, datamodule=PCamDataModule(fake_pcam, batch_size=40), **kwargs)
            fitted.save_checkpoint(tmp_path / "last.ckpt")
            return [images[:, 0, 0, 0].tolist() for images, _ in module.seen["train"]]

        whole = run(3)
        assert run(2) == whole[:2]
        assert run(3, ckpt_path=tmp_path / "last.ckpt") == whole[2:]

    def test_training_alone_is_shuffled(self, fake_pcam):
        data = set_up(fake_pcam)
        assert isinstance(data.train_dataloader().sampler, BlockSampler)
        for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
            assert isinstance(loader.sampler, SequentialSampler)

    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
    def test_workers_give_what_one_process_gives(self, fake_pcam, context):
        data = set_up(fake_pcam, "fit", batch_size=8)
        torch.manual_seed(0)
        alone = list(data.train_dataloader())
        data.num_workers = 2
        torch.manual_seed(0)
        loader = data.train_dataloader()
        assert loader.persistent_workers
        loader.multiprocessing_context = context
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batches = list(loader)
            same = [
                torch.equal(images, expected) and torch.equal(labels, expected_labels)
                for (images, labels), (expected, expected_labels) in zip(batches, alone, strict=True)
            ]
            assert all(same) == (epoch == 0)
        assert counted(*(torch.cat(part) for part in zip(*batches, strict=True))) == counted(
            *(torch.cat(part) for part in zip(*alone, strict=True))
        )

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_memory_is_pinned_for_cuda_alone(self, fake_pcam, device):
        data = set_up(fake_pcam)
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        assert data.val_dataloader().pin_memory == (device == "cuda")

    def test_hyperparameters_are_plain(self, fake_pcam):
        data = PCamDataModule(fake_pcam, cache_dir=fake_pcam / "cache")
        assert dict(data.hparams) == {
            "root": str(fake_pcam),
            "batch_size": 256,
            "num_workers": 0,
            "val_fraction": 0.1,
            "test_fraction": 0.1,
            "seed": 0,
            "cache_dir": str(fake_pcam / "cache"),
        }

    def test_predicts_the_test_images(self, fake_pcam):
        data, module = PCamDataModule(fake_pcam, batch_size=5), Patches()
        trainer().predict(module, datamodule=data)
        assert in_batches(data, module.seen["predict"]) == in_set(data.test_set)


def test_two_processes_see_disjoint_halves(tmp_path):
    write_pcam(tmp_path / "data", counts=(40, 10, 12), **CHUNKED[0])
    ranks = run_distributed(see, tmp_path / "data", tmp_path / "cache")
    assert [[len(batch) for batch in seen["train"]] for seen in ranks] == [[8, 8, 4] * 2] * 2
    epochs = [[flat(seen["train"][part]) for seen in ranks] for part in (slice(0, 3), slice(3, 6))]
    for halves in epochs:
        assert set(halves[0]).isdisjoint(halves[1])
        assert len({*halves[0], *halves[1]}) == 40
    assert epochs[0] != epochs[1]
    assert len({value for seen in ranks for value in flat(seen["val"])}) == 10
    assert [len(seen["made"]) for seen in ranks] == [3, 0]  # the files were decoded by one process


class TestRealPatches:
    def test_sets(self, real_pcam):
        data = set_up(real_pcam)
        sets = (data.train_set, data.val_set, data.test_set)
        assert [len(rows) for rows in sets] == [2217, 237, 238]
        assert all(rows.images.path.parent == real_pcam for rows in sets)  # in place
        everything = [in_set(rows) for rows in sets]
        assert not everything[0] & everything[1]
        assert not everything[0] & everything[2]
        reference = TorchvisionPCAM(real_pcam.parent, "val")
        assert everything[1] == counted(*zip(*(reference[i] for i in range(237)), strict=True))

    def test_mean_and_std(self, real_pcam):
        data = set_up(real_pcam, "fit")
        images, _ = data.train_set.__getitems__(list(range(2217)))
        counts = np.stack([np.bincount(images[:, c].flatten(), minlength=256) for c in range(3)])
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(1)
        assert data.mean == pytest.approx(mean, abs=5e-5)
        assert data.std == pytest.approx(np.sqrt(counts @ values**2 / counts.sum(1) - mean**2), abs=5e-5)

    def test_compressed_copy(self, real_pcam, tmp_path):
        for path in real_pcam.glob("*valid*"):
            shutil.copy(path, tmp_path)
        with h5py.File(real_pcam / PCAM.format(split="valid", what="x")) as file:
            images = file["x"][:]
        with h5py.File(tmp_path / PCAM.format(split="valid", what="x"), "w") as file:
            file.create_dataset("x", data=images, compression="gzip")
        for path in list(tmp_path.iterdir()):
            path.rename(tmp_path / path.name.replace("valid", "test"))
        data = set_up(tmp_path, "test", cache_dir=tmp_path / "cache")
        assert in_set(data.test_set) == in_set(set_up(real_pcam, "fit").val_set)
