"""Random transforms of training images and masks, from YAML and as objects: what they get, their draws, refusals."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from monai.transforms import (
    Compose,
    CopyItemsd,
    MapTransform,
    OneOf,
    Rand2DElasticd,
    RandCropByPosNegLabeld,
    RandFlip,
    RandFlipd,
    RandGaussianNoised,
    Randomizable,
    RandRotated,
    RandSpatialCropd,
    SpatialCropd,
)
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import Compose as OldCompose
from torchvision.transforms import RandomHorizontalFlip as OldFlip
from torchvision.transforms import v2

from lightning_znorm.data import LGGDataModule, MaskFolderDataModule
from lightning_znorm.data.transforms import CaseTransforms, built, checked_transform
from tests.medical import write_lgg, write_mask_folder
from tests.trainers import trainer

KEYS = ["image", "label"]
ROTATED = {
    "class_path": "monai.transforms.RandRotated",
    "init_args": {"keys": KEYS, "range_x": 1.0, "prob": 1.0, "mode": ["bilinear", "nearest"]},
}
NOISE = {"class_path": "monai.transforms.RandGaussianNoised", "init_args": {"keys": ["image"], "prob": 1.0, "std": 0.1}}
COMPOSED = {"class_path": "monai.transforms.Compose", "init_args": {"transforms": [ROTATED, NOISE]}}
CROP = {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": 32}}


class Witness(LightningModule):
    """Records its training batches, and draws random numbers as it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Dropout())
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(part.clone() for part in batch))
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches(count: int = 4, size: int = 16) -> tuple[Tensor, Tensor]:
    """Return images whose channels tell the row and column of a pixel, and masks of the rows' class."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.stack([rows * 8, columns * 8, rows + columns]).to(torch.uint8)
    return image.repeat(count, 1, 1, 1), (rows // (size // 2)).to(torch.uint8).repeat(count, 1, 1, 1)


def apply(transform: Any, *seeds: int | None, num_classes: int = 2, value: int = 255) -> tuple[Tensor, Tensor]:
    steps = built("train_transform", checked_transform("train_transform", transform))
    images, masks = batches(len(seeds))
    return CaseTransforms("train_transform", steps, num_classes, value)(images, masks, seeds)


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class TestWhatTheyGet:
    def test_floats_from_0_to_1_and_whole_classes(self):
        seen = {}

        def look(case: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.update(case)
            return case

        images, masks = apply(look, 0)
        assert (seen["image"].dtype, seen["label"].dtype) == (torch.float32, torch.float32)
        assert seen["image"].shape == (3, 16, 16)
        assert seen["label"].shape == (1, 16, 16)
        assert seen["image"].max() == 15 * 8 / 255
        assert torch.equal(images, batches(1)[0] / 255)
        assert torch.equal(masks, batches(1)[1])
        assert masks.dtype == torch.uint8
        images, _ = apply(look, 0, value=65535)
        assert seen["image"].max() == torch.tensor(15 * 8 / 65535)

    def test_torchvision_gets_its_own_types(self):
        seen = []

        class Look(v2.Transform):
            def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
                seen.append(inpt)
                return inpt

        found = apply(Look(), 0)
        assert [type(part).__name__ for part in seen] == ["Image", "Mask"]
        assert [type(part) for part in found] == [Tensor, Tensor]

    @pytest.mark.parametrize(
        "transform",
        [
            {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 1.0}},
            {"class_path": "monai.transforms.Flipd", "init_args": {"keys": KEYS, "spatial_axis": 1}},
            v2.RandomHorizontalFlip(p=1.0),
            v2.Compose([v2.RandomHorizontalFlip(p=1.0)]),
            [v2.RandomHorizontalFlip(p=1.0), lambda case: case],
            lambda case: {name: part.flip(-1) for name, part in case.items()},
            lambda case: {name: part.numpy()[..., ::-1].copy() for name, part in case.items()},
            lambda case: [{name: part.flip(-1) for name, part in case.items()}],
        ],
        ids=[
            "torchvision in YAML",
            "MONAI in YAML",
            "torchvision",
            "v2.Compose",
            "list",
            "function",
            "NumPy",
            "one sample",
        ],
    )
    def test_all_kinds(self, transform: Any):
        images, masks = apply(transform, 0, 1)
        before = batches(2)
        assert torch.equal(images, before[0].flip(-1) / 255)
        assert torch.equal(masks, before[1].flip(-1))
        assert type(images) is type(masks) is Tensor

    @pytest.mark.parametrize("composed", [False, True])
    def test_torchvision_may_compute_in_uint8_in_between(self, composed: bool):
        steps = [v2.ToDtype({tv_tensors.Image: torch.uint8, "others": None}, scale=True), v2.RandomInvert(p=1.0),
                 v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]  # fmt: skip
        before, (images, _) = batches(1)[0] / 255, apply(v2.Compose(steps) if composed else steps, 0)
        torch.testing.assert_close(images, 1 - before)
        torch.testing.assert_close(apply([steps[0], steps[2]], 0)[0], before)

    def test_in_the_order_of_the_list(self):
        double = {"image": lambda image: image * 2}

        def times(case: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**case, "image": double["image"](case["image"])}

        def plus(case: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**case, "image": case["image"] + 1}

        assert torch.equal(apply([times, plus], 0)[0], batches(1)[0] / 255 * 2 + 1)
        assert torch.equal(apply([plus, times], 0)[0], (batches(1)[0] / 255 + 1) * 2)

    def test_nested_descriptions(self):
        (step,) = built("train_transform", COMPOSED)
        assert isinstance(step, Compose)
        assert [type(each) for each in step.transforms] == [RandRotated, RandGaussianNoised]
        assert step.transforms[0].keys == ("image", "label")

    def test_pixels_that_do_not_count_stay_so(self):
        images, masks = batches(1)
        masks[0, 0, 3, 5] = 255
        flip = CaseTransforms("train_transform", [v2.RandomHorizontalFlip(p=1.0)], 2, 255)
        assert flip(images, masks, [0])[1][0, 0, 3, 10] == 255

    def test_image_and_mask_alike(self):
        """The first channel tells the row, and the mask is 1 from row 8 on."""
        for transform in ([ROTATED], [CROP], [v2.RandomAffine(20, translate=(0.1, 0.1))]):
            images, masks = apply(transform, *range(20))
            rows = images[:, :1] * 255 / 8
            inside = (rows > 0.5) & (rows - 7.5).abs().gt(0.75)  # not where it was filled with 0, or between two rows
            assert inside.float().mean() > 0.5
            assert torch.equal((rows > 7.5)[inside], masks.bool()[inside])


def test_masks_are_checked_without_sorting_them(monkeypatch: pytest.MonkeyPatch):
    """Sorting a patch of 96^3 voxels takes four times as long as flipping it."""
    monkeypatch.setattr(torch, "unique", lambda mask: pytest.fail("sorted"))
    assert apply([v2.RandomHorizontalFlip(p=1.0), lambda case: case], 0)[1].any()


class TestDraws:
    @pytest.mark.parametrize(
        "transform",
        [
            ROTATED,
            COMPOSED,
            CROP,
            [ROTATED, NOISE, CROP],
            lambda case: {**case, "image": case["image"] + torch.rand(())},
            lambda case: {**case, "image": case["image"] + np.random.rand()},
            lambda case: {**case, "image": case["image"] + random.random()},
        ],
        ids=["MONAI", "MONAI composed", "torchvision", "list", "torch", "NumPy", "Python"],
    )
    def test_follow_from_the_seed(self, transform: Any):
        first = apply(transform, 5, 6, 2**63 - 1)
        random.random(), np.random.rand(), torch.rand(1)
        assert same(first, apply(transform, 5, 6, 2**63 - 1))
        assert torch.equal(first[0][1], apply(transform, 6)[0][0])
        assert not torch.equal(first[0][0], first[0][1])

    def test_two_of_a_kind_draw_apart(self):
        noise = apply([NOISE, NOISE], 0)[0] - batches(1)[0] / 255
        once = apply(NOISE, 0)[0] - batches(1)[0] / 255
        assert not torch.allclose(noise, 2 * once, atol=1e-3)

    @pytest.mark.parametrize("other", ["MONAI", "MONAI composed", "torch", "NumPy", "Python"])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_steps_and_generators_are_independent(self, other: str, place: int):
        """Whether the first step flips does not follow from the numbers that others draw first, second or third."""
        draws, flipped, drawn = (
            {"torch": lambda: float(torch.rand(())), "NumPy": np.random.rand, "Python": random.random},
            [],
            [],
        )

        class Draw(Randomizable, MapTransform):
            def __call__(self, case: Any) -> Any:
                numbers = self.R.rand(3) if "MONAI" in other else [draws[other]() for _ in range(3)]
                drawn.append(numbers[place] < 0.5)
                return case

        def look(case: Any) -> Any:
            flipped.append(bool(case["image"][0, 0, 0] > 0))
            return case

        draw = Compose([Draw(KEYS)]) if other == "MONAI composed" else Draw(KEYS)
        apply([RandFlipd(KEYS, prob=0.5, spatial_axis=0), draw, look], *range(400))
        assert abs(np.mean(np.array(flipped) == drawn) - 0.5) < 0.125  # five standard deviations
        assert abs(np.mean(flipped) - 0.5) < 0.125

    def test_generators_are_put_back(self):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        expected = torch.rand(1), np.random.rand(), random.random()
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        apply([COMPOSED, CROP, lambda case: {**case, "image": case["image"] + np.random.rand()}], 5)
        assert (torch.rand(1), np.random.rand(), random.random()) == expected

    def test_without_a_seed_they_go_on(self):
        assert not same(apply(CROP, None), apply(CROP, None))


class TestRefusals:
    @pytest.mark.parametrize(
        "value", ["monai.transforms.RandFlipd", 3, {"p": 1}, {"class_path": "a.B", "p": 1}, RandFlip, [3], [[CROP]]]
    )
    def test_of_another_form(self, value: Any):
        with pytest.raises(TypeError, match=r"^train_transform must be a transform, \{class_path: .*, got "):
            checked_transform("train_transform", value)

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ({"class_path": "monai.transforms.RandFlap"}, "monai.transforms.RandFlap cannot be imported .*RandFlap"),
            ({"class_path": "nowhere.Flip"}, "nowhere.Flip cannot be imported"),
            ({"class_path": "Flip"}, "Flip cannot be imported"),
            ({"class_path": "pathlib.Path"}, "pathlib.Path is no class of transforms"),
            ({"class_path": "os.getcwd", "init_args": {"a": 1}}, "os.getcwd is no class of transforms"),
            ({"class_path": "math.pi"}, "math.pi is no class of transforms"),
            (
                {"class_path": "monai.transforms.RandFlipd", "init_args": {"keyz": 1}},
                r"monai.transforms.RandFlipd cannot be made with \{'keyz': 1\} \(TypeError: .*keyz",
            ),
            (OldFlip(), "RandomHorizontalFlip transforms an image alone, .*: use torchvision.transforms.v2.RandomHor"),
            (
                OldCompose([v2.Identity()]),
                "Compose transforms an image alone, .*: use torchvision.transforms.v2.Compose",
            ),
            (Compose([OneOf([RandFlip()])]), r"RandFlip transforms an image alone, .*: use RandFlipd with keys"),
            (v2.RandomApply([OldFlip()]), "RandomHorizontalFlip transforms an image alone"),
            (RandFlip(), r"RandFlip transforms an image alone, .*: use RandFlipd with keys: \[image, label\]"),
            (
                {"class_path": "torchvision.transforms.RandomHorizontalFlip"},
                "RandomHorizontalFlip transforms an image alone, .*: use torchvision.transforms.v2.RandomHorizontal",
            ),
            (
                {"class_path": "monai.transforms.Compose", "init_args": {"transforms": [{"class_path": "a.B"}]}},
                "a.B cannot be imported",
            ),
        ],
    )
    def test_cannot_be_built(self, value: Any, said: str):
        with pytest.raises(ValueError, match=f"^train_transform: {said}"):
            built("train_transform", checked_transform("train_transform", value))

    @pytest.mark.parametrize(
        ("transform", "said"),
        [
            (lambda case: case["image"], "<lambda> returned a Tensor, and a dict with 'image' and 'label' is expected"),
            (lambda case: None, "<lambda> returned a NoneType, and a dict"),
            (
                RandCropByPosNegLabeld(KEYS, "label", (8, 8), num_samples=2),
                "RandCropByPosNegLabeld returned a list of dict and dict, and a dict",
            ),
            (
                SpatialCropd(["image"], roi_start=(0, 0), roi_end=(8, 8)),
                r"SpatialCropd returned an image of shape \(3, 8, 8\) and a mask of shape \(1, 16, 16\), and 3",
            ),
            (v2.Grayscale(), r"Grayscale returned an image of shape \(1, 16, 16\) and a mask of shape"),
            (
                RandRotated(KEYS, range_x=1.0, prob=1.0, mode="bilinear"),
                "RandRotated returned a mask with the values .*whole numbers below 2 are expected: .*'nearest'",
            ),
            (lambda case: {**case, "label": case["label"] + 1}, "<lambda> returned a mask with the values 2, and"),
            (lambda case: {**case, "label": case["label"] - 1}, "<lambda> returned a mask with the values -1, and"),
            (
                v2.ToDtype({tv_tensors.Image: torch.uint8, "others": None}, scale=True),
                r"ToDtype returned an image of torch.uint8, .* from 0 to 1 .*end with torchvision.transforms.v2.ToD",
            ),
            (
                lambda case: {**case, "image": (case["image"] * 255).int()},
                "<lambda> returned an image of torch.int32, ",
            ),
            (lambda case: {**case, "label": case["label"] * torch.nan}, "<lambda> returned a mask with the values nan"),
            (
                lambda case: {**case, "label": case["label"] + 256},
                "<lambda> returned a mask with the values 256, 257, ",
            ),
            (
                CopyItemsd(["mask"], 1, ["other"]),
                r"CopyItemsd failed on an image of shape \(3, 16, 16\) and its mask \(KeyError.* a dict of image and",
            ),
            (Compose([lambda case: 1 / 0]), r"Compose failed on .*: it is called with a dict of image and label\.$"),
            (
                v2.Lambda(lambda part: 1 / 0),
                "Lambda failed on .*ZeroDivisionError.*: it is called with an Image and a M",
            ),
        ],
    )
    def test_returns_what_does_not_fit(self, transform: Callable[..., Any], said: str):
        with pytest.raises(ValueError, match=f"^train_transform: {said}"):
            apply(transform, 0)

    def test_sizes_in_one_batch(self):
        crop = RandSpatialCropd(KEYS, roi_size=(4, 4), random_size=True)
        with pytest.raises(
            ValueError, match=r"^train_transform: RandSpatialCropd made images of \d sizes for one batch"
        ):
            apply(crop, *range(8))
        images, masks = apply(Compose([Rand2DElasticd(KEYS, (4, 4), (0, 1), mode=["bilinear", "nearest"])]), *range(8))
        assert images.shape[2:] == masks.shape[2:] == (16, 16)

    def test_names_the_one_of_several(self):
        with pytest.raises(ValueError, match=r"^train_transform: Grayscale returned an image"):
            apply([v2.Identity(), v2.Grayscale(), v2.Identity()], 0)


def mask_folder(root: Path, **kwargs: Any) -> LightningDataModule:
    return MaskFolderDataModule(root / "nuclei", 3, mask_values=[0, 128, 255], patient_pattern="^([^_]+)_", **kwargs)


def lgg(root: Path, **kwargs: Any) -> LightningDataModule:
    return LGGDataModule(root / "lgg", 3, **kwargs)


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    write_mask_folder(tmp_path / "nuclei")
    write_lgg(tmp_path / "lgg")
    return tmp_path


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("make", [mask_folder, lgg])
class TestInTraining:
    def seen(self, data: LightningDataModule, seed: int | None = 0, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
        module, path = Witness(), kwargs.pop("ckpt_path", None)
        if seed is not None:
            torch.manual_seed(seed)
        trainer(**{"max_epochs": 2, **kwargs}).fit(module, datamodule=data, ckpt_path=path)
        return module.seen

    # Lightning warns that the resumed training saves no checkpoints.
    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
    @pytest.mark.parametrize("workers", [0, 2])
    def test_resumed_in_the_middle_of_an_epoch(self, make: Any, workers: int, roots: Path):
        kwargs = {"train_transform": [COMPOSED, CROP], "num_workers": workers}
        saving = ModelCheckpoint(roots / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        whole = self.seen(make(roots, **kwargs), callbacks=[saving], enable_checkpointing=True)
        assert len(whole) >= 6
        assert not any(
            torch.equal(one[0], other[0]) for one, other in zip(whole, whole[len(whole) // 2 :], strict=False)
        )
        for step in (1, len(whole) // 2 + 1):
            resumed = self.seen(make(roots, **kwargs), seed=None, ckpt_path=roots / "saved" / f"step={step}.ckpt")
            assert len(resumed) == len(whole) - step
            assert all(map(same, resumed, whole[step:]))

    def test_the_same_with_workers(self, make: Any, roots: Path):
        first = self.seen(make(roots, train_transform=COMPOSED))
        assert all(map(same, first, self.seen(make(roots, train_transform=COMPOSED, num_workers=2))))
        assert not all(map(same, first, self.seen(make(roots, train_transform=COMPOSED), seed=1)))

    def test_changes_training_images_alone(self, make: Any, roots: Path):
        data, plain_data = make(roots, train_transform=v2.RandomVerticalFlip(p=1.0)), make(roots)
        flipped, plain = self.seen(data, max_epochs=1), self.seen(plain_data, max_epochs=1)
        for (images, masks), (plain_images, plain_masks) in zip(flipped, plain, strict=True):
            torch.testing.assert_close(images, plain_images.flip(-2), rtol=1e-5, atol=1e-5)
            assert torch.equal(masks, plain_masks.flip(-2))
            assert masks.dtype == plain_masks.dtype
        for part in ("val_set", "test_set"):
            assert same(getattr(data, part)[0], getattr(plain_data, part)[0])

    def test_refused_before_files_are_read(self, make: Any, tmp_path: Path):
        data = make(tmp_path / "nowhere", train_transform={"class_path": "monai.transforms.RandFlap"})
        with pytest.raises(ValueError, match="RandFlap cannot be imported"):
            data.setup("fit")

    def test_a_strangers_checkpoint_builds_nothing(self, make: Any, roots: Path, monkeypatch: pytest.MonkeyPatch):
        data = make(roots, train_transform=COMPOSED)
        run = trainer(max_epochs=1, limit_train_batches=1)
        run.fit(Witness(), datamodule=data)
        run.save_checkpoint(roots / "trained.ckpt")
        monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imports {name}"))
        loaded = type(data).load_from_checkpoint(roots / "trained.ckpt")
        assert loaded.hparams.train_transform == loaded.train_transform == COMPOSED
        loaded.setup("test")

    def test_hyperparameters_hold_descriptions_alone(self, make: Any, roots: Path):
        assert make(roots, train_transform=[COMPOSED, CROP]).hparams.train_transform == [COMPOSED, CROP]
        for objects in (v2.Identity(), [COMPOSED, v2.Identity()]):
            assert make(roots, train_transform=objects).hparams.get("train_transform") is None

    def test_class_frequencies_are_of_the_files(self, make: Any, roots: Path):
        plain, rotated = make(roots), make(roots, train_transform=ROTATED)
        for data in (plain, rotated):
            data.setup("fit")
        assert plain.class_frequencies() == rotated.class_frequencies()
