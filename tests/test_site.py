"""The documentation site: it has every public name, builds without a warning, and can be read in a browser.

ZNORM_SITE names the folder of a site that is built already. `python -m tests.test_site FOLDER` builds one and writes
pictures of all its pages into the folder, to look at.
"""

import argparse
import functools
import http.server
import importlib.util
import inspect
import os
import re
import runpy
import shlex
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml

from lightning_znorm import ZNormCallback
from lightning_znorm.compare.command import make_parser
from tests.browser import CHROMIUM, Browser
from tests.processes import run_python
from tests.test_public_api import MODULES, SNAPSHOT

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMES = sorted({line.split()[0] for line in SNAPSHOT.read_text(encoding="utf-8").splitlines()})
PHONE, DESK = 400, 1280


def described() -> list[str]:
    """Return the names that the pages of the reference describe."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md"))]
    return [name for page in pages for name in re.findall(r"^\.\. auto\w+:: (\S+)$", page, flags=re.MULTILINE)]


class TestReference:
    def test_has_each_public_name_once(self) -> None:
        names = described()
        assert len(names) == len(set(names))
        # The callbacks are public under two names, and described under the shorter one.
        wanted = {re.sub(r"^lightning_znorm\.callbacks\.", "lightning_znorm.", name) for name in NAMES}
        assert set(names) == wanted

    def test_has_each_name_of_the_modules(self) -> None:
        """New names are not in tests/public_api.txt before `python -m tests.test_public_api` is run."""
        public = {f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__}
        public -= {name for name in public if name.startswith("lightning_znorm.callbacks.")}
        assert public == set(described())


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return the commands of pages on measurements that run a program of benchmarks/ or examples/."""
    found: dict[str, None] = {}
    for page in ("imbalance.md", "performance.md", "reliability.md", "stability.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        for line in [*lines, *spans]:
            if match := re.search(r"\b(?:python|sh)\s(?:-m\s)?(?:benchmarks|examples)\b[^#]*", line):
                found[" ".join(match[0].split())] = None
    return list(found)


class ReadOptions(Exception):
    """A program has read its options, and would begin."""


def check_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program read its options, and raise what it raises if one is wrong."""
    program, *arguments = shlex.split(command)
    module = arguments[0] == "-m"
    name, *options = arguments[module:]
    path = ROOT / (name.replace(".", "/") + ".py" if module else name)
    source = path.read_text(encoding="utf-8")
    if program == "sh":  # it hands its options on
        assert '"$@"' in source
        needed = ["--config", "a.yaml", "--methods", "b.yaml", "--metric", "test/loss", "--output", "c"]
        assert make_parser("compare").parse_known_args([*needed, *options])[1] == []  # others are those of fit
        return
    if "parse_args" not in source:
        assert not any(option.startswith("-") for option in options)
        inspect.signature(runpy.run_path(str(path))["main"]).bind(*options)
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser) -> None:
        parse(self)
        raise ReadOptions

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    with pytest.raises(ReadOptions):
        runpy.run_path(str(path), run_name="__main__")


class TestBlocks:
    """Pages that are written for the site alone: the others have tests of their own."""

    def test_three_lines(self) -> None:
        (code,) = blocks("index.md", "python")
        names: dict[str, Any] = {}
        exec(compile(code, "docs/index.md", "exec"), names)
        assert any(isinstance(callback, ZNormCallback) for callback in names["trainer"].callbacks)

    @pytest.mark.parametrize("command", commands())
    def test_commands(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """They take long, and tests/compare runs what the scripts do, smaller: here, they read their options."""
        check_command(command, monkeypatch)

    @pytest.mark.parametrize(
        ("command", "fault"),
        [
            ("python -m benchmarks.kernels --no-such-option", SystemExit),
            ("python -m benchmarks.no_such_program", FileNotFoundError),
            ("python -m examples.imbalance.report a b c", TypeError),
            ("python examples/stability/report.py --no-such-option", AssertionError),
            ("sh examples/stability/paper_networks.sh --no-such-option 6", AssertionError),
        ],
    )
    def test_wrong_commands(self, command: str, fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(fault):
            check_command(command, monkeypatch)


# A name of ours as code, in one pair of backticks or two.
CODE = re.compile(r"(?<!`)(`{1,2})~?(lightning_znorm(?:\.\w+)+)(?:\([^`]*\))?\1(?!`)")


def test_names_that_are_written_as_code_exist() -> None:
    """Sphinx looks up references alone. Names in backticks are these: of modules, their attributes, and members."""
    path = DOCS / "_extensions/internal_names.py"
    spec = importlib.util.spec_from_file_location("internal_names", path)
    assert spec is not None
    assert spec.loader is not None
    internal_names = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(internal_names)
    files = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "lightning_znorm").rglob("*.py")]
    found = [(path.name, name[2]) for path in files for name in CODE.finditer(path.read_text(encoding="utf-8"))]
    assert len(found) > 30
    assert [(file, name) for file, name in found if not internal_names.exists(name)] == []
    for wrong in ("lightning_znorm.data.no_such_module", "lightning_znorm.ZNormCallback.no_such_member"):
        assert CODE.search(f"a `{wrong}` and")
        assert CODE.search(f"``{wrong}(1)``")
        assert not internal_names.exists(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](b.md#c)", "[a](<b.md> #c)"),
        ("![a](b.png 'Title')", "![a](<b.png>! 'Title')"),
        ("[![a](b.png)](c.md)", "[![a](<b.png>!)](<c.md>)"),
        ("[`code`](b.md)", "[`code`](<b.md>)"),
        ('<a class="x" href="b.md"><img src="c.png">', '<a class="x" href="<b.md>"><img src="<c.png>!">'),
        ("[a]: b.md\n[^1]: c.md", "[a]: <b.md>\n[^1]: c.md"),
        ("a ` tick\n\n[a](b.md) `", "a ` tick\n\n[a](<b.md>) `"),
        *((text, text) for text in ("[a](#b)", "[a](https://b.c/d)", "[a](//b.c/d)", "[a](mailto:b@c.d)")),
        *((text, text) for text in ("`[a](b.md)`", "``[a](`b`)``", "```\n[a](b.md)\n```", "~~~\n```\n[a](b)\n~~~")),
    ],
)
def test_links_of_markdown(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    rewritten = importlib.import_module("markdown_links").rewritten

    def address(link: Any) -> str:
        place = f" {link.fragment}" if link.fragment else ""
        return f"<{link.target.name}>{place}{'!' if link.is_image else ''}"

    assert rewritten(text, ROOT / "README.md", address) == expected


def test_citation_says_what_the_file_says() -> None:
    page = " ".join((DOCS / "citation.md").read_text(encoding="utf-8").split())
    software = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = software["references"]
    (author,) = paper["authors"]
    texts = [software[key] for key in ("title", "version", "license")] + [
        paper[key] for key in ("title", "year", "url")
    ]
    texts += [software["authors"][0]["name"], f"{author['family-names']}, {author['given-names']}"]
    texts.append(paper["identifiers"][0]["value"])
    assert [text for text in texts if f"{{{text}}}" not in page and f" {text}}}" not in page] == []


def build(source: Path, output: Path, *arguments: str) -> str:
    """Build a site with the settings of docs/, and return what Sphinx says; the last line is the exit status."""
    pytest.importorskip("sphinx", reason="needs Sphinx: pip install -e '.[docs]'")
    command = ("-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", "-c", DOCS)
    process = run_python(*command, *arguments, source, output, timeout=200, cwd=ROOT)
    return f"{process.stdout}{process.returncode}"


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Sphinx says about a page with mistakes, and about correct lines beside them."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "index.md").write_text(
        "# A page\n\n"
        "{class}`lightning_znorm.ZNormCalback` {func}`lightning_znorm.functional.atach` {mod}`lightning_znorm.tsks`\n"
        "{class}`torch.Tensor` {mod}`lightning_znorm.batches` {class}`lightning_znorm.gradients.slots.GradientSlot`\n\n"
        "[a](no-page.md) [b](#no-heading) [c](no/file.py) [d](#a-page)\n\n"
        "![e](no-picture.png)\n\n"
        r"$\nosuchcommand{g}$ and $\frac{g - \mu}{\sigma}$" + "\n"
    )
    return build(folder, folder / "built")


@pytest.mark.full
class TestMistakes:
    @pytest.mark.parametrize(
        "wrong",
        [
            "lightning_znorm.ZNormCalback",
            "lightning_znorm.functional.atach",
            "lightning_znorm.tsks",
            "no-page.md",
            "no-heading",
            "no/file.py",
            "no-picture.png",
            "nosuchcommand",
        ],
    )
    def test_are_refused(self, mistakes: str, wrong: str) -> None:
        assert wrong in mistakes

    def test_nothing_else_is_refused(self, mistakes: str) -> None:
        assert mistakes.count("WARNING") == 8, mistakes
        assert mistakes.endswith("1")


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.pictures_without_text = 0
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: text or "" for name, text in attributes}
        self.places.update(found[name] for name in ("id", "name") if found.get(name))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link":
            self.loaded += [found["href"]] if found.get("rel") not in ("canonical", "prefetch") else []
        elif tag in ("img", "script", "iframe", "source", "object", "video", "audio"):
            self.loaded += [found[name] for name in ("src", "data") if found.get(name)]
        self.pictures_without_text += tag == "img" and "alt" not in found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if built := os.environ.get("ZNORM_SITE"):
        return Path(built).resolve()
    folder = tmp_path_factory.mktemp("site")
    said = build(DOCS, folder)
    assert said == "0", said
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in pages(site)}


@pytest.mark.full
class TestBuilt:
    def test_each_link_and_file_exists(self, site: Path, parsed: dict[Path, Page]) -> None:
        broken, checked = [], 0
        for path, page in parsed.items():
            for link in [*page.links, *page.loaded]:
                address, fragment = urldefrag(link)
                if urlsplit(address).scheme:
                    continue
                target = (path.parent / unquote(urlsplit(address).path)).resolve() if address else path
                checked += 1
                if not target.is_file() or not target.is_relative_to(site.resolve()):
                    broken.append(f"{path.relative_to(site)}: {link}")
                elif fragment and target in parsed and unquote(fragment) not in parsed[target].places:
                    broken.append(f"{path.relative_to(site)}: {link}, which names no place")
        assert checked > 1000
        assert broken == []

    def test_nothing_is_loaded_from_elsewhere(self, parsed: dict[Path, Page]) -> None:
        assert [link for page in parsed.values() for link in page.loaded if urlsplit(link).netloc] == []

    def test_links_leave_the_site_only_for_other_projects(self, parsed: dict[Path, Page]) -> None:
        """The repository has no address yet, and machines of ours are nobody's business."""
        outward = {urlsplit(link) for page in parsed.values() for link in page.links if urlsplit(link).scheme}
        assert {link.scheme for link in outward} <= {"https", "http", "mailto"}
        assert not [link for link in outward if "lightning-znorm" in link.path or link.hostname == "localhost"]

    def test_pictures_have_a_text(self, parsed: dict[Path, Page]) -> None:
        assert sum(page.pictures_without_text for page in parsed.values()) == 0

    def test_each_public_name_can_be_linked(self, parsed: dict[Path, Page]) -> None:
        places = {place for path, page in parsed.items() if path.parent.name == "reference" for place in page.places}
        assert set(described()) <= places

    def test_members_of_other_packages_are_left_out(self, parsed: dict[Path, Page]) -> None:
        places = {place for page in parsed.values() for place in page.places}
        assert "lightning_znorm.gradients.AffineMethod.affine" in places
        assert "lightning_znorm.tasks.ClassificationTask.load_from_checkpoint" not in places
        assert "lightning_znorm.ZNormCallback.on_train_start" not in places

    def test_what_is_returned_is_a_sentence(self, site: Path) -> None:
        """Napoleon takes words before a colon, in the first line under Returns, for a type."""
        for path in (site / "reference").glob("*.html"):
            returned = re.findall(
                r"Returns<span[^>]*>:</span></dt>\s*<dd[^>]*><p><em>", path.read_text(encoding="utf-8")
            )
            assert returned == [], path

    def test_pages_that_docstrings_name_are_links(self, site: Path, parsed: dict[Path, Page]) -> None:
        assert "../performance.html" in parsed[site / "reference/tasks.html"].links
        assert "../methods/adaptive-centring.html" in parsed[site / "reference/gradients.html"].links

    def test_formulas_are_drawn_without_a_script(self, site: Path) -> None:
        page = site / "reference/callbacks.html"
        assert re.search(r"<math [^>]*display=.block", page.read_text(encoding="utf-8"))
        assert not any("math" in script for script in Page(page).loaded)

    def test_files_outside_docs(self, site: Path) -> None:
        page = (site / "records/interruptions.html").read_text(encoding="utf-8")
        assert "<table" in page
        assert "benchmarks.cli_interruptions" in page
        how_to = (site / "how-to/own-module.html").read_text(encoding="utf-8")
        (copied,) = set(re.findall(r'href="\.\./(_downloads/\w+/gan\.py)"', how_to))
        assert (site / copied).read_bytes() == (ROOT / "examples/gan.py").read_bytes()
        assert 'href="../readme.html#what-works-today"' in (site / "methods/znorm.html").read_text(encoding="utf-8")


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve the site on this machine, and give its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


TOO_WIDE = """
[...document.querySelectorAll('body *')]
  .filter(element => element.getBoundingClientRect().right > window.innerWidth + 1)
  .filter(element => !element.closest('pre, .highlight, .table-wrapper, .math-block, .sidebar-drawer, .toc-drawer'))
  .map(element => element.tagName + ' ' + element.className + ' ' + element.textContent.trim().slice(0, 60)).slice(0, 3)
"""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with served(site) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium")
class TestInBrowser:
    def test_pages_fit_a_telephone_and_load_nothing_from_elsewhere(
        self, site: Path, address: str, browser: Browser
    ) -> None:
        faults = []
        for path in pages(site):
            name = path.relative_to(site).as_posix()
            browser.open(f"{address}/{name}", PHONE)
            if (width := browser.evaluate("document.documentElement.scrollWidth")) > PHONE:
                faults.append(f"{name} is {width} pixels wide: {browser.evaluate(TOO_WIDE)}")
            faults += [f"{name} cuts off {cut}" for cut in browser.evaluate(TOO_WIDE)]
            faults += [f"{name} asks for {url}" for url in browser.requested() if not is_local(url, address)]
            faults += [f"{name}: {complaint}" for complaint in browser.complaints()]
            undrawn = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
            faults += [f"{name} cannot draw {image}" for image in browser.evaluate(undrawn)]
        assert faults == []

    @pytest.mark.parametrize(
        ("words", "page"),
        [
            ("ZNormCallback", "reference/callbacks.html"),
            ("padding_idx", ""),
            ("Hausdorff", "reference/metrics.html"),
            ("resume", "reference/resuming.html"),
        ],
    )
    def test_search(self, address: str, browser: Browser, words: str, page: str) -> None:
        browser.open(f"{address}/search.html?q={words}")
        browser.wait_for("/\\d+ page|found/.test(document.querySelector('.search-summary')?.textContent ?? '')")
        found = browser.evaluate("[...document.querySelectorAll('ul.search li a')].map(link => link.href)")
        assert found
        assert any(page in link for link in found)
        assert browser.complaints() == []

    def test_formulas_have_a_size(self, address: str, browser: Browser) -> None:
        """A browser that cannot draw MathML shows a fraction as one line of text."""
        browser.open(f"{address}/reference/callbacks.html")
        heights = "[...document.querySelectorAll('mfrac')].map(fraction => fraction.getBoundingClientRect().height)"
        assert min(browser.evaluate(heights)) > 20

    @pytest.mark.parametrize("name", ["callbacks", "gradients", "metrics", "functional"])
    def test_formulas_are_whole_without_a_scroll_bar(self, address: str, browser: Browser, name: str) -> None:
        browser.open(f"{address}/reference/{name}.html")
        boxes = "[...document.querySelectorAll('.math-block')]"
        shown = f"{boxes}.map(box => [getComputedStyle(box).overflowY, box.scrollHeight - box.clientHeight])"
        assert all(shape == ["hidden", 0] for shape in browser.evaluate(shown))


def is_local(url: str, address: str) -> bool:
    return url.startswith((f"{address}/", "data:", "blob:"))


def draw(folder: Path) -> None:
    """Write pictures of all pages, on a telephone and on a desk, light and dark."""
    with tempfile.TemporaryDirectory() as built:
        said = build(DOCS, Path(built))
        if said != "0":
            sys.exit(said)
        with served(Path(built)) as address, Browser() as browser:
            for path in pages(Path(built)):
                name = path.relative_to(built).as_posix()
                for width in (PHONE, DESK):
                    browser.open(f"{address}/{name}", width)
                    browser.picture(folder / f"{name.removesuffix('.html').replace('/', '-')}-{width}.png")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
