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
    """Run the command that the first argument names, as if its file had been started, and exit with its code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        usage = f"usage: clip-medical {' | '.join(COMMANDS)}, each with --help"
        print(usage if asked else f"Found {name or 'no command'}. {usage}", file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    package, cli.console = Path(__file__).parent, f"clip-medical {name}"
    del sys.argv[1]
    # train.py and experiments/ lie beside this package in a checkout, and in it where pyproject.toml has put them
    sys.path.insert(0, str(installed if (installed := package / "commands").is_dir() else package.parent))
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)  # tyro looks up the help of flags in __main__


if __name__ == "__main__":
    main()
