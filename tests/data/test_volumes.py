"""The data module of NIfTI volumes."""

import gzip
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    RandFlipd,
    ScaleIntensityRanged,
)
from torch import Tensor

from lightning_znorm.batches import cases_of
from lightning_znorm.data import VolumeDataModule, decoding, volumes
from lightning_znorm.data.datasets import IGNORED
from lightning_znorm.data.volume_files import StoredVolume, Volume
from lightning_znorm.data.volumes import Patches
from lightning_znorm.tasks import SegmentationTask
from tests.data.ddp_volumes import see_volumes
from tests.distributed import run_distributed
from tests.medical import write_volumes
from tests.trainers import trainer

# Python 3.12 and later, when the loader starts its worker beside torch's threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

SHARES: dict[str, Any] = {"val_fraction": 0.2, "test_fraction": 0.3, "num_workers": 0}


class Recorder(LightningModule):
    """Records the batches of every stage, as they reach a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 1, 1)
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch)
        return self.layer(batch[0]).float().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["predict"].append(batch)
        return batch[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


Written = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    """Root folder of 6 cases that no test changes, and what is in them."""
    root = tmp_path_factory.mktemp("shared volumes")
    return root, write_volumes(root, shape=(12, 20, 18))


@pytest.fixture
def root(shared: tuple[Path, Written], tmp_path: Path) -> Path:
    """Root folder of a copy of the 6 cases."""
    return Path(shutil.copytree(shared[0], tmp_path / "my volumes"))


def made(root: Path, stage: str = "fit", **kwargs: Any) -> VolumeDataModule:
    data = VolumeDataModule(root, **{"patch_size": [8, 8, 8], **SHARES, **kwargs})
    data.prepare_data()
    data.setup(stage)
    return data


def key(case: str) -> str:
    return Path(case).name.removesuffix(".nii.gz")


def scaled(image: np.ndarray) -> np.ndarray:
    flat = image.reshape(len(image), -1).astype(np.float64)
    return (image - flat.mean(1).reshape(-1, 1, 1, 1)) / flat.std(1).reshape(-1, 1, 1, 1)


def patches_of(data: VolumeDataModule, epochs: int = 1) -> list[bytes]:
    loader = data.train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found += [image.numpy().tobytes() for images, _ in loader for image in images]
    return found


class TestStages:
    def test_batches_of_every_stage(self, shared: tuple[Path, Written]):
        root, written = shared
        data, module = VolumeDataModule(root, batch_size=2, patch_size=[8, 12, 10], **SHARES), Recorder()
        run = trainer(num_sanity_val_steps=0)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
        run.predict(module, datamodule=data)
        assert [len(module.seen[stage]) for stage in ("train", "val", "test", "predict")] == [6, 1, 2, 2]
        for images, masks in module.seen["train"]:
            assert images.shape == masks.shape == (2, 1, 8, 12, 10)
            assert images.dtype == masks.dtype == torch.float32
            assert set(masks.unique().tolist()) <= {0, 1}
        seen = []
        for batch in [*module.seen["val"], *module.seen["test"]]:
            images, masks, cases = batch
            image, label, affine = written[key(cases["name"][0])]
            np.testing.assert_allclose(images[0].numpy(), scaled(image), atol=1e-4)
            np.testing.assert_array_equal(masks[0, 0].numpy(), label.astype(np.float32))
            assert cases["affine"].dtype == np.float64
            np.testing.assert_array_equal(cases["affine"], affine[None])
            assert cases_of(batch).spacing[0] == pytest.approx((3.0, 0.8, 0.8), rel=1e-5)
            seen.append(key(cases["patient"][0]))
        assert sorted(seen) == sorted(data.patients["val"] + data.patients["test"])
        assert [batch[2]["name"] for batch in module.seen["predict"]] == [b[2]["name"] for b in module.seen["test"]]

    def test_half_precision_keeps_class_numbers_and_affine_matrices(self, tmp_path: Path):
        written = write_volumes(tmp_path, classes=2, shape=(12, 20, 18))
        module = Recorder()
        data = VolumeDataModule(tmp_path, patch_size=[8, 8, 8], num_classes=3, **SHARES)
        trainer(precision="bf16-true", num_sanity_val_steps=0).fit(module, datamodule=data)
        images, masks = module.seen["train"][0]
        assert (images.dtype, masks.dtype) == (torch.bfloat16, torch.int64)
        assert torch.cat([masks for _, masks in module.seen["train"]]).unique().tolist() == [0, 1, 2]
        images, masks, cases = module.seen["val"][0]
        assert (images.dtype, masks.dtype) == (torch.bfloat16, torch.int64)
        np.testing.assert_array_equal(cases["affine"][0], written[key(cases["name"][0])][2])

    def test_images_to_predict_for(self, shared: tuple[Path, Written], tmp_path: Path):
        root, written = shared
        (tmp_path / "new/deep").mkdir(parents=True)
        shutil.copy(root / "images/p1_0.nii.gz", tmp_path / "new/deep/scan ä.nii.gz")
        shutil.copy(root / "labels/p1_0.nii.gz", tmp_path / "new/deep/scan ä_mask.nii.gz")
        module, data = Recorder(), VolumeDataModule(tmp_path / "none", predict_root=tmp_path / "new", num_workers=1)
        with pytest.warns(UserWarning, match=r"1 entry is left out: masks beside their image \(1: .*_mask.nii.gz\)"):
            trainer().predict(module, datamodule=data)
        ((images, cases),) = module.seen["predict"]
        assert cases["name"] == ["deep/scan ä.nii.gz"]
        np.testing.assert_allclose(images[0].numpy(), scaled(written["p1_0"][0]), atol=1e-4)
        np.testing.assert_array_equal(cases["affine"][0], written["p1_0"][2])

    @pytest.mark.parametrize("predict_root", [None, "images"])
    def test_fewer_volumes_than_processes(self, root: Path, monkeypatch: pytest.MonkeyPatch, predict_root: str | None):
        for path in (root / "images").iterdir():
            if predict_root is not None and path.name != "p0_0.nii.gz":
                path.unlink()
        data = VolumeDataModule(root, predict_root=root / predict_root if predict_root else None, **SHARES)
        run = trainer()
        monkeypatch.setattr(type(run), "distributed_sampler_kwargs", {"num_replicas": 3, "rank": 0}, raising=False)
        volumes = "1 volume is" if predict_root else "2 volumes are"
        with pytest.raises(
            ValueError, match=rf"{volumes} too few for 3 processes: set trainer.devices to [12] or less"
        ):
            run.predict(Recorder(), datamodule=data)

    def test_no_images_to_predict_for(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="No images at"):
            VolumeDataModule(tmp_path, predict_root=tmp_path / "none").setup("predict")

    def test_decoded_once_for_all_stages(self, root: Path):
        data = made(root)
        train = [volume.image for volume in data.train_set.volumes]
        shutil.rmtree(root)
        data.setup("validate")
        data.setup("fit")
        assert all(before is volume.image for before, volume in zip(train, data.train_set.volumes, strict=True))

    def test_labels_are_read_once_if_all_fits_in_memory(
        self, shared: tuple[Path, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        seen: list[str] = []
        read = volumes.read_mask
        monkeypatch.setattr(volumes, "read_mask", lambda case, values: seen.append(case.name) or read(case, values))
        data = made(shared[0])
        data.setup("test")
        assert sorted(seen) == [f"images/{name}.nii.gz" for name in sorted(shared[1])]
        seen.clear()
        made(shared[0], max_memory_gb=5 * shared[1]["p0_0"][1].size / 1e9, cache_dir=tmp_path / "cache")
        assert len(seen) == 6  # and those of the files of the cache once more

    def test_test_images_are_not_decoded_for_training(self, shared: tuple[Path, Written]):
        data = made(shared[0])
        assert not hasattr(data, "test_set")
        data.setup("test")
        assert len(data.test_set) == 2

    def test_what_a_module_does_to_a_batch_leaves_the_cache_alone(self, shared: tuple[Path, Written]):
        data = made(shared[0])
        first = data.val_set[0][0].clone()
        data.val_set[0][0].zero_()
        assert torch.equal(data.val_set[0][0], first)


class TestSettingsOfTheTask:
    @pytest.mark.parametrize(
        ("settings", "task", "message"),
        [
            (
                {},
                {"ignore_index": 255},
                r"data.init_args.ignore_index is null, and model.init_args.ignore_index is 255: .* ignore_index: 255",
            ),
            (
                {"ignore_index": 254},
                {},
                r"data.init_args.ignore_index is 254, and model.init_args.ignore_index is null: .* ignore_index: 254",
            ),
            (
                {"num_classes": 3},
                {"num_classes": 2, "activation": "softmax"},
                r"data.init_args.num_classes is 3, and model.init_args.num_classes is 2: set both to one number",
            ),
        ],
        ids=["ignore_index of the task", "ignore_index of the data", "num_classes"],
    )
    def test_others_are_refused_before_decoding(
        self, tmp_path: Path, settings: dict[str, Any], task: dict[str, Any], message: str
    ):
        data = VolumeDataModule(tmp_path / "none", **settings)
        module = SegmentationTask(torch.nn.Conv3d(1, 2, 1), spatial_dims=3, in_chans=1, **task)
        with pytest.raises(ValueError, match=message):
            trainer().fit(module, datamodule=data)

    def test_another_module_may_mean_something_else(self, shared: tuple[Path, Written]):
        class Module(LightningModule):
            num_classes = 7

            def test_step(self, batch: Any, batch_idx: int) -> None:
                pass

        trainer().test(Module(), datamodule=VolumeDataModule(shared[0], **SHARES), verbose=False)

    def test_equal_ones_pass(self, shared: tuple[Path, Written], tmp_path: Path):
        data = VolumeDataModule(shared[0], num_classes=2, ignore_index=255, patch_size=[8, 8, 8], **SHARES)
        module = SegmentationTask(
            torch.nn.Conv3d(1, 2, 1), num_classes=2, activation="softmax", ignore_index=255, spatial_dims=3, in_chans=1
        )
        logger = CSVLogger(tmp_path)
        trainer(logger=logger, num_sanity_val_steps=0).fit(module, datamodule=data)
        assert logger.experiment.hparams["ignore_index"] == 255


class TestPatients:
    def test_no_patient_in_two_sets(self, shared: tuple[Path, Written]):
        data = made(shared[0], patient_pattern=r"^(p\d+)_")
        assert sorted(chain(*data.patients.values())) == ["p0", "p1", "p2"]
        assert data.hparams.patients == data.patients
        (patient,) = data.patients["val"]
        names = {cases["name"][0] for _, _, cases in data.val_dataloader()}
        assert names == {f"images/{patient}_0.nii.gz", f"images/{patient}_1.nii.gz"}
        assert {cases["patient"][0] for _, _, cases in data.val_dataloader()} == {patient}

    def test_whole_match_without_a_group(self, shared: tuple[Path, Written]):
        assert sorted(chain(*made(shared[0], patient_pattern=r"p\d").patients.values())) == ["p0", "p1", "p2"]

    def test_pattern_that_finds_nobody(self, shared: tuple[Path, Written]):
        with pytest.raises(ValueError, match=r"p2_1.nii.gz: patient_pattern finds no patient in 'p2_1'"):
            made(shared[0], patient_pattern=r"^(p[01])")

    def test_seed_draws_the_sets(self, shared: tuple[Path, Written]):
        drawn = {str(made(shared[0], seed=seed).patients) for seed in range(6)}
        assert len(drawn) > 1
        assert str(made(shared[0], seed=0).patients) in drawn

    def test_sets_are_logged(self, shared: tuple[Path, Written], caplog: pytest.LogCaptureFixture):
        with caplog.at_level("INFO"):
            data = made(shared[0])
        assert f"Volume test patients (2): {', '.join(data.patients['test'])}" in caplog.text

    def test_too_few(self, shared: tuple[Path, Written]):
        with pytest.raises(ValueError, match="leaves none for training"):
            made(shared[0], val_fraction=0.45, test_fraction=0.5)

    def test_checkpoints_of_the_test_patients_are_refused(self, shared: tuple[Path, Written], tmp_path: Path):
        module = Recorder()
        run = trainer(num_sanity_val_steps=0)
        run.fit(module, datamodule=VolumeDataModule(shared[0], patch_size=[8, 8, 8], **SHARES))
        run.save_checkpoint(tmp_path / "a.ckpt")
        seeds = (seed for seed in range(1, 20) if made(shared[0], seed=seed).patients != made(shared[0]).patients)
        other = VolumeDataModule(shared[0], patch_size=[8, 8, 8], seed=next(seeds), **SHARES)
        for function in ("validate", "test"):
            same = VolumeDataModule(shared[0], patch_size=[8, 8, 8], **SHARES)
            getattr(trainer(), function)(module, same, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
        with pytest.raises(ValueError, match=r"was trained or chosen on \d of the patients of the test set"):
            trainer().test(module, other, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        with pytest.raises(ValueError, match="was trained or chosen on"):
            trainer(max_epochs=2).fit(module, datamodule=other, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        trainer().predict(module, other, ckpt_path=tmp_path / "a.ckpt", weights_only=True)

    def test_loaded_from_a_checkpoint(self, shared: tuple[Path, Written], tmp_path: Path):
        module = Recorder()
        run = trainer(num_sanity_val_steps=0)
        flip = {"class_path": "monai.transforms.RandFlipd", "init_args": {"keys": ["image", "label"]}}
        kwargs = {"patch_size": [8, 9, 10], "intensity_range": [0.0, 5.0], "train_transform": [flip], **SHARES}
        run.fit(module, datamodule=VolumeDataModule(shared[0], **kwargs))
        run.save_checkpoint(tmp_path / "a.ckpt")
        data = VolumeDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        assert {name: data.hparams[name] for name in kwargs} == kwargs
        assert data.patch_size == (8, 9, 10)

    def test_frequencies(self, tmp_path: Path):
        written = write_volumes(tmp_path, classes=2, shape=(12, 20, 18))
        data = made(tmp_path, num_classes=3)
        labels = np.concatenate([written[name][1].ravel() for name in data.patients["train"]])
        assert data.class_frequencies() == pytest.approx((np.bincount(labels) / labels.size).tolist())
        data = made(tmp_path, num_classes=3, ignore_index=255)
        assert data.class_frequencies() == pytest.approx((np.bincount(labels) / labels.size).tolist())

    def test_frequency_of_one_class(self, shared: tuple[Path, Written]):
        root, written = shared
        data = made(root)
        labels = np.concatenate([written[name][1].ravel() for name in data.patients["train"]])
        assert data.class_frequencies() == pytest.approx([labels.mean()])

    def test_frequencies_before_setup(self, shared: tuple[Path, Written]):
        with pytest.raises(RuntimeError, match="has no training set yet"):
            VolumeDataModule(shared[0]).class_frequencies()


class TestPatches:
    def test_same_seed_same_patches_with_any_number_of_workers(self, shared: tuple[Path, Written]):
        seen = []
        for workers in (0, 0, 2):
            seed_everything(3, verbose=False)
            seen.append(patches_of(made(shared[0], **{**SHARES, "num_workers": workers}), epochs=2))
        assert seen[0] == seen[1] == seen[2]
        count = len(seen[0]) // 2
        assert count == 3 * 4
        assert not {*seen[0][:count]} & {*seen[0][count:]}  # other patches in the second epoch

    def test_another_seed_other_patches(self, shared: tuple[Path, Written]):
        seen = []
        for seed in (3, 4):
            seed_everything(seed, verbose=False)
            seen.append({*patches_of(made(shared[0]))})
        assert not seen[0] & seen[1]

    @pytest.mark.parametrize("stop", [6, 8], ids=["between epochs", "in an epoch"])
    def test_resumed_training_draws_what_it_would_have_drawn(
        self, shared: tuple[Path, Written], tmp_path: Path, stop: int
    ):
        class Stopped(Recorder):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                if stop == 8 and self.global_step == stop:
                    self.trainer.save_checkpoint(tmp_path / "a.ckpt")

            def on_train_epoch_end(self) -> None:
                if stop == 6 and self.current_epoch == 0:
                    self.trainer.save_checkpoint(tmp_path / "a.ckpt")

        def train(seed: int, **kwargs: Any) -> list[Tensor]:
            seed_everything(seed, verbose=False)
            module = Stopped()
            data = VolumeDataModule(shared[0], patch_size=[8, 8, 8], **SHARES)
            trainer(num_sanity_val_steps=0, max_epochs=2).fit(module, datamodule=data, **kwargs)
            return [images for images, _ in module.seen["train"]]

        whole = train(0)
        assert len(whole) == 12
        rest = train(1, ckpt_path=shutil.copy(tmp_path / "a.ckpt", tmp_path / "b.ckpt"), weights_only=True)
        assert len(rest) == 12 - stop
        assert all(map(torch.equal, rest, whole[stop:]))

    def test_number_of_patches(self, shared: tuple[Path, Written]):
        data = made(shared[0], patches_per_volume=7, batch_size=3)
        assert len(data.train_set) == 21
        assert [len(images) for images, _ in data.train_dataloader()] == [3] * 7

    @pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
    def test_share_around_a_class(self, fraction: float):
        mask = np.zeros((1, 30, 30, 30), np.uint8)
        mask[0, 3, 20, 10] = 1
        volume = Volume(np.arange(27000, dtype=np.float32).reshape(1, 30, 30, 30), mask)
        patches = Patches([volume], (3, 3, 3), 400, fraction)
        centred = [bool(patches[number, seed][1][0, 1, 1, 1]) for number, seed in enumerate(range(400))]
        assert sum(centred) / 400 == pytest.approx(fraction, abs=0.08)

    def test_classes_have_equal_chances(self):
        mask = np.zeros((1, 30, 30, 30), np.uint8)
        mask[0, 2:20, 2:20, 2:20] = 1
        mask[0, 25, 25, 25] = 2
        mask[0, 27, 1, 1] = IGNORED
        patches = Patches([Volume(mask.astype(np.float32), mask)], (1, 1, 1), 400, 1.0)
        counts = Counter(int(patches[number, seed][1]) for number, seed in enumerate(range(400)))
        assert counts.keys() == {1, 2}
        assert counts[1] / 400 == pytest.approx(0.5, abs=0.08)

    def test_every_place_is_possible(self):
        volume = Volume(np.arange(60, dtype=np.float32).reshape(1, 3, 4, 5), np.zeros((1, 3, 4, 5), np.uint8))
        patches = Patches([volume], (2, 2, 2), 1000, 0.0)
        assert {float(patches[number, number][0][0, 0, 0, 0]) for number in range(1000)} == {
            float(volume.image[0, x, y, z]) for x in range(2) for y in range(3) for z in range(4)
        }

    def test_image_and_mask_are_of_one_place(self, shared: tuple[Path, Written]):
        root, written = shared
        data = made(root, normalization="none", foreground_fraction=1.0)
        case = data.patients["train"][0]
        image, mask = data.train_set[0, 77]
        whole = torch.from_numpy(written[case][0])
        (place,) = (whole[0, :5, :13, :11] == image[0, 0, 0, 0]).nonzero().tolist()
        cut = tuple(slice(start, start + 8) for start in place)
        assert torch.equal(image, whole[(slice(None), *cut)])
        np.testing.assert_array_equal(mask[0].numpy(), written[case][1][cut])
        assert mask.any()

    @pytest.mark.parametrize("ignore", [None, 7])
    def test_volume_that_is_smaller_than_the_patch(self, shared: tuple[Path, Written], ignore: int | None):
        data, module = VolumeDataModule(shared[0], patch_size=[16, 8, 8], ignore_index=ignore, **SHARES), Recorder()
        trainer(num_sanity_val_steps=0).fit(module, datamodule=data)
        for images, masks in module.seen["train"]:
            outside = torch.ones(16, dtype=torch.bool)
            outside[2:14] = False  # 12 voxels, in the middle
            assert (images[:, :, outside] == 0).all()
            assert (masks[:, :, outside] == (ignore or 0)).all()
            assert (images[:, :, ~outside] != 0).all()
            assert (masks[:, :, ~outside] <= 1).all()

    def test_overfitting_sees_the_same_patches(self, shared: tuple[Path, Written]):
        module, data = Recorder(), VolumeDataModule(shared[0], patch_size=[8, 8, 8], **SHARES)
        with pytest.warns(UserWarning, match="overfit"):
            trainer(overfit_batches=2, max_epochs=2, num_sanity_val_steps=0).fit(module, datamodule=data)
        first, second, third, fourth = (images for images, _ in module.seen["train"])
        assert torch.equal(first, third)
        assert torch.equal(second, fourth)
        assert not torch.equal(first, second)


class TestTransforms:
    FLIP = ({"class_path": "monai.transforms.RandFlipd", "init_args": {"keys": ["image", "label"], "prob": 0.5}},)

    @pytest.mark.parametrize(
        "given", [FLIP[0], list(FLIP), RandFlipd(["image", "label"], prob=0.5)], ids=["description", "list", "object"]
    )
    def test_flips_some_patches_with_their_masks(self, shared: tuple[Path, Written], given: Any):
        seen = []
        for transform in (None, given):
            data = made(shared[0], train_transform=transform, patches_per_volume=20)
            seen.append([data.train_set[number, number] for number in range(60)])
        flipped = 0
        for (image, mask), (new_image, new_mask) in zip(*seen, strict=True):
            is_same = torch.equal(image, new_image)
            flipped += not is_same
            axes = () if is_same else (1, 2, 3)
            assert torch.equal(image.flip(axes), new_image)
            assert torch.equal(mask.flip(axes), new_mask)
        assert 15 < flipped < 45

    def test_same_seed_same_draws_with_any_number_of_workers(self, shared: tuple[Path, Written]):
        seen = []
        for workers in (0, 2):
            seed_everything(3, verbose=False)
            noise = {
                "class_path": "monai.transforms.RandGaussianNoised",
                "init_args": {"keys": "image", "prob": 1.0, "std": 0.5},
            }
            data = made(shared[0], train_transform=[noise, *self.FLIP], **{**SHARES, "num_workers": workers})
            seen.append(patches_of(data))
        assert seen[0] == seen[1]

    def test_not_in_evaluation(self, shared: tuple[Path, Written]):
        plain, changed = (
            made(shared[0], "validate", train_transform=transform).val_set[0][0]
            for transform in (None, RandFlipd(["image", "label"], prob=1.0))
        )
        assert torch.equal(plain, changed)

    def test_ignored_voxels_stay(self, shared: tuple[Path, Written]):
        data = made(shared[0], patch_size=[16, 8, 8], ignore_index=-1, train_transform=list(self.FLIP))
        assert (data.train_set[0, 5][1][:, :2] == IGNORED).all()
        _, masks = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        assert set(masks.unique().tolist()) >= {-1, 0}

    @pytest.mark.parametrize(
        ("transform", "message"),
        [
            ({"class_path": "monai.transforms.NoSuchd"}, "NoSuchd cannot be imported"),
            ({"class_path": "monai.transforms.RandFlip"}, "use RandFlipd with keys"),
            (3, "train_transform must be a transform"),
            (
                lambda case: {**case, "image": case["image"][:, :4], "label": case["label"][:, :4]},
                "leave out what crops",
            ),
            (lambda case: {**case, "label": case["label"] + 0.5}, "let it interpolate the label by 'nearest'"),
        ],
        ids=["unknown", "image alone", "number", "size", "values"],
    )
    def test_what_is_refused(self, shared: tuple[Path, Written], transform: Any, message: str):
        with pytest.raises((ValueError, TypeError), match=message):
            made(shared[0], train_transform=transform).train_set[0, 0]


class TestIntensities:
    @pytest.mark.parametrize(
        ("kwargs", "transforms"),
        [
            ({}, [NormalizeIntensityd("image", channel_wise=True)]),
            (
                {"normalization": "zscore_nonzero"},
                [NormalizeIntensityd("image", nonzero=True, channel_wise=True)],
            ),
            (
                {"normalization": "none", "intensity_range": [90, 130]},
                [ScaleIntensityRanged("image", 90, 130, 0, 1, clip=True)],
            ),
            (
                {"intensity_range": [90, 130]},
                [
                    ScaleIntensityRanged("image", 90, 130, 0, 1, clip=True),
                    NormalizeIntensityd("image", channel_wise=True),
                ],
            ),
        ],
        ids=["zscore", "zscore_nonzero", "window", "window and zscore"],
    )
    def test_as_monai_scales(self, tmp_path: Path, kwargs: dict[str, Any], transforms: list[Any]):
        written = write_volumes(tmp_path, channels=2, shape=(12, 20, 18))
        for path in (tmp_path / "images").iterdir():  # a border of zeros
            image = nibabel.load(path)
            voxels = np.asarray(image.dataobj).copy()
            voxels[:3] = 0
            nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)
        data = made(tmp_path, **kwargs)
        expected = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), *transforms])
        image, _, cases = data.val_set[0]
        reference = expected({"image": tmp_path / cases["name"][0]})["image"]
        assert image.shape[1] == 2
        torch.testing.assert_close(image[0], reference.as_tensor(), rtol=0, atol=1e-6)
        if kwargs.get("normalization") == "zscore_nonzero":
            assert (image[0, :, :3] == 0).all()
            assert written

    def test_voxels_that_are_not_0_before_the_window(self, root: Path):
        voxels = np.random.default_rng(0).normal(50, 80, (12, 20, 18)).astype(np.float32).round()
        voxels[:3] = 0  # around the brain
        outside = voxels == 0
        clipped = np.clip(voxels, -40, 60)
        assert ((clipped == -40) & ~outside).any()
        expected = np.where(outside, 0, (clipped - clipped[~outside].mean()) / clipped[~outside].std())
        for path in (root / "images").iterdir():
            change(path, voxels)
            change(root / "labels" / path.name, np.zeros(voxels.shape, np.uint8))
        image = made(root, normalization="zscore_nonzero", intensity_range=[-40, 60]).val_set[0][0]
        np.testing.assert_allclose(image[0, 0].numpy(), expected, atol=1e-5)

    def test_normalized_voxels_are_those_of_the_batches(self, tmp_path: Path):
        written = write_volumes(tmp_path, channels=2, shape=(12, 20, 18))
        for kwargs in ({}, {"normalization": "none", "intensity_range": [90, 130]}):
            data = made(tmp_path, **kwargs)
            image, _, cases = data.val_set[0]
            raw = torch.from_numpy(written[key(cases["name"][0])][0])
            before = raw.clone()
            both = data.normalized(torch.stack([raw, raw.abs().sqrt() + 80]))
            assert type(both) is Tensor
            torch.testing.assert_close(both[:1], image, rtol=0, atol=1e-6)
            assert both.shape == (2, *raw.shape)
            assert not torch.equal(both[0], both[1])
            assert torch.equal(raw, before)
            whole_numbers = data.normalized(raw[None].round().to(torch.int16))
            torch.testing.assert_close(whole_numbers, data.normalized(raw[None].round()), rtol=0, atol=0)

    def test_constant_channel(self, root: Path):
        for path in (root / "images").iterdir():
            image = nibabel.load(path)
            nibabel.save(nibabel.Nifti1Image(np.full(image.shape, 7.0, np.float32), image.affine), path)
        assert (made(root).val_set[0][0] == 0).all()


class TestLayouts:
    def test_nnunet(self, tmp_path: Path):
        folders = ("imagesTr", "labelsTr")
        written = write_volumes(tmp_path, channels=2, folders=folders, channel_files=True, shape=(12, 20, 18))
        data = made(tmp_path, channel_files=True)
        image, mask, cases = data.val_set[0]
        name = key(cases["name"][0])
        assert cases["name"] == [f"imagesTr/{name}.nii.gz"]
        np.testing.assert_allclose(image[0].numpy(), scaled(written[name][0]), atol=1e-4)
        np.testing.assert_array_equal(mask[0, 0].numpy(), written[name][1])

    def test_channel_files_with_a_fourth_axis_of_1(self, tmp_path: Path):
        written = write_volumes(tmp_path, channels=2, channel_files=True, shape=(12, 20, 18))
        for path in (tmp_path / "images").iterdir():
            change(path, np.asarray(nibabel.load(path).dataobj)[..., None])
        image, _, cases = made(tmp_path, channel_files=True).val_set[0]
        np.testing.assert_allclose(image[0].numpy(), scaled(written[key(cases["name"][0])][0]), atol=1e-4)

    def test_to_predict_for_in_channel_files(self, tmp_path: Path):
        written = write_volumes(tmp_path, channels=2, channel_files=True, shape=(12, 20, 18))
        shutil.copy(tmp_path / "labels/p0_0.nii.gz", tmp_path / "images/p0_0_mask.nii.gz")
        data = VolumeDataModule(channel_files=True, predict_root=tmp_path / "images", num_workers=0)
        with pytest.warns(UserWarning, match="masks beside their image"):
            data.setup("predict")
        batches = list(data.predict_dataloader())
        assert [cases["name"][0] for _, cases in batches] == [f"{name}.nii.gz" for name in sorted(written)]
        np.testing.assert_allclose(batches[0][0][0].numpy(), scaled(written["p0_0"][0]), atol=1e-4)

    def test_channels_on_a_fourth_axis_and_uncompressed_files(self, tmp_path: Path):
        written = write_volumes(tmp_path, channels=3, shape=(12, 20, 18))
        for path in (tmp_path / "images").iterdir():
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        image, _, cases = made(tmp_path).val_set[0]
        name = Path(cases["name"][0]).stem
        assert cases["name"] == [f"images/{name}.nii"]
        np.testing.assert_allclose(image[0].numpy(), scaled(written[name][0]), atol=1e-4)

    def test_folders_inside(self, root: Path):
        for folder in ("images", "labels"):
            (root / folder / "site a").mkdir()
            for path in (root / folder).glob("p0*"):
                path.rename(root / folder / "site a" / path.name)
        data = made(root, patient_pattern=r"^(?:site a/)?(p\d)")
        data.patients = {"train": ["p1"], "val": ["p0"], "test": ["p2"]}
        data.setup("validate")
        assert [cases["name"][0] for _, _, cases in data.val_dataloader()] == [
            "images/site a/p0_0.nii.gz", "images/site a/p0_1.nii.gz"
        ]  # fmt: skip

    def test_other_files_are_named(self, root: Path):
        (root / "images/scan.mha").touch()
        (root / "images/archive.gz").touch()
        (root / "images/.hidden.nii.gz").touch()
        with pytest.warns(UserWarning, match=r"2 entries are left out: of other types \(2: archive.gz, scan.mha\)"):
            made(root)


class TestCache:
    def test_volumes_in_files_are_those_in_memory(self, shared: tuple[Path, Written], tmp_path: Path):
        kept, mapped = (made(shared[0], max_memory_gb=gigabytes, cache_dir=tmp_path / "cache") for gigabytes in (1, 0))
        assert all(isinstance(volume, Volume) for volume in kept.train_set.volumes)
        assert all(isinstance(volume, StoredVolume) for volume in mapped.train_set.volumes)
        for number in range(12):
            assert all(map(torch.equal, kept.train_set[number, number], mapped.train_set[number, number]))
        for one, other in zip(kept.val_dataloader(), mapped.val_dataloader(), strict=True):
            assert all(map(torch.equal, one[:2], other[:2]))
        size = sum(5 * label.size for name, (_, label, _) in shared[1].items() if name not in kept.patients["test"])
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) == size

    def test_found_again_unless_settings_or_files_change(self, root: Path, tmp_path: Path):
        cache = tmp_path / "cache"

        def files(**kwargs: Any) -> set[Path]:
            made(root, max_memory_gb=0, cache_dir=cache, **kwargs)
            return {*cache.iterdir()}

        first = files()
        assert len(first) == 4
        assert files() == first
        for kwargs in ({"normalization": "none"}, {"intensity_range": [0, 1]}, {"num_classes": 3}, {"ignore_index": 9}):
            before = {*cache.iterdir()}
            assert len(files(**kwargs) - before) == 4
        before = {*cache.iterdir()}
        for path in (root / "images").iterdir():
            os.utime(path, (1, 1))
        assert len(files() - before) == 4

    def test_limit_is_of_all_sets(self, shared: tuple[Path, Written], tmp_path: Path):
        size = sum(5 * label.size for _, label, _ in shared[1].values()) / 1e9
        data = made(shared[0], max_memory_gb=size * 0.9, cache_dir=tmp_path / "cache")
        assert isinstance(data.train_set.volumes[0], Volume)
        data.setup("test")
        assert isinstance(data.test_set.volumes[0], StoredVolume)


class TestThreads:
    @pytest.fixture
    def threads(self, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
        """Numbers of threads that read headers, labels and volumes, on a machine that allows 6."""
        seen: list[int | None] = []

        class Pool(ThreadPoolExecutor):
            def __init__(self, max_workers: int | None = None) -> None:
                seen.append(max_workers)
                super().__init__(max_workers)

        monkeypatch.setattr(decoding, "ThreadPoolExecutor", Pool)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
        return seen

    def test_all_that_the_process_may_use(self, shared: tuple[Path, Written], threads: list[int | None]):
        made(shared[0])
        assert threads == [6, 6, 6]

    def test_without_affinity(
        self, shared: tuple[Path, Written], threads: list[int | None], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: 5)
        made(shared[0])
        assert threads == [5, 5, 5]

    @pytest.mark.parametrize(("volumes", "expected"), [(0.0, 1), (25.0, 1), (27.0, 2), (40.0, 3)])
    def test_as_many_as_memory_allows(
        self, shared: tuple[Path, Written], threads: list[int | None], tmp_path: Path, volumes: float, expected: int
    ):
        largest = 5 * max(label.size for _, label, _ in shared[1].values())
        made(shared[0], max_memory_gb=volumes * largest / 1e9, cache_dir=tmp_path / "cache")
        assert threads == [6, expected, expected]


def test_two_processes(shared: tuple[Path, Written], tmp_path: Path):
    single = see_volumes(shared[0], tmp_path / "one", processes=1)
    both = run_distributed(see_volumes, shared[0], tmp_path / "two", name="see_volumes")
    assert len({*chain(*(process["seen"] for process in both))}) == len(single["seen"]) == 2 * 3 * 4
    assert [len(process["seen"]) for process in both] == [12, 12]
    assert {*chain(*(process["names"] for process in both))} == {*single["names"]}
    written = {path.name for path in (tmp_path / "two/masks").iterdir()}
    assert written == {"images", "scores-0.csv", "scores-1.csv"}
    for path in (tmp_path / "one/masks/images").iterdir():
        other = nibabel.load(tmp_path / "two/masks/images" / path.name)
        assert other.affine.tolist() == shared[1][key(path.name.replace("_mask", ""))][2].tolist()
        assert other.shape == nibabel.load(path).shape
    assert len(list((tmp_path / "two/cache").iterdir())) == len(list((tmp_path / "one/cache").iterdir())) == 6


def change(path: Path, voxels: Any = None, affine: Any = None) -> None:
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj).copy() if voxels is None else voxels
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine if affine is None else affine), path)


class TestBadFiles:
    def test_all_are_named_in_one_error(self, root: Path):
        images, labels = root / "images", root / "labels"
        (labels / "p0_0.nii.gz").unlink()
        content = (images / "p0_1.nii.gz").read_bytes()
        (images / "p0_1.nii.gz").write_bytes(content[: len(content) // 2])
        (images / "p1_0.nii.gz").write_bytes(b"no NIfTI")
        label = np.asarray(nibabel.load(labels / "p1_1.nii.gz").dataobj).copy()
        label[0, 0, :2] = 2, 77
        change(labels / "p1_1.nii.gz", label)
        voxels = np.asarray(nibabel.load(images / "p2_0.nii.gz").dataobj).copy()
        voxels[1, 1, 1] = np.nan
        change(images / "p2_0.nii.gz", voxels)
        shutil.copy(labels / "p2_1.nii.gz", labels / "stranger.nii.gz")
        with pytest.raises(ValueError, match="cannot be used as it is, for 6 reasons") as caught:
            made(root)
        for expected in (
            "images/p0_0.nii.gz: has no label, ",
            "images/p0_1.nii.gz: cannot be read as a NIfTI volume (EOFError",
            "images/p1_0.nii.gz: cannot be read as a NIfTI volume (ImageFileError",
            "labels/p1_1.nii.gz: is a label with the values 2, 77 besides 0 to 1",
            "images/p2_0.nii.gz: holds NaN or infinity",
            "labels/stranger.nii.gz: has no image, ",
        ):
            assert expected in str(caught.value)

    def test_damaged_images_alone(self, root: Path):
        for path in (root / "images").iterdir():
            path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(ValueError, match="for 4 reasons"):  # those of the sets that training needs
            made(root)

    def test_shape(self, root: Path):
        change(root / "labels/p1_0.nii.gz", np.zeros((12, 20, 18), np.uint8))
        with pytest.raises(ValueError, match=r"labels/p1_0.nii.gz: has 12x20x18 voxels, and p1_0.nii.gz has 12x20x20"):
            made(root)

    def test_place(self, root: Path):
        affine = nibabel.load(root / "images/p1_0.nii.gz").affine
        change(root / "labels/p1_0.nii.gz", affine=affine + 1e-4)
        made(root)
        change(root / "labels/p1_0.nii.gz", affine=affine @ np.diag([1, 1, -1, 1]))
        with pytest.raises(ValueError, match=r"labels/p1_0.nii.gz: lies up to 38 voxels beside p1_0.nii.gz, because"):
            made(root)

    def test_channels(self, root: Path):
        path = root / "images/p2_0.nii.gz"
        voxels = np.asarray(nibabel.load(path).dataobj)
        change(path, np.stack([voxels, voxels], axis=-1))
        with pytest.raises(ValueError, match=r"p2_0.nii.gz: has 2 channels, and other images have 1"):
            made(root)

    def test_axes(self, root: Path):
        change(root / "images/p2_0.nii.gz", np.zeros((12, 20), np.float32))
        change(root / "labels/p2_1.nii.gz", np.zeros((12, 20, 23, 2), np.uint8))
        with pytest.raises(ValueError, match="for 2 reasons") as caught:
            made(root)
        assert "p2_0.nii.gz: has the shape 12x20, and a volume has three axes" in str(caught.value)
        assert "p2_1.nii.gz: has 12x20x23x2 voxels" in str(caught.value)

    def test_affine(self, root: Path):
        image = nibabel.load(root / "images/p2_0.nii.gz")
        image.header.set_sform(np.diag([1.0, 0, 1, 1]), code=1)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), root / "images/p2_0.nii.gz")
        with pytest.raises(ValueError, match=r"p2_0.nii.gz: has an affine matrix that is no map to millimetres"):
            made(root)

    def test_channel_files(self, tmp_path: Path):
        write_volumes(tmp_path, channels=3, channel_files=True, shape=(12, 20, 18))
        images = tmp_path / "images"
        (images / "p0_0_0001.nii.gz").unlink()
        shutil.copy(images / "p0_1_0000.nii.gz", images / "lone.nii.gz")
        voxels = np.zeros((12, 20, 20, 2), np.float32)
        change(images / "p1_0_0000.nii.gz", voxels)
        change(images / "p1_1_0002.nii.gz", np.zeros((12, 20, 18), np.float32))
        with pytest.raises(ValueError, match="for 5 reasons") as caught:
            made(tmp_path, channel_files=True)
        for expected in (
            "images/p0_0: has no file for channel 0001",
            "p0_0_0000.nii.gz: has 2 channels, and other images have 3",
            "lone.nii.gz: has no number of a channel at the end, such as lone_0000.nii.gz",
            "p1_0_0000.nii.gz: has 2 channels, and is the file of one",
            "p1_1_0002.nii.gz: has 12x20x18 voxels, and p1_1_0000.nii.gz has 12x20x21",
        ):
            assert expected in str(caught.value)

    def test_channel_files_that_were_not_asked_for(self, tmp_path: Path):
        write_volumes(tmp_path, channel_files=True, shape=(12, 20, 18))
        with pytest.raises(ValueError, match="for 12 reasons") as caught:
            made(tmp_path)
        message = "p0_0_0000.nii.gz: has no label, {}/p0_0_0000.nii.gz (set channel_files: true if 0000 is a channel)"
        assert message.format(tmp_path / "labels") in str(caught.value)
        shutil.copy(tmp_path / "images/p0_0_0000.nii.gz", tmp_path / "images/plain.nii.gz")
        with pytest.raises(ValueError, match="for 13 reasons") as caught:
            made(tmp_path)
        assert "channel_files: true" not in str(caught.value)

    def test_names_of_one_file(self, root: Path):
        os.link(root / "images/p0_0.nii.gz", root / "images/again.nii.gz")
        shutil.copy(root / "labels/p0_0.nii.gz", root / "labels/again.nii.gz")
        with pytest.raises(ValueError, match=r"p0_0.nii.gz: is the same file as .*again.nii.gz \(delete one\)"):
            made(root)

    def test_suffixes(self, root: Path):
        path = root / "images/p0_0.nii"
        path.write_bytes(gzip.decompress((root / "images/p0_0.nii.gz").read_bytes()))
        with pytest.raises(ValueError, match=r"p0_0.nii.gz: differs from p0_0.nii only in the suffix"):
            made(root)

    def test_ignored_values(self, root: Path):
        label = np.asarray(nibabel.load(root / "labels/p1_1.nii.gz").dataobj).astype(np.int16)
        label[0, 0] = -7
        change(root / "labels/p1_1.nii.gz", label)
        with pytest.raises(ValueError, match="values -7 besides 0 to 1"):
            made(root)
        with pytest.raises(ValueError, match="values -7 besides 0 to 2 and 9"):
            made(root, num_classes=3, ignore_index=9)
        data = made(root, ignore_index=-7)
        data.patients = {"train": ["p1_1"], "val": ["p0_0"], "test": ["p0_1"]}
        data.setup("fit")
        assert data.class_frequencies() == pytest.approx([label[label >= 0].mean()])
        data.patients = {"train": ["p0_0"], "val": ["p1_1"], "test": ["p0_1"]}
        data.setup("validate")
        _, masks, _ = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
        np.testing.assert_array_equal(masks[0, 0].numpy(), label)

    def test_values_between(self, root: Path):
        label = np.asarray(nibabel.load(root / "labels/p1_1.nii.gz").dataobj).astype(np.float32)
        label[0, 0, :7] = np.arange(7) / 10
        change(root / "labels/p1_1.nii.gz", label)
        with pytest.raises(ValueError, match=r"values 0.1, 0.2, 0.3, 0.4, 0.5 and others besides 0 to 1"):
            made(root)

    def test_values_nearly_whole(self, root: Path):
        written = {}
        for path in (root / "labels").iterdir():
            label = np.asarray(nibabel.load(path).dataobj)
            written[key(path.name)] = label
            change(path, label.astype(np.float32) * np.float32(0.9999999) - np.float32(5e-5))
        _, mask, cases = made(root).val_set[0]
        np.testing.assert_array_equal(mask[0, 0].numpy(), written[key(cases["name"][0])])
        voxels = np.zeros_like(label, np.float32)
        voxels[0, 0, :5] = 0.9998, 1.0002, 2.000004, np.inf, np.nan
        change(path, voxels)
        with pytest.raises(ValueError, match=r"values 0.9998, 1.0002, 2.000004, inf, nan besides 0 to 1"):
            made(root)

    def test_nothing_counts(self, root: Path):
        for path in (root / "labels").iterdir():
            change(path, np.full(nibabel.load(path).shape, 9, np.uint8))
        with pytest.raises(ValueError, match="No voxel of the 3 training labels counts: all are 9"):
            made(root, ignore_index=9).class_frequencies()

    def test_damaged_image_to_predict_for(self, root: Path):
        path = root / "images/p1_0.nii.gz"
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(RuntimeError, match=r"p1_0.nii.gz: cannot be read .* convert, replace or remove it"):
            trainer().predict(Recorder(), datamodule=VolumeDataModule(predict_root=root / "images", num_workers=0))

    def test_headers_of_images_to_predict_for(self, root: Path):
        (root / "images/p1_0.nii.gz").write_bytes(b"")
        (root / "images/p1_1.nii.gz").write_bytes(b"")
        with pytest.raises(ValueError, match="for 2 reasons"):
            made(root, "predict", predict_root=root / "images")

    @pytest.mark.parametrize("folders", [[], ["images"], ["images", "labels"]])
    def test_nothing_there(self, tmp_path: Path, folders: list[str]):
        for folder in folders:
            (tmp_path / folder).mkdir()
        with pytest.raises(FileNotFoundError, match="No volumes"):
            made(tmp_path)

    def test_without_nibabel(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "nibabel", None)
        with pytest.raises(ImportError, match=r"pip install 'lightning-znorm\[volumes\]'"):
            made(root)


def reorient(root: Path, case: str, axes: str) -> None:
    """Store a case with its axes towards other sides, at the same place."""
    for path in (root / "images" / f"{case}.nii.gz", root / "labels" / f"{case}.nii.gz"):
        image = nibabel.load(path)
        now = nibabel.io_orientation(image.affine)
        change = nibabel.orientations.ornt_transform(now, nibabel.orientations.axcodes2ornt(axes))
        nibabel.save(image.as_reoriented(change), path)


def stretch(root: Path, case: str, factor: float) -> None:
    """Multiply the spacing of the last axis of a case."""
    for path in (root / "images" / f"{case}.nii.gz", root / "labels" / f"{case}.nii.gz"):
        change(path, affine=nibabel.load(path).affine @ np.diag([1, 1, factor, 1]))


class TestAxes:
    def test_mixed(self, root: Path):
        for case in ("p0_1", "p2_0"):
            reorient(root, case, "PSL")
        with pytest.raises(ValueError, match="for 2 reasons") as caught:
            made(root)
        for case in ("p0_1", "p2_0"):
            assert f"images/{case}.nii.gz: has its axes towards PSL, and other images towards RAS" in str(caught.value)
        assert "nibabel.as_closest_canonical" in str(caught.value)

    def test_all_alike(self, root: Path):
        for path in (root / "images").iterdir():
            reorient(root, key(path.name), "PSL")
        assert len(made(root).train_set.volumes) == 3

    def test_mixed_images_to_predict_for(self, root: Path):
        reorient(root, "p0_1", "LAS")
        with pytest.raises(ValueError, match=r"p0_1.nii.gz: has its axes towards LAS, and other images towards RAS"):
            made(root, "predict", predict_root=root / "images")

    def test_images_to_predict_for_are_those_of_the_training(self, root: Path, tmp_path: Path):
        module, kwargs = Recorder(), {"patch_size": [8, 8, 8], **SHARES}
        new, run = tmp_path / "new", trainer(num_sanity_val_steps=0)
        shutil.copytree(root / "images", new / "images")
        shutil.copytree(root / "labels", new / "labels")
        for path in (new / "images").iterdir():
            reorient(new, key(path.name), "LPS")
        message = r"6 images .*p0_0.nii.gz, .* and 3 more.* towards LPS, .*trained .* towards RAS"
        data = VolumeDataModule(root, predict_root=new / "images", **kwargs)
        run.fit(module, datamodule=data)
        run.save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=message):
            run.predict(module, datamodule=data)
        loaded = VolumeDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        with pytest.raises(ValueError, match=message):
            loaded.setup("predict")
        for other in (
            VolumeDataModule(predict_root=new / "images", **kwargs),
            VolumeDataModule(new, **kwargs),
        ):
            with pytest.raises(ValueError, match=message):
                trainer().predict(module, other, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        right = VolumeDataModule(predict_root=root / "images", **kwargs)
        trainer().predict(module, right, ckpt_path=tmp_path / "a.ckpt", weights_only=True)

    def test_spacing(self, root: Path):
        stretch(root, "p1_0", 1.45)
        made(root)
        stretch(root, "p1_0", 2.0)
        message = (
            r"spacing of the images differs: along axis 2 from 0.8 mm \(p\d_\d.nii.gz\) to 2.32 mm \(p1_0.nii.gz\).*"
            "resample"
        )
        with pytest.warns(UserWarning, match=message) as caught:
            data = made(root)
        assert len(caught) == 1
        data.setup("test")  # without another warning
        with pytest.warns(UserWarning, match=message):
            made(root, "predict", predict_root=root / "images")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patch_size": [8, 8]}, "patch_size must be three numbers"),
        ({"patch_size": 8}, "patch_size must be three numbers"),
        ({"patch_size": [8, 8, 0]}, "patch_size must be at least 1"),
        ({"patches_per_volume": 0}, "patches_per_volume must be at least 1"),
        ({"foreground_fraction": 1.5}, "foreground_fraction is a share"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"num_classes": 256}, "num_classes must be at least 1 and less than"),
        ({"ignore_index": 1}, "ignore_index=1 is the number of a class"),
        ({"ignore_index": "x"}, "ignore_index must be a whole number"),
        ({"num_classes": 3, "ignore_index": 2}, r"ignore_index=2 is the number of a class \(0 to 2\)"),
        ({"channel_files": "no"}, "channel_files must be True or False"),
        ({"patient_pattern": "("}, "is no regular expression"),
        ({"patient_pattern": 3}, "patient_pattern must be a regular expression"),
        ({"test_fraction": 0.95}, "test_fraction is the share"),
        ({"val_fraction": 0.0}, "val_fraction is the share"),
        ({"normalization": "minmax"}, "normalization must be 'zscore', 'zscore_nonzero' or 'none'"),
        ({"intensity_range": [1]}, "intensity_range must be two numbers"),
        ({"intensity_range": 4}, "intensity_range must be two numbers"),
        ({"intensity_range": [5, 5]}, "must begin with the lower number"),
        ({"intensity_range": [0, float("inf")]}, "intensity_range must be finite"),
        ({"max_memory_gb": -1}, "max_memory_gb must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
    ],
    ids=str,
)
def test_arguments(kwargs: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        VolumeDataModule(**kwargs)
