"""`clip-medical COMMAND ...`: the commands of the project in one, also where it is installed without its repository.

`clip-medical train` is `python train.py`, with the same flags; the others are those that `--help` lists.
"""

import runpy
import sys
from pathlib import Path

from clip_medical import cli

COMMANDS = {
    "train": "train",
    "search": "experiments.search",
    "classify": "experiments.zero_shot",
    "recall": "experiments.recall",
    "stress-test": "experiments.stress_test",
    "export": "clip_medical.export",
    "app": "experiments.app",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        usage = f"Found the command {name!r}, expected" if name and not asked else "usage: clip-medical"
        print(f"{usage} {', '.join(COMMANDS)}; each with --help", file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    module, package = COMMANDS[name], Path(__file__).parent
    cli.renamed = ("python train.py" if name == "train" else f"python -m {module}"), f"clip-medical {name}"
    sys.argv[:2] = [f"{module}.py"]
    # train.py and experiments/ lie beside this package in a checkout, and in it where pyproject.toml has put them
    sys.path.insert(0, str(installed if (installed := package / "commands").is_dir() else package.parent))
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
