"""The structure that the README and CONTRIBUTING describe: who may import whom, and how much there is to read."""

import ast
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = [*sorted((ROOT / "lora").rglob("*.py")), *sorted((ROOT / "clip_medical").rglob("*.py"))]

# From the bottom up. A folder or module imports only from those before it, and from itself.
LAYERS = [
    "lora", "clip_medical.errors", "clip_medical.cli", "clip_medical.config", "clip_medical.data", "clip_medical.fast",
    "clip_medical.encoder", "clip_medical.model", "clip_medical.run_folder", "clip_medical.evaluation",
    "clip_medical.training", "clip_medical.export", "clip_medical", "experiments", "train",
]  # fmt: skip


def layer_of(module: str) -> str:
    """The longest entry of LAYERS that the dotted module name starts with."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len)


def imports(file: Path) -> list[str]:
    """Dotted names of the modules of this project that a file imports, also inside functions."""
    package = file.relative_to(ROOT).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [f"{module}.{alias.name}" for alias in node.names] + [module]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("lora", "clip_medical", "experiments", "train")]


def test_imports_run_downwards() -> None:
    """Catches a circle between folders, in which a reader finds no beginning, and a second way to the fast encoder."""
    wrong = []
    for file in [*CODE, *sorted((ROOT / "experiments").rglob("*.py"))]:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        own = layer_of(name)
        for module in imports(file):
            layer = layer_of(module)
            is_package = layer == "clip_medical" and name != "clip_medical"  # `from clip_medical import cli` is cli
            if not is_package and LAYERS.index(layer) > LAYERS.index(own):
                wrong.append(f"{name} imports {module}")
            if layer == "clip_medical.fast" and own not in (layer, "clip_medical.encoder"):
                wrong.append(f"{name} imports {module}, which may be deleted; only clip_medical.encoder may do so")
    assert not wrong


def code_lines(file: Path) -> int:
    """Lines with code: comments, docstrings and blank lines do not count."""
    text, lines = file.read_text(encoding="utf-8"), set[int]()
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_the_project_stays_small() -> None:
    """Catches growth that nobody decided on: minimal is what this project promises."""
    files = [*CODE, *sorted((ROOT / "experiments").rglob("*.py")), ROOT / "train.py"]
    assert sum(map(code_lines, files)) <= 6000


# Functions and methods; no special methods such as __len__, class bodies or comprehensions. Images are cached already.
COUNT = """
import json, sys, threading
entered = set()
def profile(frame, event, arg):
    if event == "call":
        code = frame.f_code
        is_function = code.co_flags & 1 and not code.co_name.startswith(("<", "__"))
        if is_function and code.co_filename.startswith(ROOT):
            entered.add((code.co_filename, code.co_firstlineno, code.co_name))
sys.path.insert(0, ROOT)
import train
sys.argv = ["train.py", "--limit", "40", "--batch-size", "16", "--steps", "3", "--output", sys.argv[1] + "-warm"]
train.main()
sys.argv[-1] = sys.argv[-1].removesuffix("-warm")
threading.setprofile(profile); sys.setprofile(profile)
code = train.main()
sys.setprofile(None)
print(json.dumps([code, sorted(entered)]))
"""


@pytest.mark.slow
def test_a_run_enters_few_functions(tmp_path: Path) -> None:
    """Catches hops: a reader who follows a run from train.py has to look up each of these functions. Prints them with
    -s."""
    code = COUNT.replace("ROOT", repr(str(ROOT)))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT)
    status, entered = json.loads(done.stdout.splitlines()[-1])
    print(*(f"{Path(file).relative_to(ROOT)}:{line} {name}" for file, line, name in entered), sep="\n")
    print(f"{len(entered)} functions in {len({file for file, _, _ in entered})} files")
    assert status == 0 and len(entered) <= 160, len(entered)
