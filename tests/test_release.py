"""The release step, .ci/release: which releases it refuses, and that no link of what it builds is relative."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_znorm

ROOT = Path(__file__).parents[1]
ADDRESS = "https://example.org/somebody/lightning-znorm"
VERSION = lightning_znorm.__version__

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, timeout=60)


def commit(folder: Path) -> None:
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "A commit")


def date(folder: Path) -> None:
    changelog = folder / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    changelog.write_text(re.sub(rf"^## \[{re.escape(VERSION)}\].*$", f"## [{VERSION}] - 2026-01-31", text, flags=re.M))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository that holds what the step looks at before it builds."""
    for name in (".ci/release", "docs/_extensions/markdown_links.py", "CHANGELOG.md", "lightning_znorm/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    date(tmp_path)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def release(folder: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, folder / ".ci/release", *arguments]
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=timeout)


def refused(folder: Path, *arguments: str) -> str:
    done = release(folder, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert not (folder / "dist").exists()
    return done.stderr


@pytest.mark.parametrize(
    "address",
    [
        "example.org/somebody/lightning-znorm",
        "http://example.org/somebody/lightning-znorm",
        "https://example/somebody",
        "https://example.org",
        "https://example.org/",
        "https://example.org/a b",
        "https://example.org/a?b",
        "https://user@example.org/a",
        "git@example.org:somebody/lightning-znorm.git",
        "https://example.org/somebody/lightning-znorm.git",
        "",
    ],
)
def test_refuses_what_is_no_address(small: Path, address: str) -> None:
    said = refused(small, address)
    assert re.match(r"error: '.*' is (no address|the address of a clone): give ", said)
    assert "GitHub" in said or "clone" in said


def test_refuses_a_dirty_tree(small: Path) -> None:
    (small / "new.py").touch()
    changelog = small / "CHANGELOG.md"
    changelog.write_text(changelog.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert refused(small, ADDRESS) == "error: the tree is dirty: commit or remove CHANGELOG.md, new.py.\n"


def test_refuses_a_version_without_changes(small: Path) -> None:
    (small / "lightning_znorm/__init__.py").write_text('__version__ = "99.1"\n')
    commit(small)
    assert refused(small, ADDRESS) == "error: CHANGELOG.md has no heading [99.1]: say there what is new.\n"


def test_refuses_an_unreleased_version(small: Path) -> None:
    changelog = small / "CHANGELOG.md"
    changelog.write_text(changelog.read_text(encoding="utf-8").replace("2026-01-31", "Unreleased"))
    commit(small)
    assert "put the date of the release there" in refused(small, ADDRESS)


def test_refuses_an_odd_ref(small: Path) -> None:
    assert refused(small, ADDRESS, "a b") == "error: 'a b' is no tag or branch.\n"
    assert refused(small, ADDRESS, "a..b").startswith("error: there is no tag or branch a..b")


def test_refuses_a_ref_that_is_not_there(small: Path) -> None:
    git(small, "branch", f"other-v{VERSION}")
    missing = f"error: there is no tag or branch v{VERSION}, to which links would point: git tag v{VERSION}.\n"
    assert refused(small, ADDRESS) == missing
    assert "no tag or branch HEAD" in refused(small, ADDRESS, "HEAD")


def test_refuses_a_ref_of_another_commit(small: Path) -> None:
    git(small, "tag", f"v{VERSION}")
    (small / "new.py").touch()
    commit(small)
    assert f"v{VERSION} is another commit than the one that is checked out" in refused(small, ADDRESS)


def test_refuses_old_files_in_dist(small: Path) -> None:
    git(small, "tag", f"v{VERSION}")
    (small / ".git/info/exclude").write_text("dist/\n")
    (small / "dist").mkdir()
    (small / "dist/old-1.0.tar.gz").touch()
    done = release(small, ADDRESS)
    assert done.returncode == 1
    assert "dist/ is not empty: move old-1.0.tar.gz away" in done.stderr
    assert [path.name for path in (small / "dist").iterdir()] == ["old-1.0.tar.gz"]


def test_usage(small: Path) -> None:
    for arguments in ([], ["--help"], [ADDRESS, "v1", "v2"]):
        done = release(small, *arguments)
        assert done.returncode == 2
        assert ".ci/release ADDRESS [REF]" in done.stderr
        assert "GitHub" in done.stderr


def links(text: str) -> Iterator[str]:
    """Yield the targets of the links and images of Markdown, outside of code."""
    text = re.sub(r"^(```|~~~).*?^\1[ \t]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(`+)[^\n]+?\1(?!`)", "code", text)
    yield from re.findall(r"\]\(([^)\s]+)", text)
    yield from re.findall(r'(?:src|srcset|href)="([^"]+)"', text)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which the step has run."""
    pytest.importorskip("build", reason="needs build: pip install -e '.[dev]'")
    pytest.importorskip("twine", reason="needs twine: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("repository")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("needs a clone: git lists no files here")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    date(folder)
    readme = folder / "README.md"
    odd = (
        '\n[here](#quick-start) ![curve](benchmarks/results/collectives.svg) <img src="LICENSE">\n```\n[x](y)\n```\n'
        "\n`[span](y)` and ``[span](`y`)``, [a name][name]\n\n[name]: docs/index.md#what-znorm-is-not 'Title'\n"
    )
    readme.write_text(readme.read_text(encoding="utf-8") + odd, encoding="utf-8")
    git(folder, "init", "--quiet")
    commit(folder)
    git(folder, "tag", f"v{VERSION}")
    done = release(folder, ADDRESS, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2
    return folder


@pytest.mark.full
class TestBuilt:
    def metadata(self, built: Path) -> str:
        (wheel,) = (built / "dist").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(f"lightning_znorm-{VERSION}.dist-info/METADATA").decode()

    def test_files(self, built: Path) -> None:
        names = [f"lightning_znorm-{VERSION}-py3-none-any.whl", f"lightning_znorm-{VERSION}.tar.gz"]
        assert sorted(path.name for path in (built / "dist").iterdir()) == names

    def test_links(self, built: Path) -> None:
        text = self.metadata(built)
        described = list(links(text))
        assert len(described) == len(list(links((built / "README.md").read_text(encoding="utf-8"))))
        pointed = 0
        for target in described:
            assert target.startswith(("https://", "#")), target
            if not target.startswith(ADDRESS):
                continue
            kind, ref, path = target.removeprefix(f"{ADDRESS}/").split("/", 2)
            assert ref == f"v{VERSION}"
            file = ROOT / path.partition("#")[0]
            assert file.exists(), target
            assert (kind == "tree") == file.is_dir(), target
            pointed += 1
        assert pointed >= 5
        assert f"![curve]({ADDRESS}/raw/v{VERSION}/benchmarks/results/collectives.svg)" in text
        assert f'<img src="{ADDRESS}/raw/v{VERSION}/LICENSE">' in text
        assert "[here](#quick-start)" in text
        assert "\n[x](y)\n" in text
        assert "\n`[span](y)` and ``[span](`y`)``, " in text
        assert f"\n[name]: {ADDRESS}/blob/v{VERSION}/docs/index.md#what-znorm-is-not 'Title'\n" in text

    def test_metadata(self, built: Path) -> None:
        text = self.metadata(built)
        assert f"\nProject-URL: Repository, {ADDRESS}\n" in text
        assert f"\nProject-URL: Changelog, {ADDRESS}/blob/v{VERSION}/CHANGELOG.md\n" in text
        with tarfile.open(next((built / "dist").glob("*.tar.gz"))) as archive:

            def read(name: str) -> str:
                file = archive.extractfile(f"lightning_znorm-{VERSION}/{name}")
                assert file is not None
                return file.read().decode()

            assert f"\nversion: {VERSION}\nrepository-code: {ADDRESS}\n" in read("CITATION.cff")
            assert all(target.startswith("https://") for target in links(read("CHANGELOG.md")))

    def test_the_repository_is_as_it_was(self, built: Path) -> None:
        done = subprocess.run(["git", "-C", built, "status", "--porcelain"], check=True, capture_output=True, text=True)
        assert done.stdout == ""  # dist/ is ignored

    def test_a_broken_link_is_refused(self, built: Path, tmp_path: Path) -> None:
        readme = built / "README.md"
        before = readme.read_text(encoding="utf-8")
        readme.write_text(before + "[gone](docs/gone.md)\n", encoding="utf-8")
        commit_tree(built)
        git(built, "tag", "broken")
        shutil.move(built / "dist", tmp_path)
        done = release(built, ADDRESS, "broken", timeout=240)
        shutil.move(tmp_path / "dist", built)
        readme.write_text(before, encoding="utf-8")
        commit_tree(built)
        assert done.returncode == 1
        assert "README.md links to docs/gone.md, which is not there: mend the link" in done.stderr


def commit_tree(folder: Path) -> None:
    """Commit what has changed, without the files that git ignores."""
    git(folder, "commit", "--quiet", "--all", "--message", "Another commit")
