"""Names and logs in a report are shown as what they are, in Markdown, in HTML and in figures."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written import written

from lightning_znorm.compare.formatting import Code
from lightning_znorm.compare.plots import forest, plot
from lightning_znorm.compare.report import Figure, ReportData, build_report, write_report
from lightning_znorm.compare.results import Measurement
from lightning_znorm.compare.statistics import Table, make_rows
from lightning_znorm.compare.study import Arm, Outcome, Plan, Study

NASTY = [
    "<script>alert(1)</script>",
    "<b>bold</b> <!-- gone --> </pre></code></td>",
    "a & b &amp; &#35; &copy;",
    "a|b||c \\| d \\\\| e|",
    "`code` ``more`` ` alone",
    "`",
    "``",
    "# heading",
    "trailing #",
    "- point",
    "+ point",
    "* point",
    "1. first",
    "2) second",
    "-",
    "---",
    "===",
    "***",
    "___",
    "> quote",
    "~~~",
    "~~struck~~ ~once~",
    "```\nfence\n```",
    "````\nlonger\n````\n```",
    "[x](javascript:alert(1))",
    "[x] (https://example.org) [x][x] [x][] [[x](y)](z) ![[x]](y)",
    "[^1] [^1]: note",
    "[^1]: note",
    "![x](https://example.org/x.png)",
    "[x]: https://example.org",
    "[ ] task",
    "<https://example.org>",
    "_a_ __init__ snake_case_name _",
    "*a* **b** a*b*c",
    "\\ \\* \\` a\\",
    "$a$ and $b$",
    "    indented",
    "\tindented",
    "two\nlines\n\n# three\n- four",
    "a\r\nb\rc",
    "ends with blanks  \nnext",
    "| a | b |\n| --- | --- |\n| c | d |",
    "\n\nblank lines first",
    "Züri ✓ 学",
    "",
]
UNSEEN = {  # what a reader would not see, or what would move the rest of the line
    "\x1b[31mred\x00": "␛[31mred␀",
    "\x02pair\x03 \x7f \x85": "␂pair␃ ␡ \\x85",
    "not \udcff UTF-8": "not \\udcff UTF-8",
    "a\u202etxt.exe": "a\\u202etxt.exe",
}
HARD = [*NASTY, *UNSEEN]
ANY = st.one_of(
    st.sampled_from(HARD),
    st.text(st.sampled_from("ab1 `*_#-+=|\\<>&;[](){}!~$.:\n\t\r\"'/"), max_size=30),
    st.text(st.sampled_from("a[]()!:\\` "), max_size=20),
    st.text(max_size=20),
)
IMAGES = {"svg": b"", "png": b""}


class Skeleton(HTMLParser):
    """Elements of a page with their text, without what differs between our HTML and that of rendered Markdown."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.alt: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alt.append(squeezed(dict(attrs)["alt"] or ""))
        self.found.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", ""))

    def handle_data(self, data: str) -> None:
        self.found.append(("text", data))

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", data))


def squeezed(text: str) -> str:
    """As a browser shows it outside of code blocks."""
    return re.sub(r"[ \t\n\r\f]+", " ", text).strip(" ")


def shown(text: str) -> str:
    return UNSEEN.get(text, text)


def rendered(markdown: str) -> str:
    """As GitHub renders it, raw HTML among it."""
    markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py: comes with rich 13 and later")
    html: str = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    return html


def parsed(html: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The elements, and the texts of images."""
    parser = Skeleton()
    parser.feed(html)
    parser.close()
    merged: list[tuple[str, str]] = []
    fence = False
    for tag, text in parser.found:
        if tag in ("pre", "/pre"):
            fence = tag == "pre"
        if (fence and tag in ("code", "/code")) or tag in ("img", "figure", "/figure", "thead", "tbody", "/tbody"):
            continue
        if tag == "/thead":  # Markdown makes no body without rows
            continue
        tag = tag.replace("figcaption", "p")
        if tag == "text":
            if merged and merged[-1][0] == "text":
                merged[-1] = ("text", merged[-1][1] + text)
                continue
            if not fence and not text.strip(" \n"):
                continue
        merged.append((tag, text))
    return [(tag, text) for tag, text in merged if tag != "text" or squeezed(text)], parser.alt


def elements(html: str) -> list[tuple[str, str]]:
    """Each element that holds text, with all the text in it; spaces as a browser shows them."""
    found, open_tag, text = [], "", ""
    for tag, data in parsed(html)[0]:
        if tag == "text":
            text += data
        elif tag in ("code", "/code"):
            continue
        elif tag.startswith("/"):
            if tag[1:] == open_tag:
                found.append((open_tag, text.strip("\n") if open_tag == "pre" else squeezed(text)))
            open_tag, text = "", ""
        else:
            if tag not in ("h1", "h2", "h3", "p", "li", "pre", "th", "td", "ul", "table", "tr"):
                found.append((tag, "which nobody wrote"))
            open_tag, text = tag, ""
    return [(tag, text) for tag, text in found if tag not in ("ul", "table", "tr")]


def body(html: str) -> str:
    return html.partition("<body>")[2].partition("</body>")[0]


ELEMENTS = """
{% call heading(1) %}{{ report.text }}{% endcall %}
{% call heading(3) %}{{ report.text | code }}{% endcall %}
{% call paragraph() %}{{ report.text }}{% endcall %}
{% call paragraph() %}as {{ report.text | code }}.{% endcall %}
{% call paragraph() %}{{ report.text }}{{ report.text | code }}{{ report.text }}{% endcall %}
{% call points() %}
{% call point() %}{{ report.text }}{% endcall %}
{% call point() %}{{ report.text | code }}: {{ report.text }}{% endcall %}
{% call point() %}last{% endcall %}
{% endcall %}
{{ code_block(report.text) -}}
{{ table([report.text, report.text | code], [[report.text, report.text | code], ["-", "+1"]], numbers=[1]) -}}
{{ figure(report.figure) -}}
{% call paragraph() %}the end{% endcall %}
"""
"""Every kind of element around a text, plain and as code."""


def values(text: str) -> dict[str, object]:
    return {"text": text, "figure": Figure("name", (Code(text), f" by epoch, {text}"), IMAGES)}


def expected_elements(text: str) -> list[tuple[str, str]]:
    """What a reader is to see of them."""
    line = squeezed(shown(text))
    log = re.sub(r"\r\n?", "\n", shown(text)).strip("\n")
    around = squeezed(f"as {line}.")
    three = re.sub(r"\r\n?|\n", " ", shown(text))
    return [
        ("h1", line),
        ("h3", line),
        ("p", line),
        ("p", around),
        ("p", squeezed(three * 3)),
        ("li", line),
        ("li", squeezed(f"{three}: {three}")),
        ("li", "last"),
        ("pre", log),
        *[(kind, line) for kind in ("th", "th", "td", "td")],
        ("td", "-"),
        ("td", "+1"),
        ("p", squeezed(f"{three} by epoch, {three}")),
        ("p", "the end"),
    ]


def without_edges(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Blanks at the edges of a code span are a matter of taste; an empty paragraph is none in Markdown."""
    return [(tag, re.sub(r"\s+", "", text)) for tag, text in found if text.strip() or tag in ("td", "th", "li")]


@pytest.mark.parametrize("text", HARD)
def test_everything_is_shown_as_what_it_is(text):
    expected = without_edges(expected_elements(text))
    assert without_edges(elements(rendered(written("md", ELEMENTS, **values(text))))) == expected
    assert without_edges(elements(body(written("html", ELEMENTS, text, **values(text))))) == expected


LOG = "{{ code_block(report.text) -}}"


@pytest.mark.parametrize("text", HARD)
def test_code_blocks_keep_every_blank(text):
    lines = f"  first\n\n{text}\n    last"
    expected = [("pre", re.sub(r"\r\n?", "\n", f"  first\n\n{shown(text)}\n    last"))]
    assert elements(rendered(written("md", LOG, text=lines))) == expected
    assert elements(body(written("html", LOG, "title", text=lines))) == expected


def test_a_log_that_begins_with_an_empty_line():
    assert "<pre>\n\n\nlast</pre>" in written(
        "html", LOG, text="\n\nlast"
    )  # HTML drops the first line break of a <pre>


SIDE_BY_SIDE = """
{% call heading(2) %}{{ report.one }} {{ report.other | code }}{% endcall %}
{% call paragraph() %}{{ report.one | code }}: {{ report.other }}{% endcall %}
{% call points() %}
{% call point() %}{{ report.one }}: {{ report.other | code }}{% endcall %}
{% call point() %}{{ report.other }}{% endcall %}
{% endcall %}
{{ table([report.one, report.other | code], [[report.cell, report.together | code]]) -}}
{{ code_block(report.lines) -}}
{{ figure(report.figure) -}}
"""


@pytest.mark.full
@settings(max_examples=300, deadline=None)
@given(one=ANY, other=ANY)
def test_any_texts_side_by_side(one, other):
    """Nothing begins in one text and ends in another, and the two files have the same elements and code spans."""
    figure = Figure("name", (Code(one), f", {other}"), IMAGES)
    cell = (f"{one} ", Code(other))
    both = {"one": one, "other": other, "together": f"{one}{other}", "lines": f"{one}\n{other}"}
    markdown = rendered(written("md", SIDE_BY_SIDE, **both, figure=figure, cell=cell))
    html = body(written("html", SIDE_BY_SIDE, one, **both, figure=figure, cell=cell))
    assert without_edges(elements(markdown)) == without_edges(elements(html))
    assert [tag for tag, _ in parsed(markdown)[0] if tag == "code"] == [
        tag for tag, _ in parsed(html)[0] if tag == "code"
    ]
    (seen,), (read,) = parsed(markdown)[1], parsed(html)[1]
    assert re.sub(r"\s+", "", seen) == re.sub(r"\s+", "", read)


def test_plain_texts_stay_readable():
    """Only what means something is escaped: a report is read as a file, too."""
    for text in ("val_loss of znorm-0 is 1.5 (+0.2, -5 %).", "it's 3 x 4: a/b, c=d; 2 + 3", "a > b", "Is it? Yes!"):
        assert written("md", "{% call paragraph() %}{{ report.text }}{% endcall %}", text=text) == f"{text}\n"
    for cell in ("trainer.callbacks[1].class_path", "[0.9, 0.999]", "-", "+0.1"):
        assert written("md", "{{ table([report.cell], []) -}}", cell=cell) == f"| {cell} |\n| --- |\n"
    sentence = '{% call paragraph() %}the {{ "val/loss" | code }}.{% endcall %}'
    assert written("md", sentence) == "the `val/loss`.\n"


def a_study(folder: Path, name: str, **kept: object) -> ReportData:
    """A report in which everything that is a user's is the name."""
    study = Study(("exp.yaml",), ("m/baseline.yaml", "m/x.yaml"), (0, 1), folder)
    for field, value in (("configs", (f"{name}.yaml",)), ("args", ("--model.name", name))):
        object.__setattr__(study, field, value)  # also such as `compare` refuses
    trainer = {"callbacks": [], "gradient_clip_val": name, "accumulate_grad_batches": name}
    plan = Plan(
        study,
        {"baseline": {"trainer": trainer}, name: {"trainer": {}, "data": {name: name}}},
        (f"val/{name}", "max"),
        f"test/{name}",
        "max",
        [],
    )
    study.__dict__["arms"] = {method: Arm(method, f"m/{method}.yaml", (), method) for method in ("baseline", name)}
    fit = {
        "epochs": 1,
        "seconds": 1.0,
        "parameters": 1,
        "device": name,
        "threads": 1,
        "versions": {"python": name},
        "optimizers": [f"SGD({name})"],
        "schedulers": [f"StepLR({name})"],
        "methods": {"added": [name], "attached": [name]},
    }
    found = []
    for i, run in enumerate(study.runs):
        run = dataclasses.replace(run, folder=folder / str(i))
        study.__dict__["runs"][i] = run
        run.folder.mkdir(parents=True)
        run.fit_file.write_text(json.dumps(fit))
        tested = {"checkpoint": {"path": name, "epoch": 0, "monitor": name, "value": 1.0}, "metrics": {name: 1.0}}
        run.test_file.write_text(json.dumps(tested))
        for metric in (f"val/{name}", f"test/{name}", "train/loss", f"compare/gradient_norm-{name}"):
            found.append(Measurement(run.name, run.seed, run.method, 0, metric, 1.0 + i))
    failures = (Outcome(study.runs[0], f"fit failed\n{name}\nthe end"),)
    table = Table(plan.metric, tuple(make_rows(plan, found)), failures, folder)
    return build_report(plan, found, table, f"compare {name}", True)


@pytest.mark.parametrize("name", HARD)
def test_a_whole_report(name, tmp_path, monkeypatch):
    """Its two files have the same elements with the same texts."""
    for figure in ("plot", "forest"):
        monkeypatch.setattr(f"lightning_znorm.compare.report.{figure}", lambda *args: IMAGES)
    write_report(a_study(tmp_path, name), tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    markdown = rendered((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert without_edges(elements(markdown)) == without_edges(elements(body(html)))
    assert ("code", "") in parsed(markdown)[0]
    allowed = "html|head|meta|title|style|body|h[123]|p|ul|li|pre|code|table|thead|tbody|tr|th|td|figure|img|figcaption"
    assert not [tag for tag in re.findall(r"<(\w+)", html) if not re.fullmatch(allowed, tag)]


@pytest.mark.parametrize("name", [*UNSEEN, "$\\frac$", "$$", "-- a & <b> --", "two\nlines", ""])
@pytest.mark.filterwarnings("ignore:Glyph .* missing from")  # a font is no matter of the report's
def test_figures(name):
    """A name is no formula, and nothing makes an image that no program opens."""
    curves = plot({name: {0: {0: 1.0, 1: 2.0}}, "b": {0: {0: 1.0}}}, [name, "b"], name)
    differences = forest({name: [1.0, 2.0]}, {name: (0.5, 2.5)}, ["b", name], name, "max")
    for images in (curves, differences):
        assert images["png"].startswith(b"\x89PNG")
        ElementTree.fromstring(images["svg"])


def test_figures_of_names_that_are_alike_have_files_of_their_own(tmp_path, monkeypatch):
    names = ["a", "A", "x" * 300 + "1", "x" * 300]
    monkeypatch.setattr(
        "lightning_znorm.compare.report.curve_figures",
        lambda *args: [Figure(name, name, IMAGES | {"png": name[-5:].encode()}) for name in names],
    )
    for figure in ("plot", "forest"):
        monkeypatch.setattr(f"lightning_znorm.compare.report.{figure}", lambda *args: IMAGES)
    write_report(a_study(tmp_path, "b"), tmp_path)
    named = re.findall(r"\(figures/(.*)\)", (tmp_path / "report.md").read_text())[1:5]
    assert [(tmp_path / "figures" / name).read_bytes() for name in named] == [b"a", b"A", b"xxxx1", b"xxxxx"]
    assert len({name.casefold() for name in named}) == 4
