import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lightning_znorm.data import LGGDataModule
from lightning_znorm.data.splits import split_patients
from tests.medical import write_lgg
from tests.trainers import trainer


class Segmenter(LightningModule):
    """Records the batches of every stage, as they reach a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 1, 1)
        self.seen: dict[str, list] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        images, masks = batch
        self.seen["train"].append(batch)
        return torch.nn.functional.binary_cross_entropy_with_logits(self.layer(images), masks)

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def set_up(root: Path, stage: str = "fit", **kwargs) -> LGGDataModule:
    data = LGGDataModule(root, **kwargs)
    data.setup(stage)
    return data


def pixels(data: LGGDataModule, images: torch.Tensor) -> np.ndarray:
    """Undo the normalization, and put the channels last."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def pairs(written: dict) -> Counter:
    return Counter((image.tobytes(), (mask > 0).tobytes()) for image, mask in written.values())


def pairs_of(data: LGGDataModule, batches: list) -> Counter:
    return Counter(
        (image.tobytes(), mask.numpy().astype(bool).tobytes())
        for images, masks, *_ in batches
        for image, mask in zip(pixels(data, images), masks, strict=True)
    )


def one(root: Path, name: str) -> Path:
    (path,) = root.rglob(name)
    return path


class TestReading:
    @pytest.mark.parametrize("save", [{}, {"compression": "tiff_lzw"}], ids=["raw", "lzw"])
    def test_every_slice_once_with_its_mask(self, tmp_path, save):
        written = write_lgg(tmp_path, patients=12, slices=3, **save)
        data, module = LGGDataModule(tmp_path, batch_size=4), Segmenter()
        run = trainer(num_sanity_val_steps=0)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
        seen = [pairs_of(data, module.seen[stage]) for stage in ("train", "val", "test")]
        assert sum(seen, Counter()) == pairs(written)
        assert [sum(part.values()) for part in seen] == [27, 3, 6]
        images, masks = module.seen["train"][0]
        assert images.shape == (4, 3, 32, 32)
        assert masks.shape == (4, 1, 32, 32)
        assert images.dtype == masks.dtype == torch.float32
        assert torch.cat([masks for _, masks in module.seen["train"]]).unique().tolist() == [0, 1]

    def test_no_patient_in_two_sets(self, tmp_path):
        written = write_lgg(tmp_path, patients=12)
        data = set_up(tmp_path)
        by_pixels = {image.tobytes(): name.split("/")[0][:12] for name, (image, _) in written.items()}
        for name, rows in (("train", data.train_set), ("val", data.val_set), ("test", data.test_set)):
            images = (rows[i][0].permute(1, 2, 0).numpy().tobytes() for i in range(len(rows)))
            assert {by_pixels[image] for image in images} == set(data.patients[name])
        everybody = [patient for patients in data.patients.values() for patient in patients]
        assert len(everybody) == len(set(everybody)) == 12

    def test_who_was_scanned_twice_is_one_patient(self, fake_lgg):
        folder = one(fake_lgg, "TCGA_CS_4901_*_1.tif").parent
        shutil.copytree(folder, folder.with_name("TCGA_CS_4901_20011231"))
        data = set_up(fake_lgg)
        assert sum(map(len, data.patients.values())) == 5
        assert sum(map(len, (data.train_set, data.val_set, data.test_set))) == 24

    def test_the_order_is_that_of_the_scan(self, tmp_path):
        write_lgg(tmp_path, slices=11)
        data = set_up(tmp_path, "predict")
        names = [name for _, _, cases in data.predict_dataloader() for name in cases["name"]]
        assert [name.rpartition("_")[2] for name in names[:11]] == [f"{i}.tif" for i in range(1, 12)]

    def test_decoded_once_for_all_stages(self, fake_lgg, monkeypatch):
        data = set_up(fake_lgg)
        monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("read again"))
        slices = data.train_set.images
        for stage in ("validate", "test", "predict"):
            data.setup(stage)
        assert data.test_set.images is data.predict_set.images is slices

    @pytest.mark.parametrize("is_terminal", [True, False])
    def test_progress(self, fake_lgg, monkeypatch, capsys, is_terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
        set_up(fake_lgg)
        captured = capsys.readouterr()
        assert "Decoding slices" in captured.err
        assert "100%" in captured.err
        assert captured.out == ""


class TestRoot:
    @pytest.mark.parametrize("below", ["kaggle_3m", "", ".."])
    def test_where_it_may_be(self, fake_lgg, below):
        assert len(set_up(fake_lgg / below if below != ".." else fake_lgg).train_set) == 12

    def test_folder_that_holds_lgg_mri_segmentation(self, tmp_path):
        write_lgg(tmp_path / "lgg-mri-segmentation")
        assert len(set_up(tmp_path).train_set) == 12

    def test_both_copies_of_the_archive_count_once(self, tmp_path):
        root = tmp_path / "lgg-mri-segmentation"
        written = write_lgg(root)
        shutil.copytree(root / "kaggle_3m", root / "lgg-mri-segmentation" / "kaggle_3m")
        for start in (tmp_path, root, root / "kaggle_3m", root / "lgg-mri-segmentation"):
            data = set_up(start)
            assert sum(map(len, (data.train_set, data.val_set, data.test_set))) == len(written)

    def test_other_files_are_left_alone(self, fake_lgg):
        folder = one(fake_lgg, "TCGA_CS_4900_*_1.tif").parent
        (fake_lgg / "kaggle_3m" / "data.csv").write_text("Patient")
        (folder / "Thumbs.db").write_bytes(b"")
        (folder / f"._{folder.name}_1.tif").write_bytes(b"of a Mac")
        assert len(set_up(fake_lgg).train_set) == 12

    def test_relative_root(self, fake_lgg, monkeypatch):
        monkeypatch.chdir(fake_lgg.parent)
        data = LGGDataModule(fake_lgg.name)
        monkeypatch.chdir("/")
        data.setup("fit")
        assert len(data.train_set) == 12

    @pytest.mark.parametrize("made", [None, "kaggle_3m", "kaggle_3m/TCGA_CS_4941_19960909"])
    def test_nothing_there(self, tmp_path, made):
        if made:
            (tmp_path / made).mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match=rf"No LGG slices .* at {tmp_path}: .* https://www.kaggle.com/"):
            set_up(tmp_path)


class TestFaults:
    def test_all_are_named_in_one_error_before_training(self, tmp_path):
        root = tmp_path / "größe mit Leerzeichen"
        write_lgg(root, patients=6)

        def path(patient: int, slice_: int, mask: str = "") -> Path:
            return one(root, f"TCGA_CS_490{patient}_*_{slice_}{mask}.tif")

        truncated = path(0, 1)
        truncated.write_bytes(truncated.read_bytes()[:-100])
        truncated_mask = path(0, 2, "_mask")
        truncated_mask.write_bytes(truncated_mask.read_bytes()[:200])
        empty = path(1, 1)
        empty.write_bytes(b"")
        no_mask = path(1, 2)
        path(1, 2, "_mask").unlink()
        no_image = path(2, 3, "_mask")
        path(2, 3).unlink()
        small = path(3, 1)
        Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(small)
        small_mask = path(3, 2, "_mask")
        Image.fromarray(np.zeros((32, 16), np.uint8)).save(small_mask)
        values = path(4, 1, "_mask")
        Image.fromarray(np.full((32, 32), 7, np.uint8)).save(values)
        grey = path(4, 2)
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(grey)
        coloured_mask = path(4, 3, "_mask")
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(coloured_mask)
        alone = root / "kaggle_3m" / "TCGA_leer und öde"
        alone.mkdir()
        reasons = {
            truncated: "cannot be read as an image",
            truncated_mask: "cannot be read as an image",
            empty: "cannot be read as an image",
            no_mask: f"has no mask beside it, {no_mask.stem}_mask.tif",
            no_image: f"has no image beside it, {no_image.stem.removesuffix('_mask')}.tif",
            small: "is 16x32 pixels (height x width), and the other slices 32x32",
            small_mask: "is 32x16 pixels (height x width), and the other slices 32x32",
            values: "is a mask with the values 7 besides 0 and 255",
            grey: "has pixels of Pillow's mode L, and RGB is expected",
            coloured_mask: "has pixels of Pillow's mode RGB, and L or 1 is expected",
            alone: "holds no slices",
        }
        with pytest.raises(
            ValueError, match=f"^{root / 'kaggle_3m'} cannot be used as it is, for 11 reasons"
        ) as caught:
            trainer().fit(Segmenter(), datamodule=LGGDataModule(root))
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == len(reasons)
        for line, (named, reason) in zip(lines, sorted(reasons.items(), key=lambda item: f"{item[0]}: "), strict=True):
            assert line.startswith(f"  {named}: {reason}")

    def test_a_tif_cut_off_anywhere(self, fake_lgg):
        path = one(fake_lgg, "TCGA_CS_4900_*_1.tif")
        content = path.read_bytes()
        for length in range(0, len(content), 97):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"for 1 reason: .*\n.*_1.tif: cannot be read as an image"):
                set_up(fake_lgg)

    def test_odd_first_slice_is_the_one_named(self, fake_lgg):
        path = one(fake_lgg, "TCGA_CS_4900_*_1.tif")
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
        with pytest.raises(ValueError, match=f"for 1 reason: .*\n  {path}: is 8x8 pixels"):
            set_up(fake_lgg)

    def test_all_images_gone(self, fake_lgg):
        for path in fake_lgg.rglob("*[0-9].tif"):
            path.unlink()
        with pytest.raises(ValueError, match="for 25 reasons"):
            set_up(fake_lgg)

    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 0.95])
    def test_fractions(self, fraction):
        with pytest.raises(ValueError, match=f"test_fraction .* in .*: {fraction}"):
            LGGDataModule(val_fraction=0.1, test_fraction=fraction)

    def test_too_few_patients(self, tmp_path):
        write_lgg(tmp_path, patients=2)
        with pytest.raises(ValueError, match=r"Of 2 patients, val_fraction=0.1 takes 1 and test_fraction=0.2 1"):
            set_up(tmp_path)


class TestSplit:
    shares = {f"patient {i}": (i % 10) / 10 for i in range(100)}  # noqa: RUF012

    def test_everybody_once(self):
        split = split_patients(self.shares, 0.1, 0.2, seed=0)
        assert [len(split[name]) for name in ("train", "val", "test")] == [70, 10, 20]
        assert sorted(patient for patients in split.values() for patient in patients) == sorted(self.shares)

    @pytest.mark.parametrize("seed", range(5))
    def test_much_and_little_tumour_in_each(self, seed):
        split = split_patients(self.shares, 0.1, 0.2, seed)
        tumour = {name: sorted(self.shares[patient] for patient in split[name]) for name in split}
        # One of each tenth for the test, and likewise of the others for validation.
        assert Counter(tumour["test"]) == dict.fromkeys(set(self.shares.values()), 2)
        assert np.abs(np.array(tumour["val"]) - np.arange(10) / 10).max() <= 0.1

    def test_without_any_tumour_in_each(self):
        shares = {f"patient {i}": 0.0 if i < 20 else 0.5 for i in range(40)}
        for seed in range(5):
            for patients in split_patients(shares, 0.2, 0.2, seed).values():
                assert sum(shares[patient] == 0 for patient in patients) == len(patients) / 2

    def test_the_seed_draws_it(self):
        first, again, other = (split_patients(self.shares, 0.1, 0.2, seed) for seed in (0, 0, 1))
        assert first == again
        assert set(first["test"]) != set(other["test"])

    def test_everybody_is_drawn_by_some_seed(self):
        drawn = Counter(
            patient for seed in range(200) for patient in split_patients(self.shares, 0.1, 0.2, seed)["test"]
        )
        assert min(drawn[patient] for patient in self.shares) > 15  # 40 are expected

    def test_the_test_set_does_not_hang_on_the_validation_fraction(self):
        first, other = (split_patients(self.shares, val, 0.2, seed=0) for val in (0.1, 0.4))
        assert first["test"] == other["test"]


class TestPatientsAreKept:
    @pytest.fixture
    def trained(self, fake_lgg, tmp_path) -> tuple[LGGDataModule, Path]:
        data = LGGDataModule(fake_lgg, batch_size=12, seed=3)
        run = trainer(logger=CSVLogger(tmp_path / "logs"))
        run.fit(Segmenter(), datamodule=data)
        run.save_checkpoint(tmp_path / "trained.ckpt")
        return data, tmp_path / "trained.ckpt"

    def test_in_the_log_and_the_hyperparameters(self, trained, tmp_path, caplog):
        data, _ = trained
        (logged,) = tmp_path.rglob("hparams.yaml")
        assert yaml.safe_load(logged.read_text())["patients"] == data.patients
        with caplog.at_level("INFO"):
            data.setup("fit")
            assert not caplog.records  # once
            again = set_up(data.root, seed=3)
        for name, listed in again.patients.items():
            assert f"LGG {name} patients ({len(listed)}): {', '.join(listed)}" in caplog.messages

    def test_in_the_checkpoint(self, trained):
        data, path = trained
        saved = torch.load(path, weights_only=True)
        assert saved["LGGDataModule"]["patients"] == data.patients
        loaded = LGGDataModule.load_from_checkpoint(path)
        assert (loaded.root, loaded.seed, loaded.batch_size) == (data.root, 3, 12)
        loaded.setup("fit")
        assert loaded.patients == data.patients

    @pytest.fixture
    def judge(self) -> Trainer:
        return trainer(max_epochs=2)

    def test_judged_by_its_own(self, trained, judge):
        data, path = trained
        for stage in ("fit", "validate", "test"):
            module = Segmenter()
            getattr(judge, stage)(module, datamodule=LGGDataModule(data.root, seed=3), ckpt_path=path)
            assert module.seen[{"fit": "train", "validate": "val", "test": "test"}[stage]]

    def test_refuses_to_be_judged_by_patients_it_has_seen(self, trained, judge):
        data, path = trained

        def moved(to: str, *places: str) -> LGGDataModule:
            """Return a data module in whose set `to` is a patient that was in one of the sets `places`."""
            for seed in range(100):
                other = set_up(data.root, seed=seed)
                (patient,) = other.patients[to]
                if any(patient in data.patients[place] for place in places):
                    return other
            return pytest.fail("no such seed")

        for stage, to, *places in (
            ("test", "test", "train"),
            ("test", "test", "val"),
            ("validate", "val", "train"),
            ("fit", "val", "train"),
            ("fit", "test", "train"),
            ("fit", "test", "val"),
        ):
            with pytest.raises(ValueError, match=r"on 1 of the patients of the (val|test) set \(TCGA_CS_490\d\): use "):
                getattr(judge, stage)(Segmenter(), datamodule=moved(to, *places), ckpt_path=path)

    def test_the_validation_set_does_not_matter_to_the_test(self, trained, judge):
        data, path = trained
        other = LGGDataModule(data.root, seed=3, val_fraction=0.4)
        judge.test(Segmenter(), datamodule=other, ckpt_path=path)
        assert other.patients["test"] == data.patients["test"]
        assert set(other.patients["val"]) & set(data.patients["train"])

    def test_predicts_for_anybody(self, trained, judge, tmp_path):
        data, path = trained
        write_lgg(tmp_path / "others", patients=2)
        for given in (LGGDataModule("nowhere", predict_root=tmp_path / "others"), LGGDataModule(data.root, seed=0)):
            module = Segmenter()
            judge.predict(module, datamodule=given, ckpt_path=path)
            assert module.seen["predict"]


class TestNormalized:
    def test_as_said(self, fake_lgg):
        data, module = LGGDataModule(fake_lgg), Segmenter()
        trainer().test(module, datamodule=data, verbose=False)
        images, *_ = module.seen["test"][0]
        raw = data.test_set.images[data.test_set.rows, :3] / 255
        expected = (raw - np.reshape(data.mean, (3, 1, 1))) / np.reshape(data.std, (3, 1, 1))
        np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-5)

    def test_precision_of_the_weights(self, fake_lgg):
        module = Segmenter()
        trainer(precision="bf16-true", limit_train_batches=1).fit(module, datamodule=LGGDataModule(fake_lgg))
        for stage in ("train", "val"):
            images, masks, *_ = module.seen[stage][0]
            assert images.dtype == masks.dtype == torch.bfloat16
            assert masks.unique().tolist() in ([0, 1], [0])


class TestAugment:
    def test_image_and_mask_alike_in_training_alone(self, tmp_path):
        write_lgg(tmp_path, patients=12, slices=6)
        torch.manual_seed(0)  # of 54 draws from 8, one in 200 has fewer than 8
        data, module = LGGDataModule(tmp_path, augment=True, batch_size=100), Segmenter()
        run = trainer(num_sanity_val_steps=0)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
        originals = {}
        for i in range(len(data.train_set)):
            image, mask = (part.permute(1, 2, 0).numpy() for part in data.train_set[i])
            for k in range(8):
                views = [np.rot90(part[::-1] if k > 3 else part, k) for part in (image, mask > 0)]
                originals[views[0].tobytes()] = k, views[1].tobytes()
        ((images, masks),) = module.seen["train"]
        drawn = Counter()
        for image, mask in zip(pixels(data, images), masks, strict=True):
            k, expected = originals[image.tobytes()]
            drawn[k] += 1
            assert mask.numpy().astype(bool).tobytes() == expected
        assert len(drawn) == 8
        for stage, rows in (("val", data.val_set), ("test", data.test_set)):
            ((images, masks, _),) = module.seen[stage]
            assert np.array_equal(pixels(data, images).transpose(0, 3, 1, 2), data.train_set.images[rows.rows, :3])
            assert np.array_equal(masks, data.train_set.images[rows.rows, 3:])

    def test_not_by_default(self, fake_lgg):
        data, module = LGGDataModule(fake_lgg), Segmenter()
        trainer().fit(module, datamodule=data)
        originals = {data.train_set[i][0].permute(1, 2, 0).numpy().tobytes() for i in range(len(data.train_set))}
        assert {image.tobytes() for images, _ in module.seen["train"] for image in pixels(data, images)} == originals


class TestImageSize:
    def test_slices_and_masks(self, fake_lgg):
        stored, data = set_up(fake_lgg), set_up(fake_lgg, image_size=[20, 24])
        assert data.train_set.images.shape[1:] == (4, 20, 24)
        assert stored.train_set.images.shape[1:] == (4, 32, 32)
        for large, small in zip(stored.train_set.images, data.train_set.images, strict=True):
            image = Image.fromarray(large[:3].transpose(1, 2, 0)).resize((24, 20), Image.Resampling.BILINEAR)
            # Pillow rounds between the two directions too.
            assert np.abs(small[:3].transpose(1, 2, 0).astype(int) - np.asarray(image)).max() <= 1
            rows, columns = (((np.arange(new) + 0.5) * 32 / new).astype(int) for new in (20, 24))
            assert np.array_equal(small[3], large[3][rows][:, columns])

    def test_sizes_may_differ_but_not_within_a_slice(self, fake_lgg):
        image, mask = (one(fake_lgg, f"TCGA_CS_4900_*_1{end}.tif") for end in ("", "_mask"))
        Image.fromarray(np.zeros((16, 48, 3), np.uint8)).save(image)
        with pytest.raises(ValueError, match=rf"for 1 reason: .*\n  {mask}: is 32x32 pixels .*, and its image 16x48"):
            set_up(fake_lgg, image_size=24)
        Image.fromarray(np.zeros((16, 48), np.uint8)).save(mask)
        assert set_up(fake_lgg, image_size=24).train_set.images.shape[1:] == (4, 24, 24)
        with pytest.raises(ValueError, match="for 2 reasons"):
            set_up(fake_lgg)

    def test_of_images_to_predict_for(self, fake_lgg):
        Image.fromarray(np.zeros((50, 40), np.uint8)).save(fake_lgg / "grey.png")
        data = set_up(fake_lgg, "predict", predict_root=fake_lgg, image_size=16)
        ((images, cases),) = data.predict_dataloader()
        assert images.shape == (21, 3, 16, 16)
        assert cases["slice"] == [None, *[1, 2, 3, 4] * 5]
        assert cases["size"].tolist() == [[50, 40], *[[32, 32]] * 20]
        _, _, cases = next(iter(set_up(fake_lgg, "test", image_size=16).test_dataloader()))
        assert cases["size"].tolist() == [[32, 32]] * len(cases["name"])

    def test_the_split_does_not_hang_on_it(self, tmp_path):
        """Tumours of one pixel vanish from resized masks, and the patients are drawn all the same."""
        write_lgg(tmp_path, patients=12)
        for mask in sorted(tmp_path.rglob("*_mask.tif")):
            pixels = np.zeros((32, 32), np.uint8)
            pixels[tuple(np.argwhere(np.asarray(Image.open(mask)))[:1].T)] = 255
            Image.fromarray(pixels).save(mask)
        cache = {"max_memory_gb": 0, "cache_dir": tmp_path / "cache"}
        for seed in range(3):
            drawn = [
                set_up(tmp_path, image_size=size, seed=seed, **where).patients
                for size in (None, 16, 24, [12, 20])
                for where in ({}, cache, cache)
            ]
            assert all(each == drawn[0] for each in drawn)

    def test_in_a_file(self, fake_lgg, tmp_path):
        kwargs = {"max_memory_gb": 0, "cache_dir": tmp_path / "cache"}
        stored, resized = (set_up(fake_lgg, image_size=size, **kwargs) for size in (None, 32))
        assert len(list((tmp_path / "cache").iterdir())) == 2
        assert np.array_equal(stored.train_set.images, resized.train_set.images)


class TestCases:
    def test_of_every_stage(self, tmp_path):
        write_lgg(tmp_path, patients=12)
        data, module = LGGDataModule(tmp_path, batch_size=3), Segmenter()
        run = trainer(num_sanity_val_steps=0)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
        run.predict(module, datamodule=data)
        assert all(len(batch) == 2 for batch in module.seen["train"])
        for stage, part in (("val", "val"), ("test", "test"), ("predict", "test")):
            assert {patient for *_, cases in module.seen[stage] for patient in cases["patient"]} == {
                *data.patients[part]
            }
            for images, masks, cases in module.seen[stage]:
                assert len(images) == len(masks)
                for index, (name, patient, number) in enumerate(zip(*cases.values(), strict=True)):
                    assert name.startswith(patient)
                    path = tmp_path / "kaggle_3m" / name
                    assert path.stem.endswith(f"_{number}")
                    assert np.array_equal(pixels(data, images[index : index + 1])[0], Image.open(path))
                    mask = Image.open(path.with_stem(f"{path.stem}_mask"))
                    assert np.array_equal(masks[index, 0] * 255, mask)


class TestPredict:
    def test_images_without_masks(self, tmp_path):
        written = write_lgg(tmp_path / "für Doktor X", patients=2, slices=3, size=24)
        for path in (tmp_path / "für Doktor X").rglob("*_mask.tif"):
            path.unlink()
        data, module = LGGDataModule("nowhere", batch_size=4, predict_root=tmp_path / "für Doktor X"), Segmenter()
        trainer().predict(module, datamodule=data)
        assert [len(cases["name"]) for _, cases in module.seen["predict"]] == [4, 2]
        assert module.seen["predict"][0][1].keys() == {"name", "slice"}
        assert [number for _, cases in module.seen["predict"] for number in cases["slice"]] == [1, 2, 3, 1, 2, 3]
        seen = {}
        for images, cases in module.seen["predict"]:
            seen.update(zip(cases["name"], pixels(data, images), strict=True))
        assert list(seen) == [f"kaggle_3m/{name}" for name in written]
        for name, (image, _) in written.items():
            assert np.array_equal(seen[f"kaggle_3m/{name}"], image)

    def test_other_formats_and_grey(self, tmp_path):
        colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / "a.PNG")
        Image.fromarray(colours[..., 0]).save(tmp_path / "b.tiff")
        Image.fromarray(colours[..., 0]).save(tmp_path / "b_mask.tiff")
        (tmp_path / "notes.txt").write_text("no image")
        ((images, cases),) = set_up(tmp_path, "predict", predict_root=tmp_path).predict_dataloader()
        assert cases == {"name": ["a.PNG", "b.tiff"], "slice": [None, None]}
        assert np.array_equal(images[0].permute(1, 2, 0), colours)
        assert np.array_equal(images[1], np.stack([colours[..., 0]] * 3))

    def test_the_test_slices_by_default(self, fake_lgg):
        data, module = LGGDataModule(fake_lgg), Segmenter()
        trainer().predict(module, datamodule=data)
        ((images, masks, cases),) = module.seen["predict"]
        assert set(cases["patient"]) == set(data.patients["test"])
        assert len(images) == len(masks) == len(cases["name"]) == 4
        assert cases["slice"] == [1, 2, 3, 4]
        assert (fake_lgg / "kaggle_3m" / cases["name"][0]).is_file()

    def test_faults(self, tmp_path):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "b.png")
        Image.fromarray(np.zeros((16, 8, 3), np.uint8)).save(tmp_path / "c.png")
        Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "d.png")
        (tmp_path / "e.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match="for 3 reasons") as caught:
            set_up(tmp_path, "predict", predict_root=tmp_path)
        for line in ("c.png: is 16x8 pixels", "d.png: has more than 8 bits", "e.png: cannot be read"):
            assert f"{tmp_path}/{line}" in str(caught.value)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"No images at {tmp_path / 'none'}"):
            set_up(tmp_path, "predict", predict_root=tmp_path / "none")


class TestLargerThanMemory:
    @pytest.fixture
    def mapped(self, fake_lgg, tmp_path):
        return {"root": fake_lgg, "max_memory_gb": 0, "cache_dir": tmp_path / "cache"}

    def test_the_same_slices(self, mapped):
        data, other = set_up(**mapped), set_up(mapped["root"])
        assert not data.train_set.images.flags.owndata
        assert other.train_set.images.flags.owndata
        assert np.array_equal(data.train_set.images, other.train_set.images)
        assert data.patients == other.patients

    def test_the_limit(self, mapped):
        size = 20 * 4 * 32 * 32 / 1e9
        assert set_up(**{**mapped, "max_memory_gb": size}).train_set.images.flags.owndata
        assert not set_up(**{**mapped, "max_memory_gb": size * 0.99}).train_set.images.flags.owndata

    def test_decoded_by_one_process_and_found_by_later_runs(self, mapped, monkeypatch):
        LGGDataModule(**mapped).prepare_data()
        (file,) = mapped["cache_dir"].iterdir()
        assert file.stat().st_size == 20 * (4 * 32 * 32 + 8)  # with a number for each mask
        monkeypatch.setattr("lightning_znorm.data.lgg_files._read", lambda *_: pytest.fail("decoded again"))
        data = set_up(**mapped)
        assert len(data.train_set) == 12
        assert list(mapped["cache_dir"].iterdir()) == [file]

    def test_decoded_anew_when_a_file_changes(self, mapped):
        before = set_up(**mapped)
        path = one(mapped["root"], "TCGA_CS_4900_*_1.tif")
        Image.fromarray(np.full((32, 32, 3), 77, np.uint8)).save(path)
        after = set_up(**mapped)
        assert (after.train_set.images[0, :3] == 77).all()
        assert not (before.train_set.images[0, :3] == 77).all()

    def test_predicted_images(self, mapped):
        data, module = LGGDataModule(**{**mapped, "root": "nowhere"}, predict_root=mapped["root"]), Segmenter()
        trainer().predict(module, datamodule=data)
        assert len(module.seen["predict"][0][1]["name"]) == 20
        assert not data.predict_set.images.flags.owndata

    def test_faults_leave_nothing_behind(self, mapped):
        path = one(mapped["root"], "TCGA_CS_4900_*_1.tif")
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="for 1 reason"):
            LGGDataModule(**mapped).prepare_data()
        assert list(mapped["cache_dir"].iterdir()) == []

    def test_no_room(self, mapped, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(OSError, match=r"has no room for 0.0 GiB .*No space left.*let cache_dir name a folder"):
            LGGDataModule(**mapped).prepare_data()
        assert list(mapped["cache_dir"].iterdir()) == []

    def test_default_cache(self, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert LGGDataModule().cache == tmp_path / ".cache" / "lightning_znorm"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        assert LGGDataModule().cache == tmp_path / "elsewhere" / "lightning_znorm"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_for_cuda_alone(fake_lgg, device):
    data = set_up(fake_lgg)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    assert data.val_dataloader().pin_memory == (device == "cuda")


class TestRealSlices:
    @pytest.fixture
    def data(self, real_lgg) -> LGGDataModule:
        return set_up(real_lgg)

    def test_sets(self, data):
        assert [len(data.patients[name]) for name in ("train", "val", "test")] == [21, 3, 6]
        assert len({patient for patients in data.patients.values() for patient in patients}) == 30
        sets = (data.train_set, data.val_set, data.test_set)
        assert sum(map(len, sets)) == 1114
        assert data.train_set.images.shape == (1114, 4, 256, 256)
        folders = [path.split("/")[0] for path in data.test_set.cases["name"]]
        drawn = [{folders[row] for row in rows.rows} for rows in sets]
        assert [len(part) for part in drawn] == [21, 3, 6]
        assert drawn[0].isdisjoint(drawn[1] | drawn[2])
        assert drawn[1].isdisjoint(drawn[2])

    @pytest.mark.full
    def test_tumour_in_each(self, data):
        for rows in (data.train_set, data.val_set, data.test_set):
            marked = np.array([rows.images[row, 3].any() for row in rows.rows])
            assert marked.mean() == pytest.approx(0.34, abs=0.1)

    @pytest.mark.full
    def test_mean_and_std(self, data):
        channels = data.train_set.images[:, :3]
        counts = np.stack([np.bincount(channels[:, c].ravel(), minlength=256) for c in range(3)])
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(1)
        assert data.mean == pytest.approx(mean, abs=5e-5)
        assert data.std == pytest.approx(np.sqrt(counts @ values**2 / counts.sum(1) - mean**2), abs=5e-5)

    @pytest.mark.full
    def test_as_pillow_reads_it(self, data, real_lgg):
        names = data.test_set.cases["name"]
        for row in (0, 500, 1113):
            path = real_lgg / "kaggle_3m" / names[row]
            assert np.array_equal(data.train_set.images[row, :3].transpose(1, 2, 0), Image.open(path))
            mask = np.asarray(Image.open(path.with_name(f"{path.stem}_mask.tif")))
            assert np.array_equal(data.train_set.images[row, 3] * 255, mask)
        assert math.isclose(data.train_set.images[:, 3].mean(), 0.01035, abs_tol=1e-5)
