"""What the commands of this project share: flags from a dataclass, one sentence for a mistake, the exit codes."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from clip_medical.errors import UserError
from lora import LoRAError

Options = TypeVar("Options")


def parse(kind: type[Options], arguments: list[str], command: str, default: Options | None = None) -> Options:
    """Fill the dataclass `kind` from the command line: a field is a flag, the sentence below it is its help.

    command  what the user typed before the flags, such as "python train.py demo"
    default  values of the flags that are not given; without it, fields that have no value of their own are required

    Raises UserError for a flag or value that does not fit, SystemExit(0) after --help.
    """
    said = io.StringIO()
    given = tyro.MISSING_NONPROP if default is None else default
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=command, default=given)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        # tyro's message stands in a box, between its first two rulers; they are of - where stdout is not UTF-8
        box = re.split("[─-]{4,}", said.getvalue(), maxsplit=2)
        words = " ".join(box[min(1, len(box) - 1)].translate(dict.fromkeys(map(ord, "│╮╰"), " ")).split())
        raise UserError(f"{words.rstrip('.')}: `{command} --help` lists the flags.") from None


def exit_code(name: str, action: Callable[[], int]) -> int:
    """Do `action` and return its exit code; 2 for the user's mistake, told in one sentence; 130 for Ctrl-C,
    141 where nobody reads on, as after `| head`."""
    try:
        try:
            return action()
        finally:
            sys.stdout.flush()
    except (UserError, LoRAError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more, and complain
        return 141
