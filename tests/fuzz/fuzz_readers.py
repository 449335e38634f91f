"""Fuzz a reader with atheris (pip install atheris), which looks for inputs that reach new code.

python -m tests.fuzz.fuzz_readers NAME FOUND [-max_total_time=100 ...]

NAME is one of `tests.fuzz.readers.TARGETS`; FOUND a folder that keeps the inputs that reach new code, begun with the
valid file and with what lies under `tests/fuzz/seeds`. Other arguments are libFuzzer's. An input that ends in anything
but data or a sentence is written to the working folder, as crash-*. Code in C (HDF5, libtiff, zlib) is not watched.
"""

import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

# Packages as a whole, whatever imports them first; the command line loads some of its modules when it runs.
with atheris.instrument_imports(include=["lightning_znorm", "csv", "jsonargparse", "PIL", "yaml"]):
    import PIL.TiffImagePlugin  # noqa: F401

    import lightning_znorm.cli.run  # noqa: F401
    from tests.fuzz.readers import RUN, SENTENCE, TARGETS, outcome

SEEDS = Path(__file__).parent / "seeds"


def main() -> None:
    warnings.simplefilter("ignore")
    name, found = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = target.make(folder)
        found.mkdir(parents=True, exist_ok=True)
        (found / "valid").write_bytes(path.read_bytes())
        for seed in (SEEDS / name).glob("*"):
            shutil.copy(seed, found)

        def read(data: bytes) -> None:
            path.write_bytes(data)
            shutil.rmtree(folder / "cache", ignore_errors=True)  # what one input left behind is nothing to the next
            came_of_it = outcome(target, folder, path)
            if came_of_it not in (RUN, SENTENCE):
                raise RuntimeError(came_of_it)

        atheris.Setup([sys.argv[0], *sys.argv[2:]], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
