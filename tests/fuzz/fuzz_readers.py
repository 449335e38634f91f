"""Fuzzes a reader with atheris (pip install atheris), which looks for inputs that reach code not reached before.

python -m tests.fuzz.fuzz_readers NAME SEEDS [-max_total_time=100 ...]

NAME is one of `tests.fuzz.readers.TARGETS`; SEEDS a folder that keeps what it finds, begun with the valid file. Other
arguments are libFuzzer's. An input that ends in anything but data or a sentence is written beside, as crash-*.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import lightning.pytorch.cli  # noqa: F401  (not to be watched)
import torchvision.datasets  # noqa: F401

with atheris.instrument_imports(include=["lightning_znorm.data", "lightning_znorm.cli", "csv", "PIL", "yaml"]):
    import PIL.TiffImagePlugin  # noqa: F401

    from tests.fuzz.readers import RUN, SENTENCE, TARGETS, outcome


def main() -> None:
    warnings.simplefilter("ignore")
    name, seeds = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = target.make(folder)
        seeds.mkdir(parents=True, exist_ok=True)
        (seeds / "valid").write_bytes(path.read_bytes())

        def read(data: bytes) -> None:
            path.write_bytes(data)
            found = outcome(target, folder, path)
            if found not in (RUN, SENTENCE):
                raise RuntimeError(found)

        atheris.Setup([sys.argv[0], *sys.argv[2:]], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
