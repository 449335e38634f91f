"""Pictures of masks: what they show, where they go, and which cases are drawn."""

import csv
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm import MaskOverlay
from lightning_znorm.callbacks import mask_overlay
from lightning_znorm.callbacks.drawing import GAP, LEAST_SIZE, LINE, Case, grid, outline
from lightning_znorm.tasks import SegmentationTask
from tests.callbacks.ddp_masks import draw_and_write
from tests.distributed import run_distributed
from tests.dtypes import DEFAULTS, default_dtype
from tests.trainers import trainer

ORANGE, BLUE, GREEN = (230, 159, 0), (86, 180, 233), (0, 158, 115)
LIGHT_ORANGE = (242, 206, 127)


def square(size: int, top: int, left: int, side: int) -> Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, top : top + side, left : left + side] = True
    return mask


class Outlines:
    """Checks of the pixels of a picture."""

    def __init__(self, picture: Image.Image) -> None:
        self.pixels = np.asarray(picture)

    def of(self, colour: tuple[int, int, int]) -> np.ndarray:
        return np.argwhere((self.pixels == colour).all(axis=-1))


class TestDrawing:
    def test_outline(self):
        mask = square(6, 1, 2, 4)[0]
        expected = mask.clone()
        expected[2:4, 3:5] = False
        assert torch.equal(outline(mask), expected)

    def test_outline_at_the_border(self):
        assert outline(torch.ones(3, 3, dtype=torch.bool)).sum() == 8

    @pytest.mark.parametrize("size", [512, 256, 100])
    def test_truth_and_prediction_stand_in_their_panels(self, size: int):
        factor = -(-LEAST_SIZE // size)
        image = torch.randn(1, size, size).expand(3, -1, -1)  # grey: no pixel has the colour of an outline by chance
        case = Case(image, square(size, 10, 20, 30), square(size, 40, 50, 20), "case 0")
        slots = Outlines(grid([case])).of(ORANGE)
        panel = size * factor + GAP
        truth = slots[slots[:, 1] < GAP + 2 * panel]  # the third panel has another colour for it
        preds = slots[slots[:, 1] >= GAP + 2 * panel]
        for drawn, number, (top, left, side) in ((truth, 1, (10, 20, 30)), (preds, 2, (40, 50, 20))):
            origin = np.array([LINE, GAP + number * panel])
            assert (drawn.min(axis=0) - origin == factor * np.array([top, left])).all()
            assert (drawn.max(axis=0) - origin == factor * (np.array([top, left]) + side) - 1).all()

    @pytest.mark.parametrize("default", DEFAULTS, ids=str)
    def test_torchs_default_type_changes_nothing(self, default: torch.dtype):
        case = Case(torch.rand(3, 32, 32).half(), square(32, 10, 20, 3), square(32, 4, 5, 2), "case 0")
        expected = np.asarray(grid([case]))
        with default_dtype(default):
            assert (np.asarray(grid([case])) == expected).all()

    def test_outlines_are_seen_on_a_bright_image_and_leave_small_structures_open(self):
        image, mask = torch.linspace(0, 1, 256**2).view(1, 256, 256), square(256, 250, 100, 3)
        pixels = np.asarray(grid([Case(image, mask, mask, "")]))
        truth = pixels[LINE : LINE + 512, GAP + (512 + GAP) :][:, :512]
        assert (truth[500:506, 200:206][2:4, 2:4] > 200).all()  # what is inside of it
        assert (truth[500:506, 200:206][[0, 1, 4, 5]] == ORANGE).all()
        assert (truth[499, 200:206] == 0).all()
        assert (truth[500:506, [199, 206]] == 0).all()

    def test_a_colour_for_each_class(self):
        truth = torch.cat([square(256, 10, 10, 20), square(256, 100, 100, 20)])
        drawn = Outlines(grid([Case(torch.zeros(1, 256, 256), truth, truth, "")]))
        assert len(drawn.of(ORANGE)) == len(drawn.of(BLUE)) > 0

    @pytest.mark.parametrize("background", [0.0, 1.0])
    def test_truth_is_dashed_in_the_prediction(self, background: float):
        """Light and black by turns, on dark, on bright and on the predicted outline, whose colour stays between."""
        truth, preds = square(256, 100, 40, 60), square(256, 60, 100, 100)
        image = torch.full((1, 256, 256), background)
        image[:, 0], image[:, -1] = 0, 1
        pixels = np.asarray(grid([Case(image, truth, preds, "")]))[LINE : LINE + 512, GAP + 2 * (512 + GAP) :][:, :512]
        top, crossed = pixels[200, 80:200], pixels[200:320, 200]
        assert {tuple(pixel) for pixel in top.tolist()} == {LIGHT_ORANGE, (0, 0, 0)}
        light = (top == LIGHT_ORANGE).all(axis=-1)
        assert 0.4 < light.mean() < 0.6
        assert np.diff(light.astype(int)).astype(bool).sum() >= 10  # dashes, and not one half
        assert (pixels[120:320, 200:202] == ORANGE).all(axis=-1).sum() > 100
        assert {tuple(pixel) for pixel in crossed.tolist()} <= {LIGHT_ORANGE, (0, 0, 0), ORANGE}

    def test_truth_shows_upon_an_equal_prediction(self):
        mask = square(256, 100, 40, 60)
        pixels = np.asarray(grid([Case(torch.zeros(1, 256, 256), mask, mask, "")]))[:, GAP + 2 * (512 + GAP) :]
        light, black = (((pixels == colour).all(axis=-1))[LINE + 200, 80:200] for colour in (LIGHT_ORANGE, (0, 0, 0)))
        assert (light ^ black).all()
        assert light.any()
        assert black.any()

    def test_legend_of_classes(self):
        masks = torch.cat([square(64, 10 * number, 5, 6) for number in range(3)])
        case = Case(torch.zeros(1, 64, 64), masks, masks, "a")
        without, with_names = (grid([case], class_names=names) for names in ([], ["oedema", "core", "cyst"]))
        assert with_names.height == without.height + LINE
        assert with_names.width == without.width
        line = np.asarray(with_names)[:LINE]
        starts = [np.argwhere((line == colour).all(axis=-1))[:, 1].min() for colour in (ORANGE, BLUE, GREEN)]
        assert starts == sorted(starts)
        assert (np.asarray(with_names)[LINE:] == np.asarray(without)).all()

    def test_long_legend_takes_several_lines(self):
        masks = torch.zeros(30, 64, 64, dtype=torch.bool)
        case = Case(torch.zeros(1, 64, 64), masks, masks, "")
        names = [f"the name of class {number}" for number in range(29)] + ["of " * 200]
        drawn, without = grid([case], class_names=names), grid([case])
        assert (drawn.height - without.height) % LINE == 0
        assert 4 * LINE < drawn.height - without.height < 10 * LINE
        assert (np.asarray(drawn)[:, -GAP:] == 255).all()  # nothing runs over the edge

    @pytest.mark.parametrize("caption", ["\udce4.tif   Dice 1", "line 1\nline 2", "folder/" * 100 + "a.tif   Dice 1"])
    def test_any_caption_is_one_line_within_the_picture(self, caption: str):
        empty = torch.zeros(1, 512, 128, dtype=torch.bool)
        pixels = np.asarray(grid([Case(torch.zeros(1, 512, 128), empty, empty, caption)]))
        assert (pixels[:, -GAP:] == 255).all()
        below = pixels[LINE + 512 :]
        assert len(below) == LINE + 2 * GAP
        assert (below[-2 * GAP :] == 255).all()
        assert (below < 128).any()

    def drawn_caption(self, caption: str, path: str = "") -> np.ndarray:
        empty = torch.zeros(1, 512, 128, dtype=torch.bool)
        return np.asarray(grid([Case(torch.zeros(1, 512, 128), empty, empty, caption, path)]))[LINE + 512 :]

    def test_of_a_long_path_the_end_is_seen(self):
        """And all that stands around it, first of all the patient."""
        paths = ["folder/" * 100 + "a.tif", "folder/" * 90 + "a.tif", "folder/" * 100 + "b.tif"]
        drawn = [self.drawn_caption(f"anna   {path}   Dice 1", path) for path in paths]
        assert (drawn[0] == drawn[1]).all()
        assert (drawn[0] != drawn[2]).any()
        for patient, dice in (("ben", 1), ("anna", 2)):
            assert (self.drawn_caption(f"{patient}   {paths[0]}   Dice {dice}", paths[0]) != drawn[0]).any()

    def test_of_a_long_patient_the_beginning_is_seen(self):
        first, other_path, other_patient = (
            self.drawn_caption(f"{patient}{'patient ' * 90}   {path}   Dice 1", path)
            for patient, path in (("anna", "a"), ("anna", "b"), ("ben", "a"))
        )
        assert (first == other_path).all()
        assert (first != other_patient).any()

    def test_small_file(self):
        """Six cases of 256x256 pixels: smooth shapes in noise, as scans are."""
        generator = torch.Generator().manual_seed(0)
        cases = []
        for number in range(6):
            image = torch.rand(1, 3, 32, 32, generator=generator)
            image = torch.nn.functional.interpolate(image, size=(256, 256), mode="bicubic")[0]
            image += 0.02 * torch.randn(image.shape, generator=generator)
            image[:, :, :40] = image[:, :, -40:] = 0  # air
            cases.append(Case(image, square(256, 90, 80, 60), square(256, 95, 86, 60 + number), "case"))
        file = io.BytesIO()
        grid(cases).save(file, "PNG")
        assert file.tell() < 1.5e6

    @pytest.mark.parametrize("channels", [1, 2, 3, 5])
    def test_any_range_and_number_of_channels(self, channels: int):
        image = torch.linspace(-50, 700, 256).expand(channels, 256, 256)
        empty = torch.zeros(1, 256, 256, dtype=torch.bool)
        pixels = np.asarray(grid([Case(image, empty, empty, "")]))[LINE : LINE + LEAST_SIZE, GAP : GAP + LEAST_SIZE]
        assert pixels.min() == 0
        assert pixels.max() == 255
        assert (np.diff(pixels[0, :, 0].astype(int)) >= 0).all()

    def test_constant_image(self):
        empty = torch.zeros(1, 256, 256, dtype=torch.bool)
        assert grid([Case(torch.full((3, 256, 256), 7.0), empty, empty, "")]).size[0] > 3 * 256

    def test_captions_differ(self):
        empty = torch.zeros(1, 256, 256, dtype=torch.bool)
        first, second = (np.asarray(grid([Case(torch.zeros(1, 256, 256), empty, empty, text)])) for text in "ab")
        below = LINE + LEAST_SIZE
        assert (first[:below] == second[:below]).all()
        assert (first[below:] != second[below:]).any()


class Copies(nn.Module):
    """A module that marks bright pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * (images - 0.5)


def data(count: int = 7, empty: tuple[int, ...] = (0, 2)) -> DataLoader:
    masks = torch.stack([square(32, 4 + index, 6, 8) for index in range(count)]).float()
    masks[list(empty)] = 0
    return DataLoader(TensorDataset(masks.clone(), masks), batch_size=3)


@pytest.fixture
def captions(monkeypatch) -> list[list[str]]:
    """Record the captions of each picture."""
    pictures: list[list[str]] = []

    def recording(cases, **kwargs):
        pictures.append([case.caption for case in cases])
        return grid(cases, **kwargs)

    monkeypatch.setattr(mask_overlay, "grid", recording)
    return pictures


class TestCases:
    def test_spread_over_those_whose_mask_is_not_empty(self, tmp_path: Path, captions):
        trainer(callbacks=[MaskOverlay(num_cases=3)], default_root_dir=tmp_path).test(
            SegmentationTask(Copies()), data(), verbose=False
        )
        assert captions == [[f"case {number}   Dice 1.000   Hausdorff 0.0 px" for number in (1, 4, 6)]]

    @pytest.mark.parametrize(("num_cases", "count"), [(1, 20), (4, 3), (4, 7), (4, 8), (3, 24)])
    def test_spread_evenly(self, tmp_path: Path, captions, num_cases: int, count: int):
        overlay = MaskOverlay(num_cases)
        run = trainer(callbacks=[overlay], default_root_dir=tmp_path)
        for _ in range(2):  # the same ones every time
            run.test(SegmentationTask(Copies()), data(count, empty=()), verbose=False)
        assert captions[0] == captions[1]
        drawn = [int(caption.split()[1]) for caption in captions[0]]
        assert drawn == sorted(set(drawn))
        assert len(drawn) == min(num_cases, count)
        steps = [after - before for before, after in itertools.pairwise(drawn)]
        assert not steps or max(steps) <= 2 * min(steps)
        assert drawn[-1] + (max(steps) if steps else count) >= count - 1

    def test_keeps_no_batch(self, tmp_path: Path, monkeypatch):
        drawn: list[Case] = []
        monkeypatch.setattr(mask_overlay, "grid", lambda cases, **_: drawn.extend(cases) or grid(cases))
        trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
            SegmentationTask(Copies()), data(), verbose=False
        )
        for case in drawn:
            for part in (case.image, case.truth, case.preds):
                assert part.untyped_storage().nbytes() == part.nbytes

    def test_chosen(self, tmp_path: Path, captions):
        trainer(callbacks=[MaskOverlay(cases=[6, 0])], default_root_dir=tmp_path).test(
            SegmentationTask(Copies()), data(), verbose=False
        )
        assert captions == [["case 0   both empty", "case 6   Dice 1.000   Hausdorff 0.0 px"]]

    @pytest.mark.parametrize(
        ("said", "title"),
        [
            ({"name": ["p/a.tif"], "patient": ["anna"], "slice": [7]}, "anna   slice 7"),
            ({"name": ["p/a.tif"], "patient": ["anna"]}, "anna   p/a.tif"),
            ({"patient": ["anna"]}, "anna   case 0"),
            ({"name": ["p/a.tif"], "slice": [7]}, "slice 7   p/a.tif"),
            ({"name": ["p/a.tif"]}, "p/a.tif"),
            ({"slice": [7]}, "case 0   slice 7"),
            ({}, "case 0"),
        ],
    )
    @pytest.mark.parametrize("is_dictionary", [True, False])
    def test_are_named(self, tmp_path: Path, captions, said: dict[str, Any], title: str, is_dictionary: bool):
        (mask,) = square(32, 4, 4, 8)
        mask = mask.float()[None, None]
        batch = {"image": mask, "label": mask, **said} if is_dictionary else (mask, mask, said)
        trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
            SegmentationTask(Copies()), DataLoader([batch], batch_size=None), verbose=False
        )
        assert captions == [[f"{title}   Dice 1.000   Hausdorff 0.0 px"]]

    @pytest.mark.parametrize(("classes", "expected"), [(1, []), (3, ["oedema", "core", "cyst"]), (2, ["0", "1"])])
    def test_legend_has_the_names_of_the_classes(self, tmp_path: Path, monkeypatch, classes: int, expected: list[str]):
        legends: list[list[str]] = []
        monkeypatch.setattr(mask_overlay, "grid", lambda cases, class_names: legends.append(class_names) or grid(cases))
        masks = square(32, 4, 4, 8).float().expand(2, classes, 32, 32)
        task = SegmentationTask(Copies(), num_classes=classes)
        task.class_names = ["oedema", "core", "cyst"]
        trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
            task, DataLoader(TensorDataset(masks, masks)), verbose=False
        )
        assert legends == [expected]

    def test_scores_are_those_of_the_case(self, tmp_path: Path, captions):
        class Shifted(Copies):
            def forward(self, images):
                return super().forward(images.roll(3, dims=-1))

        trainer(callbacks=[MaskOverlay(num_cases=1)], default_root_dir=tmp_path).test(
            SegmentationTask(Shifted()), data(), verbose=False
        )
        assert captions == [[f"case 1   Dice {2 * 40 / 128:.3f}   Hausdorff 3.0 px"]]

    def test_nothing_is_drawn_without_cases(self, tmp_path: Path, captions):
        run = trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path)
        with pytest.warns(UserWarning, match="there is nothing to score"):
            run.test(SegmentationTask(Copies()), data(3, empty=(0, 1, 2)), verbose=False)
        assert captions == []
        assert list(tmp_path.iterdir()) == []

    def test_every_nth_epoch_and_no_sanity_check(self, tmp_path: Path, captions):
        run = trainer(
            callbacks=[MaskOverlay(every_n_epochs=2)], max_epochs=5, num_sanity_val_steps=2, default_root_dir=tmp_path
        )
        run.fit(SegmentationTask(Copies()), data(), data())
        assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["val-epoch=1.png", "val-epoch=3.png"]

    def test_always_outside_of_training(self, tmp_path: Path, captions):
        run = trainer(callbacks=[MaskOverlay(every_n_epochs=10)], default_root_dir=tmp_path)
        run.validate(SegmentationTask(Copies()), data(), verbose=False)
        run.test(SegmentationTask(Copies()), data(), verbose=False)
        assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["test.png", "val.png"]

    def test_slice_of_a_volume(self, tmp_path: Path, monkeypatch):
        drawn: list[Case] = []
        monkeypatch.setattr(mask_overlay, "grid", lambda cases, **_: drawn.extend(cases) or grid(cases))
        volume = torch.zeros(1, 1, 5, 32, 32)
        volume[0, 0, 1, 4:6, 4:6] = 1
        volume[0, 0, 3, 4:9, 4:9] = 1
        trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
            SegmentationTask(Copies()), DataLoader(TensorDataset(volume, volume)), verbose=False
        )
        assert torch.equal(drawn[0].truth, volume[0, :, 3].bool())
        assert torch.equal(drawn[0].image, volume[0, :, 3])
        assert drawn[0].caption == "case 0   plane 3   Dice 1.000   Hausdorff 0.0 px"


def draw(folder: Path, monkeypatch: pytest.MonkeyPatch, image: Tensor, mask: Tensor, **said: Any) -> Case:
    """Return how a single image of shape (1, C, ...) is drawn."""
    drawn: list[Case] = []
    monkeypatch.setattr(mask_overlay, "grid", lambda cases, **_: drawn.extend(cases) or grid(cases))
    trainer(callbacks=[MaskOverlay()], default_root_dir=folder).test(
        SegmentationTask(Copies()), DataLoader([(image, mask, said)], batch_size=None), verbose=False
    )
    return drawn[0]


def panel_of(case: Case) -> np.ndarray:
    """Return the pixels of the image without outlines."""
    pixels = np.asarray(grid([case]))
    below, beside = LINE + GAP + LINE + GAP, GAP
    return pixels[LINE : pixels.shape[0] - below + LINE, beside : beside + (pixels.shape[1] - 2 * GAP) // 3 - GAP]


# Voxel numbers along right, anterior and superior. In the files, these axes have any order and direction.
BODY = np.zeros((12, 8, 5), np.float32)
BODY[8:11, 5:7, 1:4] = 1  # to the right, in front
BODY[1, 1, 3] = 1  # on the left, behind: plane 3 has the largest mask
SPACING = (0.7, 0.9, 3.5)


class TestAxialPlane:
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    @pytest.mark.parametrize("turned", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
    @pytest.mark.parametrize("angle", [0.0, 0.3])
    def test_is_seen_as_radiologists_see_it(
        self, tmp_path: Path, monkeypatch, order: tuple[int, ...], turned: tuple[int, ...], angle: float
    ):
        """Whatever the order and the directions of the file's axes, also if they are oblique."""
        stored = np.flip(BODY, turned).transpose(order)
        directions = Rotation.from_euler("xyz", [angle, -angle, angle]).as_matrix() * np.array(SPACING)
        directions = (directions * [-1 if axis in turned else 1 for axis in range(3)])[:, order]
        affine = np.eye(4)
        affine[:3, :3] = directions
        volume = torch.from_numpy(stored.copy())[None, None]
        case = draw(tmp_path, monkeypatch, volume, volume, affine=affine[None], patient=["anna"], name=["x/a.nii.gz"])
        expected = torch.from_numpy(BODY[::-1, ::-1, 3].T.copy())  # columns to the left, rows to posterior
        assert torch.equal(case.image[0], expected)
        assert torch.equal(case.truth[0], expected.bool())
        assert torch.equal(case.preds[0], expected.bool())
        assert case.spacing == pytest.approx((0.9, 0.7))
        number = 1 if 2 in turned else 3
        assert case.caption == f"anna   axial plane {number}   x/a.nii.gz   Dice 1.000   Hausdorff 0.0 px"
        assert case.path == "x/a.nii.gz"

    def test_has_its_true_proportions(self, tmp_path: Path, monkeypatch):
        volume = torch.zeros(1, 1, 45, 31, 11)
        volume[:, :, 10:20, 10:20, 5] = 1
        case = draw(tmp_path, monkeypatch, volume, volume, affine=np.diag([0.7, 0.9, 3.5, 1.0])[None])
        panel = panel_of(case)
        height, width = panel.shape[:2]
        assert max(height, width) >= LEAST_SIZE
        assert width / height == pytest.approx(45 * 0.7 / (31 * 0.9), rel=0.01)
        bright = np.argwhere(panel[..., 0] == 255)
        high, wide = bright.max(axis=0) - bright.min(axis=0) + 1
        assert wide / high == pytest.approx(7 / 9, rel=0.02)

    def test_without_a_matrix(self, tmp_path: Path, monkeypatch):
        """The first axis is cut, and rows and columns stay as they are, in the proportions of the spacing."""
        volume = torch.from_numpy(BODY)[None, None]
        case = draw(tmp_path, monkeypatch, volume, volume, spacing=np.array([SPACING]))
        plane = int(BODY.sum(axis=(1, 2)).argmax())
        assert torch.equal(case.image[0], volume[0, 0, plane])
        assert case.spacing == SPACING[1:]
        assert case.caption.startswith(f"case 0   plane {plane}   ")

    def test_image_with_a_spacing(self, tmp_path: Path, monkeypatch):
        mask = square(32, 4, 4, 8).float()[None]
        panel = panel_of(draw(tmp_path, monkeypatch, mask, mask, spacing=np.array([[2.0, 1.0]])))
        assert panel.shape == (1 * LEAST_SIZE, LEAST_SIZE // 2, 3)

    @pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.diag([1, 1, 0, 1]), np.full((4, 4), np.nan)], ids=str)
    def test_matrix_without_a_meaning(self, tmp_path: Path, monkeypatch, affine: np.ndarray):
        volume = torch.from_numpy(BODY)[None, None]
        case = draw(tmp_path, monkeypatch, volume, volume, affine=affine[None])
        assert "   plane " in case.caption
        assert torch.equal(case.truth[0], volume[0, 0, int(BODY.sum(axis=(1, 2)).argmax())].bool())

    def test_wrong_spacing_makes_no_endless_picture(self, tmp_path: Path, monkeypatch):
        mask = square(32, 4, 4, 8).float()[None]
        panel = panel_of(draw(tmp_path, monkeypatch, mask, mask, spacing=np.array([[1e-9, 1.0]])))
        assert panel.shape[1] == 2048


class TestDestinations:
    def check_file(self, folder: str | None) -> np.ndarray:
        """Return the pixels of the file, which is there whatever the logger is."""
        with Image.open(Path(str(folder)) / "masks" / "val-epoch=0.png") as picture:
            assert len(Outlines(picture).of(ORANGE)) > 0
            return np.asarray(picture)

    def fit(self, logger: Logger | list[Logger] | bool, folder: Path) -> None:
        trainer(callbacks=[MaskOverlay()], logger=logger, default_root_dir=folder).fit(
            SegmentationTask(Copies()), data(), data()
        )

    def test_beside_the_logs(self, tmp_path: Path):
        logger = CSVLogger(tmp_path)
        self.fit(logger, tmp_path)
        with Image.open(Path(logger.log_dir) / "masks" / "val-epoch=0.png") as picture:
            assert len(Outlines(picture.convert("RGB")).of(ORANGE)) > 0

    def test_without_a_logger(self, tmp_path: Path):
        self.fit(False, tmp_path)
        assert (tmp_path / "masks" / "val-epoch=0.png").is_file()

    @pytest.mark.parametrize("kind", [TensorBoardLogger, type("Own", (TensorBoardLogger,), {})])
    def test_tensorboard(self, tmp_path: Path, monkeypatch, kind: type[TensorBoardLogger]):
        logger = kind(tmp_path)
        images: list[tuple[Any, ...]] = []
        monkeypatch.setattr(logger.experiment, "add_image", lambda *args: images.append(args))
        self.fit(logger, tmp_path)
        ((name, pixels, step),) = images
        assert (name, step) == ("val/masks", 3)
        assert pixels.dtype == torch.uint8
        assert len(Outlines(pixels.permute(1, 2, 0).numpy()).of(ORANGE)) > 0
        self.check_file(logger.log_dir)

    def test_weights_and_biases(self, tmp_path: Path):
        class WandbLogger(CSVLogger):
            def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
                self.logged = (key, len(images), step)

        logger = WandbLogger(tmp_path)
        self.fit(logger, tmp_path)
        assert logger.logged == ("val/masks", 1, 3)
        self.check_file(logger.log_dir)

    def test_mlflow(self, tmp_path: Path):
        class MLFlowLogger(CSVLogger):
            run_id = "a1b2"
            experiment = Mock()

        logger = MLFlowLogger(tmp_path)
        self.fit(logger, tmp_path)
        ((run_id, picture, path),) = [call.args for call in logger.experiment.log_image.call_args_list]
        assert (run_id, path) == ("a1b2", "val/masks-step=3.png")
        assert (np.asarray(picture) == self.check_file(logger.log_dir)).all()

    def test_comet(self, tmp_path: Path):
        class CometLogger(CSVLogger):
            experiment = Mock()

        logger = CometLogger(tmp_path)
        self.fit(logger, tmp_path)
        (call,) = logger.experiment.log_image.call_args_list
        assert call.kwargs == {"name": "val/masks", "step": 3}
        assert (np.asarray(call.args[0]) == self.check_file(logger.log_dir)).all()

    def test_several_loggers(self, tmp_path: Path):
        class CometLogger(CSVLogger):
            experiment = Mock()

        class MLFlowLogger(CometLogger):
            run_id = "a1b2"

        loggers = [CSVLogger(tmp_path), CometLogger(tmp_path), MLFlowLogger(tmp_path)]
        self.fit(loggers, tmp_path)
        assert CometLogger.experiment.log_image.call_count == 2
        self.check_file(loggers[0].log_dir)


def test_two_processes(tmp_path: Path):
    """One process draws, none waits for ever, and each writes the masks of its own images."""
    run_distributed(draw_and_write, tmp_path)
    drawn = sorted(path.name for path in (tmp_path / "logs" / "masks").iterdir())
    assert drawn == ["test.png", "val-epoch=0.png", "val-epoch=1.png"]
    written = tmp_path / "written"
    rows: list[dict[str, str]] = []
    for rank in (0, 1):
        with (written / f"scores-{rank}.csv").open(newline="", encoding="utf-8") as table:
            rows += csv.DictReader(table)
    expected = [f"patient {index}/image.tif" for index in range(3)] + [f"/scans/{index}/image.tif" for index in (3, 4)]
    assert sorted(row["image"] for row in rows) == sorted(expected)
    assert len({row["mask"] for row in rows}) == 5
    assert all((written / row["mask"]).is_file() for row in rows)


class TestOwnModule:
    class Module(LightningModule):
        def __init__(self, outputs: Any) -> None:
            super().__init__()
            self.outputs = outputs

        def test_step(self, batch: Any) -> Any:
            return self.outputs

    def test_that_returns_masks(self, tmp_path: Path, captions):
        masks = torch.stack([square(32, 4, 4, 8)] * 2)
        module = self.Module({"preds": masks, "target": masks})
        trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
            module, DataLoader(TensorDataset(torch.randn(2, 3, 32, 32)), batch_size=2), verbose=False
        )
        assert [caption[:8] for caption in captions[0]] == ["case 0  ", "case 1  "]

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda images: images,
            lambda images: {"image": images},
            lambda images: [images, "anything"],
            lambda images: (images, images[:, :1], {"name": ["a", "b"]}),
        ],
        ids=["Tensor", "dict", "list", "three"],
    )
    def test_whose_batches_hold_images(self, tmp_path: Path, captions, wrap: Callable[[Tensor], Any]):
        masks = torch.stack([square(32, 4, 4, 8)] * 2)
        batch = wrap(torch.randn(2, 3, 32, 32))
        trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
            self.Module({"preds": masks, "target": masks}), DataLoader([batch], batch_size=None), verbose=False
        )
        assert len(captions[0]) == 2

    def test_whose_batches_hold_none(self, tmp_path: Path):
        masks = torch.stack([square(32, 4, 4, 8)] * 2)
        module = self.Module({"preds": masks, "target": masks})
        with pytest.raises(TypeError, match=r"A batch is a dict of 'pixels', and images, .* are expected: let the"):
            trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
                module, DataLoader([{"pixels": torch.randn(2, 3, 32, 32)}], batch_size=None), verbose=False
            )

    @pytest.mark.parametrize(
        ("shape", "message"),
        [((3, 1, 32, 32), "for 2 images"), ((2, 1, 16, 16), r"images of shape \(2, 3, 32, 32\) and masks of shape")],
    )
    def test_whose_masks_have_another_shape(self, tmp_path: Path, shape: tuple[int, ...], message: str):
        masks = torch.ones(shape, dtype=torch.bool)
        module = self.Module({"preds": masks, "target": masks})
        with pytest.raises(ValueError, match=f"MaskOverlay draws .*{message}"):
            trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
                module, DataLoader([torch.randn(2, 3, 32, 32)], batch_size=None), verbose=False
            )

    @pytest.mark.parametrize("outputs", [None, {"preds": torch.zeros(1)}], ids=["nothing", "no target"])
    def test_that_returns_none(self, tmp_path: Path, outputs: Any):
        with pytest.raises(TypeError, match="a mapping with 'preds' and 'target'"):
            trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
                self.Module(outputs), data(), verbose=False
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_cases": 0}, "at least 1, got 0 and 1"),
        ({"every_n_epochs": 0}, "at least 1, got 6 and 0"),
        ({"cases": []}, "numbers that are at least 0"),
        ({"cases": [3, -1]}, "numbers that are at least 0"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MaskOverlay(**arguments)
