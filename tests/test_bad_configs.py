"""Config files with a mistake, and files that are no checkpoints: one sentence names the key or the file."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_znorm.cli import main
from lightning_znorm.cli.config_files import read_config
from lightning_znorm.cli.error_sentences import sentence

CONFIGS = Path(__file__).parents[1] / "configs"
DIGITS = CONFIGS / "digits/resnet20.yaml"
FILES = sorted(CONFIGS.rglob("*.yaml"))
CPU = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]


# Arguments whose keys only the data module knows, which names them: tests/test_own_data_cli.py.
FREE = {"mask_values", "train_transform"}


def keys(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key of nested mappings and lists."""
    if path and path[-1] in FREE:
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(node, dict):
            yield (*path, key)
        yield from keys(value, (*path, key))


def changed(content: Any, path: tuple[Any, ...], key: str | None = None, value: Any = None) -> Any:
    """Return a copy with another key, or another value, at the end of the path."""
    content = copy.deepcopy(content)
    node = content
    for step in path[:-1]:
        node = node[step]
    items = list(node.items())
    node.clear()
    node.update((key, old) if name == path[-1] and key else (name, value if name == path[-1] else old)
                for name, old in items)  # fmt: skip
    return content


def misspelt(key: str) -> str:
    bare = key.removesuffix("+")
    return bare[:-2] + bare[-1] + bare[-2] + key[len(bare) :] if bare[-1] != bare[-2] else f"{bare}s{key[len(bare) :]}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Return the line that says what is wrong; fail if the command is not refused, or says more than one line."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(map(str, args)))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if isinstance(exit_info.value.code, str):
        return exit_info.value.code
    assert exit_info.value.code == 2
    assert out == ""
    said = err[err.index("error: ") :].strip()
    assert "\n" not in said
    return said


def refused(capsys: pytest.CaptureFixture[str], content: Any, laid_over: Path | None, *flags: str) -> str:
    Path("mistaken.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    files = ["mistaken.yaml"] if laid_over is None else [laid_over, "mistaken.yaml"]
    return refusal(capsys, "fit", *(arg for file in files for arg in ("--config", file)), *flags)


IN_DEFAULT_TIER = ("digits", "methods")


def unique_mistakes() -> Iterator[Any]:
    """Yield each key of each file, without keys that an earlier file has too (there are 20 networks)."""
    seen = set()
    for file in sorted(FILES, key=lambda file: file.parent.name not in IN_DEFAULT_TIER):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for path in keys(content):
            classes = [
                node["class_path"] for node in nodes(content, path) if isinstance(node, dict) and "class_path" in node
            ]
            if (path, *classes) not in seen:
                seen.add((path, *classes))
                marks = [] if file.parent.name in IN_DEFAULT_TIER else pytest.mark.full
                name = f"{file.parent.name}/{file.stem}-{'.'.join(map(str, path))}"
                yield pytest.param(file, path, id=name, marks=marks)


def nodes(content: Any, path: tuple[Any, ...]) -> Iterator[Any]:
    for step in path:
        content = content[step]
        yield content


@pytest.mark.parametrize(("file", "path"), list(unique_mistakes()))
def test_misspelt_key(file: Path, path: tuple[Any, ...], capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    key = misspelt(path[-1])
    said = refused(capsys, changed(content, path, key=key), DIGITS if file.parent.name == "methods" else None)
    assert key in said
    assert "mistaken.yaml" in said


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed_everything", "abc", "seed_everything (mistaken.yaml) is abc, and bool or int is expected."),
        ("model", 3, "model (mistaken.yaml) is 3, and a LightningModule (class_path and init_args)"),
        ("model.class_path", "ClasificationTask", "there is no class ClasificationTask here"),
        ("model.init_args.model", 7, "model.model (mistaken.yaml) is 7, and str or"),
        ("model.init_args.in_chans", "one", "model.in_chans (mistaken.yaml) is one, and int is expected."),
        ("model.init_args.optimizer.class_path", "torch.optim.Adamm", "module 'torch.optim' has no attribute 'Adamm'"),
        ("model.init_args.optimizer.init_args.lr", "fast", "model.optimizer.lr (mistaken.yaml) is fast, and float is"),
        ("data.class_path", "DigitDataModule", "there is no class DigitDataModule here"),
        ("data.init_args.batch_size", [64], "data.batch_size (mistaken.yaml) is [64], and int is expected."),
        ("trainer", 3, "mistaken.yaml has trainer: 3, and `key: value` lines are expected there."),
        ("trainer", ["max_epochs"], "mistaken.yaml has trainer: ['max_epochs'], and"),
        ("trainer.max_epochs", "many", "trainer.max_epochs (mistaken.yaml) is many, and int or null is expected."),
        ("trainer.max_epochs", {}, "trainer.max_epochs (mistaken.yaml) is {}, and int or null is expected."),
        ("trainer.callbacks+", 3, "trainer.callbacks (mistaken.yaml) is 3, and a Callback (class_path and"),
    ],
)  # fmt: skip
def test_wrong_value(path: str, value: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(DIGITS.read_text(encoding="utf-8"))
    assert message in refused(capsys, changed(content, tuple(path.split(".")), value=value), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("callbacks+: [{class_path: ZNormCallback}]", "no setting callbacks+ (mistaken.yaml); a file's sections are"),
        ("trainer: {callbacks+: [{class_path: ZNormCalback}]}", "there is no class ZNormCalback here"),
        ("trainer: {callbacks+: [{class_path: ZNormCallback, init_args: {eps: tiny}}]}", "eps (mistaken.yaml) is tiny"),
        ("trainer: {precision: 17}", "trainer.precision (mistaken.yaml) is 17, and one of 64, 32, 16 or"),
        ("1: 2", "mistaken.yaml has the key 1, and settings have names"),
        ("trainer: {null: 2}", "mistaken.yaml has the key None, and settings have names"),
        ("trainer: {1: 2}", "mistaken.yaml has the key 1, and settings have names"),
        ("data: {init_args: {seed: {1.5: 2}}}", "mistaken.yaml has the key 1.5, and settings have names"),
        ("trainer: &a {b: *a}", "mistaken.yaml holds settings within themselves, or nested too deeply."),
        ("trainer: {" * 5000, "mistaken.yaml is not valid YAML"),
        ("trainer: !!python/object:os.system {}", "mistaken.yaml is not valid YAML, line 1: could not determine"),
        ("trainer: {max_epochs: 2000-13-45}", "mistaken.yaml is not valid YAML: month must be in 1..12"),
    ],
)
def test_mistaken_method(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mistaken.yaml").write_text(text)
    assert message in refusal(capsys, "fit", "--config", DIGITS, "--config", "mistaken.yaml")


def test_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mistaken.yaml").write_bytes(b"trainer: \xff\xfe")
    assert "mistaken.yaml is not text in UTF-8" in refusal(capsys, "fit", "--config", "mistaken.yaml")


def test_file_that_may_not_be_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    Path("mistaken.yaml").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "mistaken.yaml cannot be read: Permission denied" in refusal(capsys, "fit", "--config", "mistaken.yaml")


def test_znorm_and_centralization_at_once_warn() -> None:
    both = [arg for name in ("znorm", "gc") for arg in ("--config", str(CONFIGS / f"methods/{name}.yaml"))]
    with pytest.warns(
        UserWarning, match=r"GradientCentralizationCallback transforms .* after ZNormCallback, which is before"
    ):
        main(["fit", "--config", str(DIGITS), *both, *CPU])


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    short = [
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
        "--trainer.log_every_n_steps=1",
    ]
    quiet = ["--trainer.enable_model_summary=false", f"--trainer.logger.init_args.save_dir={folder}"]
    main(["fit", "--config", str(DIGITS), "--trainer.accelerator=cpu", *short, *quiet])
    return next(folder.rglob("last.ckpt"))


def spoiled(checkpoint: Path, how: str) -> None:
    content = torch.load(checkpoint, weights_only=True)
    packed = checkpoint.read_bytes()
    path = Path("spoiled.ckpt")
    if how == "folder":
        path.mkdir()
    elif how in ("text", "nothing", "half"):
        path.write_bytes({"text": b"hello", "nothing": b"", "half": packed[: len(packed) // 2]}[how])
    else:
        made = {
            "list": [1, 2],
            "weights alone": content["state_dict"],
            "no version": {key: value for key, value in content.items() if key != "pytorch-lightning_version"},
            "odd version": {**content, "pytorch-lightning_version": "banana"},
            "odd settings": {**content, "hyper_parameters": 3},
            "newer": {**content, "pytorch-lightning_version": "99.0.0"},
        }
        torch.save(made[how], path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("text", "is not a checkpoint, or a damaged one: it cannot be read ("),
        ("nothing", "is not a checkpoint, or a damaged one: it cannot be read ("),
        ("half", "is not a checkpoint, or a damaged one: it cannot be read (PytorchStreamReader failed"),
        ("folder", "is a folder without a checkpoint in parts: name a file in it."),
        ("list", "is not a checkpoint: it holds a list."),
        ("weights alone", "is not a Lightning checkpoint: it holds no state_dict, as Trainer saves it."),
        ("no version", "is not a Lightning checkpoint: it holds no pytorch-lightning_version"),
        ("odd version", "is not a Lightning checkpoint: its version is 'banana'."),
        ("odd settings", "is not a Lightning checkpoint: its hyper_parameters are not names and values."),
    ],
)
@pytest.mark.parametrize("command", ["fit", pytest.param("test", marks=pytest.mark.full)])
def test_no_checkpoint(checkpoint, command: str, how: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled(checkpoint, how)
    said = refusal(capsys, command, "--config", DIGITS, "--ckpt_path", "spoiled.ckpt")
    assert said.startswith(f"error: spoiled.ckpt {message}")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_checkpoint_of_a_newer_lightning_warns(checkpoint) -> None:
    spoiled(checkpoint, "newer")
    with pytest.warns(UserWarning, match=r"produced with Lightning v99.0.0, which is newer than your current"):
        main(["test", "--config", str(DIGITS), *CPU, "--ckpt_path", "spoiled.ckpt"])


def test_what_the_system_says_of_a_file() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Path("gone").stat()
    assert sentence(caught.value) is None  # as far as it can tell, the fault is in this test
    assert caught.value.__traceback__ is not None
    caught.value.__traceback__ = caught.value.__traceback__.tb_next
    assert sentence(caught.value) == "gone: No such file or directory"


TWICE = {
    "section": ("trainer: {max_epochs: 1}\n# more\ntrainer: {max_epochs: 2}\n", 3, "trainer", 1),
    "callbacks": ("trainer:\n  callbacks+: [ZNormCallback]\n  callbacks+: []\n", 3, "callbacks+", 2),
    "argument of one of a list": (
        "trainer:\n  callbacks+:\n    - class_path: ZNormCallback\n      init_args:\n        eps: 1\n        eps: 2\n",
        6,
        "eps",
        5,
    ),
    "on one line": ("trainer: {max_epochs: 1, 'max_epochs': 1}\n", 1, "max_epochs", 1),
}


@pytest.mark.parametrize("command", ["fit", pytest.param("compare", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_is_there_twice(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the refusal, the first would be lost silently, and its method too."""
    text, line, key, first = TWICE[name]
    Path("twice.yaml").write_text(text)
    others = ["--methods", CONFIGS / "methods/baseline.yaml", "twice.yaml", "--output", "out"]
    files = ["--config", DIGITS, *(["--config", "twice.yaml"] if command == "fit" else others)]
    said = f"twice.yaml is not valid YAML, line {line}: the key `{key}` is in line {first} already: merge the two"
    assert said in refusal(capsys, command, *files)


def test_what_is_merged_in_gives_way(folder: Path) -> None:
    text = "shared: &shared {eps: 1, min_ndim: 2}\nmine: {<<: *shared, eps: 2}\n"
    (folder / "merged.yaml").write_text(text)
    assert read_config("merged.yaml").content["mine"] == {"eps": 2, "min_ndim": 2}


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("accumulate_grad_batches", 0, "at least 1"),
        ("check_val_every_n_epoch", -1, "at least 1"),
        ("gradient_clip_val", -0.5, "at least 0"),
        ("val_check_interval", 0, "more than 0"),
        ("val_check_interval", 0.0, "more than 0"),
    ],
)
def test_out_of_range(name: str, value: float, bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, {"trainer": {name: value}}, DIGITS)
    assert said == f"error: trainer.{name} must be {bound}, got {value}."
