"""docs/methods and the gallery: each block runs, and what they say of options and of the paper is so."""

import ast
import contextlib
import csv
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_znorm import GradientCentralizationCallback, SINGCallback, ZNormCallback
from lightning_znorm.cli import main
from lightning_znorm.functional import zscore_grads_
from tests.documents import OURS, REPOSITORY, broken_links, code_blocks, commands, run_command

METHODS = REPOSITORY / "docs/methods"
PAGES = [*sorted(METHODS.glob("*.md")), REPOSITORY / "docs/gallery.md"]
CARDS = [page for page in PAGES if page.parent == METHODS and page.stem != "index"]
CONFIGS = REPOSITORY / "configs"
# Most commands are on several pages.
COMMANDS = sorted({command for page in PAGES for command in commands(page)})
YAML = [pytest.param(code, id=page.stem) for page in PAGES for _, code in code_blocks(page, "yaml")]
TENSOR = re.compile(r"tensor\(.*?\]\)")


def names(pages: list[Path]) -> list[str]:
    return [page.stem for page in pages]


def test_a_card_for_each_method() -> None:
    assert names(CARDS) == [
        "adaptive-centring",
        "clipping",
        "gradient-centralization",
        "sing",
        "weight-decay",
        "znorm",
    ]
    text = (METHODS / "index.md").read_text(encoding="utf-8")
    for path in (CONFIGS / "methods").glob("*.yaml"):
        assert f"`{path.name}`" in text
    for card in CARDS:
        assert f"]({card.name})" in text


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_language_is_run_here(page: Path) -> None:
    assert {language for language, _ in code_blocks(page)} <= {"bash", "python", "yaml"}


@pytest.mark.parametrize("card", CARDS, ids=names(CARDS))
def test_parts_of_a_card(card: Path) -> None:
    titles = re.findall(r"^## (.*)$", card.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for part in ("How to use it", "When to use it", "Suggested settings", "What differs", "Technical details"):
        assert any(title.startswith(part) for title in titles), part
    assert titles[-1] == "Attribution"
    assert {"python", "yaml", "bash"} == {language for language, _ in code_blocks(card)}


def told(code: str) -> Iterator[list[str]]:
    """Yield the numbers in the comments that say what a line prints."""
    for comment in re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE):
        yield re.findall(r"-?\d+(?:\.\d*)?", TENSOR.search(comment)[0])


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for _, code in code_blocks(page, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        tensors = TENSOR.findall(re.sub(r"\s+", " ", printed.getvalue()))
        numbers = [list(map(float, re.findall(r"-?\d+(?:\.\d*)?", tensor))) for tensor in tensors]
        assert numbers == [list(map(float, comment)) for comment in told(code)]


def test_znorm_in_a_loop() -> None:
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    for _, code in code_blocks(METHODS / "znorm.md", "python"):
        exec(compile(code, "znorm.md", "exec"), namespace)
    for parameter in namespace["model"].parameters():
        assert parameter.grad.mean().abs() < 1e-6
        assert parameter.grad.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("code", YAML)
def test_yaml(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("method.yaml").write_text(code, encoding="utf-8")
    flags = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    main(["fit", "--config", str(CONFIGS / "digits/resnet20.yaml"), "--config", "method.yaml", *flags])


@pytest.mark.parametrize(("card", "file"), [("adaptive-centring", "znorm-adaptive"), ("weight-decay", "wd-1e-4")])
def test_yaml_is_that_of_the_file(card: str, file: str) -> None:
    ((_, code),) = code_blocks(METHODS / f"{card}.md", "yaml")
    assert f"(`configs/methods/{file}.yaml` holds the same)" in (METHODS / f"{card}.md").read_text(encoding="utf-8")
    assert yaml.safe_load(code) == yaml.safe_load((CONFIGS / f"methods/{file}.yaml").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("command", [command for command in COMMANDS if OURS.match(command)])
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(command, monkeypatch)


def test_the_other_commands_are_benchmarks() -> None:
    # tests/test_benchmarks.py runs them, and tests/test_pictures.py the one that draws the pictures.
    others = {command for command in COMMANDS if not OURS.match(command)}
    for page in PAGES:
        others.update(re.findall(r"`(python -m benchmarks\.\w+)`", page.read_text(encoding="utf-8")))
    assert "python -m benchmarks.learning_rates" in others
    for command in others:
        python, flag, module = command.split()
        assert (python, flag) == ("python", "-m")
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links(page: Path) -> None:
    assert broken_links(page) == []


def test_options_have_the_defaults_of_the_table() -> None:
    text = (METHODS / "znorm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| .*\bDefaults? (`[^`]+`(?:, `[^`]+`)*) \|$", text, flags=re.MULTILINE)
    written = {
        name: ast.literal_eval(default)
        for names, defaults in rows
        for name, default in zip(re.findall("`(.+?)`", names), re.findall("`(.+?)`", defaults), strict=True)
    }
    defaults = {name: parameter.default for name, parameter in inspect.signature(ZNormCallback).parameters.items()}
    assert written == defaults
    assert inspect.signature(zscore_grads_).parameters["eps"].default == defaults["eps"]


def test_options_of_the_others() -> None:
    znorm, gc, sing = (
        inspect.signature(callback).parameters
        for callback in (ZNormCallback, GradientCentralizationCallback, SINGCallback)
    )
    assert set(gc) == set(znorm) - {"eps", "centering"}
    assert set(sing) == set(znorm) - {"centering"}
    assert sing["eps"].default == 1e-8


def test_figures_of_the_paper() -> None:
    with (REPOSITORY / "examples/paper/reported/table1_cifar10.csv").open(encoding="utf-8") as file:
        next(file)  # where they are from
        reported = {(row["model"], row["method"]): row["test_accuracy"] for row in csv.DictReader(file)}
    for card, figures in {
        "znorm": [(model, method) for model in ("ResNet-56", "VGG-16", "Xception") for method in ("baseline", "znorm")],
        "clipping": [("ResNet-56", "clip"), ("ResNet-56", "baseline")],
        "weight-decay": [("ResNet-56", method) for method in ("wd-1e-3", "wd-1e-4", "baseline")],
    }.items():
        text = " ".join((METHODS / f"{card}.md").read_text(encoding="utf-8").split())
        found = re.findall(r"\b0\.7\d\d\b|\b0\.8\d\d\b", text)
        assert found == [reported[figure] for figure in figures], card


def test_learning_rates_are_those_of_the_benchmark() -> None:
    results = (REPOSITORY / "benchmarks/results/cpu.md").read_text(encoding="utf-8")
    printed = results[results.rindex("$ python -m benchmarks.learning_rates") :].partition("```")[0]
    rows = re.findall(r"^\| (?:Adam|SGD).*\|$", printed, flags=re.MULTILINE)
    assert len(rows) == 12
    assert "\n".join(rows) in (METHODS / "index.md").read_text(encoding="utf-8")
