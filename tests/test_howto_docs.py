"""docs/getting-started.md and docs/how-to/: every block runs, and what tables and sentences name is there.

test_segmentation_docs.py runs the Python of segmentation.md, test_volumes_cli.py that for volumes, and
many_machines/test_hosts.py the commands of many-machines.md.
"""

import ast
import functools
import itertools
import math
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_znorm import GradientTransform, ZNormCallback, compare
from lightning_znorm.cli import main
from lightning_znorm.compare.processes import Processes
from lightning_znorm.functional import transform_grads_
from tests.compare.captured import capture_here
from tests.data.jpegs import write_image_folder
from tests.fsdp import needs_fsdp2_on_cpu
from tests.medical import write_lgg, write_mask_folder
from tests.processes import run_forked, run_python
from tests.test_segmentation_docs import holds

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [DOCS / "getting-started.md", *sorted((DOCS / "how-to").glob("*.md"))]
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in PAGES}
BLOCKS = {
    page: re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL) for page, text in TEXTS.items()
}


def blocks(page: str, language: str) -> list[str]:
    return [code for block_language, code in BLOCKS[page] if block_language == language]


PYTHON = [page for page in BLOCKS if blocks(page, "python")]
YAML = [(page, number) for page in BLOCKS for number in range(len(blocks(page, "yaml")))]
COMMANDS = [
    (page, command)
    for page in BLOCKS
    if page != "many-machines"
    for code in blocks(page, "bash")
    for command in code.replace("\\\n", "").strip().split("\n")
]
OURS = [(page, command) for page, command in COMMANDS if command.startswith("python -m lightning_znorm ")]
OTHERS = [(page, command) for page, command in COMMANDS if (page, command) not in OURS]

pytestmark = [
    # What Lightning and transformers say about runs that are cut short, and about their own calls.
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`"),
]


def test_every_language_is_run_here() -> None:
    assert {language for page in BLOCKS.values() for language, _ in page} == {"bash", "python", "yaml"}
    # Directives of the site, ```{...}, are none of a language.
    fences = re.findall(r"^```(?!\{|$)", "\n".join(TEXTS.values()), flags=re.MULTILINE)
    assert len(fences) == sum(map(len, BLOCKS.values()))


# Python


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let every Trainer that does not say otherwise train on a few batches, on the CPU, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "ACCELERATOR": "cpu",
        "LIMIT_TRAIN_BATCHES": "4",
        "LIMIT_VAL_BATCHES": "1",
        "ENABLE_PROGRESS_BAR": "0",
        "ENABLE_MODEL_SUMMARY": "0",
    }.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    return tmp_path


def run(page: str, codes: list[str]) -> dict[str, Any]:
    """Run blocks of a page in one namespace, as a reader does who pastes them one after the other."""
    names: dict[str, Any] = {"__name__": page}
    torch.manual_seed(0)
    for code in codes:
        exec(compile(code, f"{page}.md", "exec"), names)
    return names


def check_getting_started(names: Mapping[str, Any]) -> None:
    assert any(isinstance(callback, ZNormCallback) for callback in names["trainer"].callbacks)


def check_own_module(names: Mapping[str, Any]) -> None:
    matches = names["callback"].parameter_filter
    assert [list(matches.include), list(matches.exclude)] == [["backbone.*"], ["*.bias"]]
    assert names["trainer"].global_step == 2 * 4
    module = names["TwoSteps"]()
    trainer = names["Trainer"](max_epochs=1, limit_val_batches=0, callbacks=[ZNormCallback()])
    trainer.fit(module, names["DigitsDataModule"]())
    for parameter in module.parameters():
        assert parameter.grad.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def check_look(names: Mapping[str, Any]) -> None:
    logged = names["trainer"].callback_metrics
    for name in set(re.findall(r"`(grad/\w+)`", TEXTS["look-at-gradients"])):
        assert name in logged
    assert list(Path("logs").rglob("gradients/*.png"))
    assert "grad/norm" in logged


def check_plain_torch(names: Mapping[str, Any]) -> None:
    for parameter in names["model"].parameters():
        assert parameter.grad.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def check_fabric(names: Mapping[str, Any]) -> None:
    gradients = {name: parameter.grad for name, parameter in names["model"].named_parameters()}
    assert set(gradients) == {f"_forward_module.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert gradients["_forward_module.0.weight"].std(correction=0).item() == pytest.approx(1, abs=1e-3)
    # The last attached method leaves a layer out, and a clipping that came before is undone.
    names["fabric"].backward(names["model"](torch.randn(32, 8)).square().mean())
    names["fabric"].clip_gradients(names["model"], names["optimizer"], max_norm=1e-3)
    left_out = gradients["_forward_module.2.bias"].clone()
    names["optimizer"].step()
    assert torch.equal(gradients["_forward_module.2.bias"], left_out)
    assert gradients["_forward_module.0.weight"].std(correction=0).item() == pytest.approx(1, abs=1e-3)


def check_transformers(names: Mapping[str, Any]) -> None:
    assert names["trainer"].state.global_step == 2
    with pytest.raises(TypeError, match="before it is wrapped"):
        names["attach"](names["optimizer"])  # which Accelerate has wrapped


def check_own_method(names: Mapping[str, Any]) -> None:
    assert isinstance(names["callback"], GradientTransform)
    assert names["callback"].method is torch.sign
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 7.0])
    transform_grads_(weight, names["RMSNorm"]())
    torch.testing.assert_close(weight.grad, torch.tensor([0.2, 1.4]))
    for gradient in (torch.zeros(2), torch.tensor([1e-25, -1e-25])):
        weight.grad = gradient
        transform_grads_(weight, names["RMSNorm"]())
        assert not weight.grad.isfinite().any()  # as the page warns
    assert names["RowNormCallback"](1e-3).method.eps == 1e-3


def check_own_data(names: Mapping[str, Any]) -> None:
    assert names["trainer"].callback_metrics["test/accuracy"] > 0.4
    assert names["trainer"].global_step == 5 * 4


CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "getting-started": check_getting_started,
    "own-module": check_own_module,
    "look-at-gradients": check_look,
    "plain-torch": check_plain_torch,
    "fabric": check_fabric,
    "transformers": check_transformers,
    "own-method": check_own_method,
    "own-data": check_own_data,
}
ELSEWHERE = {"segmentation", "compare", "gpus"}
VOLUMES = "VolumeDataModule.load_from_checkpoint"  # test_volumes_cli.py runs it


@pytest.mark.parametrize("page", CHECKS)
def test_python(page: str, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler takes half a minute; test_plain_torch_compiled runs it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    codes = [code for code in blocks(page, "python") if VOLUMES not in code]
    if page == "transformers":
        pytest.importorskip("transformers", reason="needs transformers: pip install '.[test]'")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of other packages about each other
            CHECKS[page](run(page, codes))
    else:
        CHECKS[page](run(page, codes))


@pytest.mark.full
def test_plain_torch_compiled(short: Path) -> None:
    check_plain_torch(run("plain-torch", blocks("plain-torch", "python")))


def test_python_of_every_page_is_run() -> None:
    assert set(PYTHON) == {*CHECKS, *ELSEWHERE}
    assert sum(VOLUMES in code for page in PYTHON for code in blocks(page, "python")) == 1


@needs_fsdp2_on_cpu
@pytest.mark.full
def test_fsdp2_program(short: Path) -> None:
    (code,) = blocks("gpus", "python")
    (short / "program.py").write_text(code)
    finished = run_python(short / "program.py", timeout=120, cwd=short)
    assert finished.returncode == 0, finished.stdout
    assert "`Trainer.fit` stopped: `max_epochs=2` reached" in finished.stdout


@pytest.mark.full
def test_study_from_python(short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = "--trainer.max_epochs=2 --trainer.limit_train_batches=12 --trainer.accelerator=cpu"
    monkeypatch.setattr(compare, "run", functools.partial(compare.run, args=args.split()))
    (code,) = blocks("compare", "python")
    names = run("compare", [code])
    row = names["row"]
    assert len(row.values) == 3
    assert math.isfinite(row.difference)
    assert row.verdict in capsys.readouterr().out
    assert row.p_value is not None
    assert len(row.differences) == len(row.counts) == 3
    assert (names["table"].chosen, names["table"].failures) == ({}, ())
    assert (short / "studies/digits/report.html").is_file()


# YAML

MY_PACKAGE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class MyModule(LightningModule):
    def __init__(self, lr: float):
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch):
        self.log("val/loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class MyData(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=4)

    val_dataloader = train_dataloader
"""
EXPERIMENTS = {
    "segmentation": "configs/lgg/attention-unet.yaml",
    "own-data": "configs/lgg/attention-unet.yaml",
    "yaml": "configs/digits/resnet20.yaml",
    "own-method": "configs/digits/resnet20.yaml",
    "gpus": "configs/digits/resnet20.yaml",
}


@pytest.fixture
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write the reader's own module, with the callback of own-method.md, into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    row_norm = [code for code in blocks("own-method", "python") if "assert" not in code]
    Path("my_package.py").write_text("\n".join([MY_PACKAGE, *row_norm]))
    yield
    sys.modules.pop("my_package", None)


@pytest.mark.parametrize(("page", "number"), YAML)
def test_yaml(page: str, number: int, my_package: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(page, "yaml")[number]
    written = yaml.safe_load(code)
    Path("block.yaml").write_text(code, encoding="utf-8")
    experiment = [] if "my_package.MyModule" in code else ["--config", EXPERIMENTS[page]]
    flags = [*experiment, "--config", "block.yaml"]
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *flags, "--print_config"])
    assert exit_info.value.code == 0
    assert holds(yaml.safe_load(capsys.readouterr().out), written)
    if page in ("yaml", "own-method"):  # the others need data, or devices, and are run as parts of experiments
        short = "--trainer.max_epochs 1 --trainer.limit_train_batches 4 --trainer.limit_val_batches 1"
        main(["fit", *flags, *short.split(), "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"])
        if not experiment:
            (folder,) = Path("logs/mine").iterdir()
            assert {path.name for path in folder.rglob("*.ckpt")} == {"best.ckpt", "last.ckpt"}


# Commands


@pytest.fixture
def data(fake_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts the data of a command into the folder ``data``."""
    monkeypatch.chdir(tmp_path)

    def put(command: str) -> None:
        root = Path("data")
        if "cifar10" in command:
            fake_cifar10.rename(root)
        elif "lgg" in command:
            write_lgg(root, patients=8)
        elif "configs/own" in command:
            write_mask_folder(root)
        elif "imagenet" in command:
            write_image_folder(root / "imagenet", classes=3, train=12, val=1)

    return put


SHORT = shlex.split(
    "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.limit_test_batches 1"
    " --trainer.limit_predict_batches 1 --trainer.num_sanity_val_steps 0 --trainer.accelerator cpu"
)
# So much slower, or impossible, without GPUs: only read.
NEEDS_GPUS = ("--trainer.devices", "compile true")


@pytest.mark.parametrize(
    ("page", "command"),
    OURS,
    ids=[f"{page}-{command.split()[3]}-{number}" for number, (page, command) in enumerate(OURS)],
)
def test_command(
    page: str,
    command: str,
    data: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = shlex.split(command)[3:]
    epochs = [] if "--trainer.max_epochs" in args else ["--trainer.max_epochs", "1"]
    if args[0] == "compare":
        if ">" in args:
            args = args[: args.index(">")]
        monkeypatch.setattr(Processes, "capture", capture_here)
        monkeypatch.setattr(Processes, "run", lambda self, args, log, *_, **__: run_forked(args, log))
        main([*args, *(["--dry-run"] if "--dry-run" not in args else []), "--trainer.accelerator", "cpu"])
        lines = [line for line in capsys.readouterr().out.splitlines() if "lightning_znorm" in line]
        values = args.index("--sweep") if "--sweep" in args else None
        sweep = 1 if values is None else len(list(itertools.takewhile(is_value, args[values + 2 :])))
        assert len(lines) == counted(args, "--methods") * counted(args, "--seeds") * sweep
    elif "--print_config" in args or any(words in command for words in NEEDS_GPUS):
        with pytest.raises(SystemExit) as exit_info:
            main([*args, *(["--print_config"] if "--print_config" not in args else [])])
        assert exit_info.value.code == 0
        resolved = yaml.safe_load(capsys.readouterr().out)
        for flag in ("trainer.devices", "trainer.strategy", "trainer.precision", "model.init_args.compile"):
            if f"--{flag}" in args:
                value = functools.reduce(lambda settings, key: settings[key], flag.split("."), resolved)
                assert str(value).lower() == args[args.index(f"--{flag}") + 1]
    else:
        data(command)
        if "--ckpt_path" in args:
            train_before(args)
        if "predict_root" in command:
            shutil.copytree(next(Path("data/kaggle_3m").iterdir()), "slices", ignore=shutil.ignore_patterns("*_mask*"))
        before = set(Path().rglob("*"))
        if args[0] == "fit" and "last" in args:
            epochs = ["--trainer.max_epochs", "2"]
        small = ["--data.init_args.image_size", "32"] if "configs/own" in command else []
        main([*args, *epochs, *SHORT, *small])
        written = {path.name for path in set(Path().rglob("*")) - before}
        assert written >= results(args, command), written


def is_value(word: str) -> bool:
    return not word.startswith("--")


def counted(args: list[str], option: str) -> int:
    return len(list(itertools.takewhile(is_value, args[args.index(option) + 1 :])))


def train_before(args: list[str]) -> None:
    """Write the checkpoint that a command names."""
    files = [words for flag, file in itertools.pairwise(args) if flag == "--config" for words in (flag, file)]
    main(["fit", *files, "--trainer.max_epochs", "1", *SHORT])
    path = Path(args[args.index("--ckpt_path") + 1])
    if path.suffix and not path.is_file():
        shutil.copy(next(Path().rglob("best.ckpt")), path)


def results(args: list[str], command: str) -> set[str]:
    """Return names of files that a command must have written."""
    if args[0] == "predict":
        return {"scores.csv", "masks"} if "predict_root" in command else {"predictions.pt"}
    if args[0] == "test":
        return {"config.yaml", "metrics.csv"}
    if "GradientMonitor" in command:
        return {"best.ckpt", "last.ckpt", "gradients", "grad_mean_share.png"}
    return {"best.ckpt", "last.ckpt", "config.yaml"}


def test_what_fit_writes_and_says(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/getting-started.md has a table of the files, and fit prints the command that tests the best checkpoint."""
    fit, test = (
        shlex.split(command)[3:]
        for page, command in OURS
        if page == "getting-started" and " --seeds" not in command and "GradientMonitor" not in command
    )
    main([*fit, "--trainer.max_epochs", "1", *SHORT])
    folder = Path("logs/digits-resnet20/version_0")
    files = set(re.findall(r"^\| `([\w./]+\.\w+)`", TEXTS["getting-started"], flags=re.MULTILINE))
    assert files == {str(path.relative_to(folder)) for path in folder.rglob("*.*")} - {"hparams.yaml"}
    said = capsys.readouterr().out
    (line,) = re.findall(r"^test it with +python -m lightning_znorm (.*)$", said, flags=re.MULTILINE)
    words = shlex.split(line)
    assert [*words[:5], *words[-2:]] == test


PAPER = [command for page, command in OTHERS if page == "reproduce"]


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell of the name sh")
@pytest.mark.parametrize("command", [command for command in PAPER if " sh " in f" {command}"])
def test_studies_of_the_paper(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each script hands compare what the page says, and `fit` knows the flags that the page adds to it."""
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["sh", "-c", command], env=environment, cwd=REPOSITORY, check=True, timeout=60)
    given = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".sh"))
    table = script.removeprefix("examples/paper/").removesuffix(".sh")
    chosen = [word.partition("=")[2].split() for word in words if word.startswith("MODELS=")]
    studies = {"table1_cifar10": 8, "table2_pcam": 3, "table3_lgg": 3, "digits_swept": 2, "cifar10_10k": 1}[table]
    assert len(given) == (len(chosen[0]) if chosen else studies)
    for args in given:
        assert args[:3] == ["-m", "lightning_znorm", "compare"]
        assert args[args.index("--output") + 1].startswith("studies/")
        further = words[words.index(script) + 1 :]
        assert args[len(args) - len(further) :] == further
        if "--data.init_args.download" in further:
            with pytest.raises(SystemExit) as exit_info:
                main(["fit", *args[3 : args.index("--methods")], *further, "--print_config"])
            assert exit_info.value.code == 0
            assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["download"] is True
        runs = counted(args, "--methods") * counted(args, "--seeds")
        if table.startswith("table"):
            assert f"a study of {runs} runs under `studies/`" in TEXTS["reproduce"]


@pytest.mark.parametrize("command", [command for command in PAPER if command.startswith("python")])
def test_tables_of_the_paper(command: str, short: Path) -> None:
    arguments = shlex.split(command)[1:]
    Path("studies").mkdir()
    finished = run_python(REPOSITORY / arguments[0], *arguments[1:], timeout=120, cwd=short)
    assert finished.returncode == 0, finished.stdout
    assert ("9,000 training images" in finished.stdout) == (len(arguments) == 1)


def messages() -> list[str]:
    """Return the texts in the package's code; what is filled in is a NUL."""
    texts = []
    for path in (REPOSITORY / "lightning_znorm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


QUOTED = re.findall(r"^\| `(.+?)` \| ", TEXTS["troubleshooting"], flags=re.MULTILINE)


@pytest.mark.parametrize("message", QUOTED)
def test_messages_of_the_table_are_in_the_code(message: str) -> None:
    # Pieces between the dots are in one text, in this order, and something is filled in between.
    pieces = [re.escape(piece.strip()) for piece in message.split("...")]
    pattern = re.compile(".*\0.*".join(pieces), flags=re.DOTALL)
    assert any(pattern.search(text) for text in messages())


def test_messages_are_quoted() -> None:
    assert len(QUOTED) > 10


def test_menu_has_the_order_of_the_table() -> None:
    table, menu = TEXTS["index"].split("```{toctree}")
    assert re.findall(r"\]\((\S+)\.md\) \|$", table, flags=re.MULTILINE) == re.findall(r"^[\w-]+$", menu, re.MULTILINE)


def test_other_commands() -> None:
    """Those of pip install what there is; a SLURM array runs each line of the file."""
    assert [command for page, command in OTHERS if not command.startswith("sbatch")] == [
        "python -m pip install .",
        "python -m pip install --no-deps .",
        *PAPER,
    ]
    extras = set(re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE))
    named = {extra for text in TEXTS.values() for extra in re.findall(r"pip install '[\w.-]*\[(\w+)\]'", text)}
    assert {"volumes", "deepspeed", "ray"} <= named <= extras


def test_array(tmp_path: Path) -> None:
    """A pretended sbatch runs the documented array, as SLURM would: each task in a shell with its number."""
    ((_, command),) = ((page, command) for page, command in OTHERS if command.startswith("sbatch"))
    lines = ["echo 'first, with  two spaces' >> done.txt", 'echo "second $SLURM_ARRAY_TASK_ID" >> done.txt']
    (tmp_path / "commands.txt").write_text("\n".join(lines) + "\n")
    pretended = tmp_path / "sbatch"
    pretended.write_text(
        "#!/bin/sh\n"
        'range=${1#--array=}; [ "$2" = --wrap ] || exit 1\n'
        'for task in $(seq "${range%-*}" "${range#*-}"); do SLURM_ARRAY_TASK_ID=$task sh -c "$3" || exit 1; done\n'
    )
    pretended.chmod(0o755)
    subprocess.run(["bash", "-c", f"PATH=.:$PATH; {command}"], cwd=tmp_path, check=True)
    assert (tmp_path / "done.txt").read_text().splitlines() == ["first, with  two spaces", "second 2"]


# Tables and names


def test_every_config_is_named() -> None:
    text = TEXTS["yaml"]
    named = set()
    for folder, stems in re.findall(r"^\| `configs/([\w-]+)/\{?([\w,-]+)\}?\.yaml`", text, flags=re.MULTILINE):
        named |= {f"{folder}/{stem}.yaml" for stem in stems.split(",")}
    (methods,) = re.findall(r"^Methods, in `configs/methods/`:(.*?)\. ", text, flags=re.MULTILINE | re.DOTALL)
    named |= {f"methods/{name}.yaml" for name in re.findall("`([^`]+)`", methods)}
    there = {str(path.relative_to(REPOSITORY / "configs")) for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert named == there


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks\.\w+)", "".join(TEXTS.values())))))
def test_benchmarks_are_there(module: str) -> None:
    # tests/test_benchmarks.py runs them.
    assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file()


def test_every_page_is_in_the_list_of_pages() -> None:
    assert {f"{page}.md" for page in BLOCKS} - {"index.md", "getting-started.md"} == set(
        re.findall(r"^\| .* \| \[.*\]\(([\w-]+\.md)\) \|$", TEXTS["index"], flags=re.MULTILINE)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_files_outside_the_pages_are_there(page: Path) -> None:
    for target in re.findall(
        r"\]\(((?:\.\./)+(?:examples|configs|benchmarks|tests|lightning_znorm)[^)#]*)", page.read_text()
    ):
        assert (page.parent / target).is_file(), target
