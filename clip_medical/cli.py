"""Command lines from dataclasses, one sentence for a user's mistake, and the exit codes."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from clip_medical.errors import UserError
from lora import LoRAError

Options = TypeVar("Options")
console = ""  # "clip-medical train" or another of its commands, where one was used


def parse(kind: type[Options], arguments: list[str], command: str, default: Options | None = None) -> Options:
    """Fill the dataclass `kind` from the command line: each field is a flag, the comment above it is its help.

    command  what stands before the flags, such as "python train.py demo"
    default  values of flags that are not given; without it, fields without a default are required

    Raises UserError for an unknown flag or a wrong value, SystemExit(0) after --help.
    """
    stderr = io.StringIO()
    values: Any = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr):
            options: Options = tyro.cli(kind, args=arguments, prog=command, **values)
            return options
    except SystemExit as end:
        if not end.code:  # --help
            raise
        # tyro frames its message: the text stands between the first two rulers, drawn with - where stdout is not UTF-8
        box = re.split("[─-]{4,}", stderr.getvalue(), maxsplit=2)
        message = " ".join(box[min(1, len(box) - 1)].translate(dict.fromkeys(map(ord, "│╮╰"), " ")).split())
        raise UserError(f"{message.rstrip('.')}. `{command} --help` lists the flags.") from None


def exit_code(name: str, action: Callable[[], int]) -> int:
    """Run `action` and return its exit code; 2 after a UserError, 130 after Ctrl-C, 141 for a closed pipe (`| head`).

    Of several processes that torchrun started, the first one alone prints.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console of Windows cannot show every caption
    silent = "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"
    try:
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if silent else sys.stdout):
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes again at exit, and fails
        return 141
