"""The command line: ``python -m lightning_znorm``.

`lightning.pytorch.cli.LightningCLI`, whose documentation says how YAML files and flags are written, and more: the
config files that come with the package are found from any folder, flags win over files wherever they stand, files that
would undo a method are refused, and mistakes get one sentence.

Torch is loaded only when a command runs, so that help and refusals come at once.
"""

import argparse
import sys

from lightning_znorm import __version__
from lightning_znorm.cli.config_files import read_config, shipped_configs
from lightning_znorm.cli.config_order import check_order
from lightning_znorm.cli.errors import sentence

__all__ = ["main"]

_HELP = """\
usage: python -m lightning_znorm {fit,validate,test,predict,compare} [--config FILE ...] [--KEY VALUE ...]

  fit       train
  validate  evaluate on the validation set
  test      evaluate on the test set
  predict   save the predictions for the test set
  compare   run several methods with several seeds, and report whether they differ (`compare --help`)

Name an experiment, then a method to lay over it; a flag overrides any setting of theirs:

  python -m lightning_znorm fit --config configs/digits/resnet20.yaml --config configs/methods/znorm.yaml
  python -m lightning_znorm fit --config configs/digits/resnet20.yaml --trainer.max_epochs 2

`fit --help` lists the flags, `fit ... --print_config` prints the resulting settings, `--version` the version.

These files come with the package, and a file of the same name on disk goes before them:

"""


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: What is typed behind ``python -m lightning_znorm``. Default: what was typed.

    Raises:
        SystemExit: With one sentence on stderr, where the files, the settings or the data are wrong.

    Example:
        >>> main(["--version"])
        lightning-znorm 0.1.0
    """
    args = sys.argv[1:] if args is None else args
    if args in ([], ["-h"], ["--help"]):
        print(_HELP + "\n".join(f"  {name}" for name in shipped_configs()))
    elif args == ["--version"]:
        print(f"lightning-znorm {__version__}")
    else:
        try:
            if args[0] == "compare":
                from lightning_znorm.compare.command import main as compare

                if code := compare(args[1:]):
                    sys.exit(code)
            else:
                _run(args)
        except Exception as error:
            message = sentence(error)
            if message is None:
                raise
            sys.exit(f"error: {message}")


def _run(args: list[str]) -> None:
    options = argparse.ArgumentParser(prog="python -m lightning_znorm", add_help=False, allow_abbrev=False)
    options.usage = _HELP.splitlines()[0].removeprefix("usage: ")
    options.add_argument("-c", "--config", action="append", default=[])
    named, rest = options.parse_known_args(args)
    files = [read_config(name) for name in named.config]
    check_order(files)

    from lightning_znorm.cli.run import RunCLI

    RunCLI(files, rest)
