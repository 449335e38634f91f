"""Pictures of masks: what they show, where they go, and which cases are drawn."""

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm import MaskOverlay
from lightning_znorm.callbacks import masks
from lightning_znorm.callbacks.drawing import GAP, LEAST_SIZE, LINE, Case, grid, outline
from lightning_znorm.tasks import SegmentationTask
from tests.callbacks.ddp_masks import draw_and_write
from tests.distributed import run_distributed
from tests.dtypes import DEFAULTS, default_dtype
from tests.trainers import trainer

ORANGE, BLUE = (230, 159, 0), (86, 180, 233)


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
        case = Case(torch.randn(3, size, size), square(size, 10, 20, 30), square(size, 40, 50, 20), "case 0")
        slots = Outlines(grid([case])).of(ORANGE)
        panel = size * factor + GAP
        truth = slots[slots[:, 1] < GAP + 2 * panel]
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

    monkeypatch.setattr(masks, "grid", recording)
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
        monkeypatch.setattr(masks, "grid", lambda cases: drawn.extend(cases) or grid(cases))
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
        monkeypatch.setattr(masks, "grid", lambda cases: drawn.extend(cases) or grid(cases))
        volume = torch.zeros(1, 1, 5, 32, 32)
        volume[0, 0, 1, 4:6, 4:6] = 1
        volume[0, 0, 3, 4:9, 4:9] = 1
        trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
            SegmentationTask(Copies()), DataLoader(TensorDataset(volume, volume)), verbose=False
        )
        assert torch.equal(drawn[0].truth, volume[0, :, 3].bool())
        assert torch.equal(drawn[0].image, volume[0, :, 3])


class TestDestinations:
    def fit(self, logger: Logger | bool, folder: Path) -> None:
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
        assert not list(tmp_path.rglob("*.png"))

    def test_weights_and_biases(self, tmp_path: Path):
        class WandbLogger(CSVLogger):
            def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
                self.logged = (key, len(images), step)

        logger = WandbLogger(tmp_path)
        self.fit(logger, tmp_path)
        assert logger.logged == ("val/masks", 1, 3)
        assert not list(tmp_path.rglob("*.png"))


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

    @pytest.mark.parametrize("wrap", [lambda images: {"image": images}, lambda images: images], ids=["dict", "Tensor"])
    def test_whose_batches_begin_with_something_else(self, tmp_path: Path, wrap: Callable[[Tensor], Any]):
        masks = torch.stack([square(32, 4, 4, 8)] * 2)
        module = self.Module({"preds": masks, "target": masks})
        batch = wrap(torch.randn(2, 3, 32, 32))
        with pytest.raises(TypeError, match=f"images that a batch begins with, .* a {type(batch).__name__}: let the"):
            trainer(callbacks=[MaskOverlay()], default_root_dir=tmp_path).test(
                module, DataLoader([batch], batch_size=None), verbose=False
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
