"""The pictures of the README and of docs/: all are shown, none is missing, and a script draws them."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.documents import REPOSITORY, links
from tests.processes import run_python

IMAGES = REPOSITORY / "docs/images"
DRAWN = sorted(IMAGES.glob("*"))
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def shown(page: Path) -> set[Path]:
    targets = {Path(os.path.normpath(page.parent / link)) for link in links(page)}
    return {target for target in targets if target.parent == IMAGES}


def test_pages_show_all_pictures_and_no_others() -> None:
    assert DRAWN
    assert set().union(*map(shown, PAGES)) == set(DRAWN)


def test_the_gallery_shows_all_pictures() -> None:
    assert shown(REPOSITORY / "docs/gallery.md") == set(DRAWN)


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.name)
def test_small_and_on_white(path: Path) -> None:
    assert path.stat().st_size <= 150_000
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 400 <= picture.width <= 2000
        assert picture.mode in ("RGB", "P")  # nothing is transparent, so a dark page does not show through
        assert picture.convert("RGB").getpixel((1, picture.height - 2)) == (255, 255, 255)


@pytest.mark.full
def test_the_script_draws_them(tmp_path: Path) -> None:
    arguments = ("--output", str(tmp_path), "--epochs", "1", "--threads", "1")
    process = run_python("-m", "benchmarks.pictures", *arguments, timeout=250, cwd=REPOSITORY)
    assert process.returncode == 0, process.stdout
    expected = {path.name for path in DRAWN}
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        assert "left out: compare-report.png" in process.stdout
        expected.remove("compare-report.png")
    assert {path.name for path in tmp_path.iterdir()} == expected
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= 150_000
    # These do not depend on a training, so they look the same wherever they are drawn.
    for name in ("training", "learning-rates", "centring", "compare-forest"):
        with Image.open(tmp_path / f"{name}.png") as new, Image.open(IMAGES / f"{name}.png") as old:
            assert new.size == old.size
