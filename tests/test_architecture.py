"""docs/architecture.md tells what each file is for, and what to touch to add something; it must stay true.

`python -m tests.test_architecture` writes the table of files anew, from the first lines of the files' docstrings.
"""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCUMENT = REPOSITORY / "docs/architecture.md"
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"


def sentence(path: Path) -> str:
    """Return the first line of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = docstring.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return re.sub(r":\w+:(?=`)", "", first).replace("``", "`")  # Markdown has neither roles nor double backticks


def table() -> str:
    """Return the table of files, from those at the top to the rooms in the order of the document."""
    package = REPOSITORY / "lightning_znorm"
    files = sorted(package.rglob("*.py"), key=lambda path: (len(path.relative_to(package).parts) > 1, path.as_posix()))
    rows = [f"| `{path.relative_to(package).as_posix()}` | {sentence(path)} |" for path in files]
    return "\n".join(["| file | what it is for |", "| --- | --- |", *rows, ""])


def test_each_file_is_in_the_table_with_its_own_words() -> None:
    written = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert written.strip() == table().strip(), "python -m tests.test_architecture writes it anew"


def test_each_file_says_what_it_is_for() -> None:
    for path in (REPOSITORY / "lightning_znorm").rglob("*.py"):
        words = sentence(path)
        assert 10 < len(words) <= 125, path
        assert words.endswith((".", "?")), path


def named_in_document() -> list[str]:
    named = re.findall(r"`((?:tests|examples|lightning_znorm|configs|docs)/[\w./-]+)(?:::\w+)?`", text())
    return sorted(set(named))


def text() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def test_files_that_are_named_exist() -> None:
    assert len(named_in_document()) >= 5
    for name in named_in_document():
        assert (REPOSITORY / name).exists(), name


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(tests/[\w./]+)::(\w+)`", text())
    assert len(named) >= 5
    for path, function in named:
        defined = (REPOSITORY / path).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {function}\b", defined, re.MULTILINE), function


@pytest.mark.parametrize("kind", ["method", "strategy", "data set", "metric", "report section"])
def test_what_to_touch_is_said_and_shown(kind: str) -> None:
    (row,) = re.findall(rf"^\| an? {kind} \| (.+) \| (.+) \|$", text(), re.MULTILINE)
    touched, shown = row
    assert "`" in touched
    assert re.search(r"`(tests|examples)/", shown)


if __name__ == "__main__":
    before, rest = text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
