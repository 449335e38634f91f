"""Files of decoded images: who may read them, and the errors of those who may not."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightning_znorm.data.array_file import ArrayFile, cached_array
from tests.data.somebody_else import as_somebody_else

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no modes")

SHAPE = (5, 4)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache folder that does not exist yet, in a folder where every user may make files."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    monkeypatch.chdir(tmp_path / "shared")
    return Path("cache")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def decoded(folder: Path, content: int = 7) -> ArrayFile:
    return cached_array("images", [], SHAPE, lambda array: array.fill(content), folder)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.usefixtures("umask")
class TestModes:
    @pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077, 0o000])
    def test_those_of_any_other_file(self, folder: Path, mask: int) -> None:
        os.umask(mask)
        file = decoded(folder / "of" / "two")
        Path("plain").touch()
        Path("plain folder").mkdir()
        assert mode(file.path) == mode(Path("plain")) == 0o666 & ~mask
        assert {mode(part) for part in (folder, folder / "of", folder / "of" / "two")} == {mode(Path("plain folder"))}
        assert os.umask(mask) == mask

    def test_from_the_beginning(self, folder: Path) -> None:
        seen = []

        def fill(array: np.ndarray) -> None:
            seen.extend((path.suffix, mode(path)) for path in folder.iterdir())
            array.fill(7)

        file = cached_array("images", [], SHAPE, fill, folder)
        assert seen == [(".part", 0o644)]
        assert list(folder.iterdir()) == [file.path]

    def test_another_user_finds_it(self, folder: Path) -> None:
        made = decoded(folder)
        with as_somebody_else():
            found = decoded(folder, content=8)
            assert found == made
            array, _ = found.map()
            assert (array == 7).all()

    def test_in_a_folder_that_takes_no_files(self, folder: Path) -> None:
        decoded(folder)
        folder.chmod(0o555)
        with as_somebody_else():
            assert (decoded(folder, content=8).map()[0] == 7).all()
            with pytest.raises(
                OSError, match=r"^cache takes no files \(Permission denied\): let cache_dir name a folder"
            ):
                cached_array("others", [], SHAPE, lambda array: array.fill(7), folder)
        folder.chmod(0o755)


def test_folder_in_place_of_the_file(folder: Path) -> None:
    path = decoded(folder).path
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=rf"{path} cannot be put in place \(.+\): delete what is there"):
        decoded(folder)
    assert list(folder.iterdir()) == [path]


class TestNotAllowed:
    ADVICE = (
        r"may not be read by this user \(Permission denied\): .* chmod a\+r .* or let cache_dir name a folder of your"
    )

    def test_file(self, folder: Path) -> None:
        path = decoded(folder).path
        path.chmod(0)
        with as_somebody_else(), pytest.raises(PermissionError, match=f"^{path} {self.ADVICE}"):
            decoded(folder)

    def test_folder(self, folder: Path) -> None:
        path = decoded(folder).path
        folder.chmod(0)
        with as_somebody_else(), pytest.raises(PermissionError, match=f"^{path} {self.ADVICE}"):
            decoded(folder)
        folder.chmod(0o755)

    def test_no_longer(self, folder: Path) -> None:
        """The file was readable when it was found, and is not when a worker process maps it later."""
        file = decoded(folder)
        file.path.chmod(0)
        with (
            as_somebody_else(),
            pytest.raises(OSError, match=r"cannot be read any more \(Permission denied\)") as caught,
        ):
            file.map()
        assert "put it back" not in str(caught.value)

    def test_in_place_of_a_file_that_is_somebody_elses(self, folder: Path) -> None:
        """Another user's incomplete file is in a folder where users may only delete their own files."""
        file = decoded(folder)
        file.path.write_bytes(b"half")
        folder.chmod(0o1777)
        with as_somebody_else():
            if os.geteuid() == os.getuid():
                pytest.skip("needs root, to be another user")
            with pytest.raises(OSError, match=f"^{file.path} cannot be put in place .*: delete .*, or let cache_dir"):
                decoded(folder)
        assert list(folder.iterdir()) == [file.path]
