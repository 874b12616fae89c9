"""What the documents say: links resolve, commands have the flags they name, code runs, and the READMEs stay short."""

import copy
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_medical import cli, load_clip
from clip_medical.config import parse
from experiments.common import ROOT_OF_PROJECT as ROOT

PAGES = [
    ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
    ROOT / "clip_medical" / "data" / "README.md", ROOT / "clip_medical" / "export" / "README.md",
    ROOT / "experiments" / "results" / "README.md",
]  # fmt: skip
COMMAND = re.compile(r"python (train\.py|-m (?:experiments|clip_medical)\.[\w.]+)((?: +(?:\"[^\"]*\"|[^\s`)#;|]+))*)")


NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
VARIABLES = {"$RUN": "runs/x", "$LIMIT": "--limit 8000 --epochs 2", "$IMAGE": "a.png"}


def cells(notebook: Path) -> str:
    """The code cells of a notebook, with values for the variables of its commands."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code")
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    return text


def commands() -> list[tuple[str, str, str]]:
    """(page, program, flags) of every command in the documents and notebooks."""
    texts = {page: re.sub(r"\s+", " ", page.read_text(encoding="utf-8")) for page in PAGES}
    found = []
    for page, text in [*texts.items(), *((notebook, cells(notebook)) for notebook in NOTEBOOKS)]:
        for program, flags in COMMAND.findall(text):
            found.append((page.name, program, re.sub(r" #.*", "", flags).replace("...", "").rstrip(".,: ")))
    return sorted(set(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_links_resolve(page: Path) -> None:
    """Catches a link to a file that was moved or never written."""
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


def test_the_readmes_are_short() -> None:
    """Catches a front page that grows until nobody reads it."""
    words = [word for word in (ROOT / "README.md").read_text(encoding="utf-8").split() if re.search("[A-Za-z]", word)]
    assert len(words) <= 1100  # figures and the lines of tables are no words
    assert len(re.findall(r"[\u4e00-\u9fff]", (ROOT / "README.zh-CN.md").read_text(encoding="utf-8"))) <= 1800


@pytest.mark.parametrize(("page", "program", "flags"), commands())
def test_commands_parse(page: str, program: str, flags: str) -> None:
    """Catches a command with a flag that was renamed, or of a module that is gone."""
    words = shlex.split(flags)
    if program == "train.py":
        if words != ["--help"]:
            parse(words)
        return
    name = program.removeprefix("-m ")
    if "NAME" in name:  # a placeholder
        return
    package = (ROOT / name.replace(".", "/")).is_dir()
    module: Any = import_module(f"{name}.__main__" if package else name)
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "__dataclass_fields__")
    ]
    if words:
        assert cli.parse(kinds[-1], words, name)


def code(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_code_runs(
    page: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an example with a name that is not there any more. The tiny CLIP stands in for ViT-B/32."""
    monkeypatch.chdir(tmp_path)
    base = load_clip().model
    for name in "abc":
        Image.new("L", (40, 50), ord(name)).save(f"{name}.png")
    blocks = code("python", page)
    for block in blocks:
        with monkeypatch.context() as patch:
            if "CLIPModel" in block:
                patch.setattr("transformers.CLIPModel.from_pretrained", lambda name: copy.deepcopy(base))
            exec(block.replace("runs/demo", str(finished)), {})
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert len(blocks) == 1 or "none of these" in capsys.readouterr().out
