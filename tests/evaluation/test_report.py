"""The report of a run: its example queries, its files, and the hardware it names."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_medical.data.splits import Split
from clip_medical.evaluation.report import Evaluation, environment, example_queries, write_report
from clip_medical.evaluation.retrieval import retrieval_report


def split(labels: dict[str, list[str]], n: int = 6) -> Split:
    return Split(
        captions=[f"caption {row % 3}" for row in range(n)],
        ids=[f"row {row}" for row in range(n)],
        labels=labels,
        open_image=lambda row: Image.new("L", (8, 8)),
        origins=[""] * n,
    )


def evaluation(labelled: bool) -> Evaluation:
    images = torch.eye(6)
    accuracy = {"accuracy": {"value": 0.5, "low": 0.2, "high": 0.8, "chance": 0.5}, "n": 6, "classes": ["CT", "MRI"]}
    rows = torch.arange(6)
    results = {
        "retrieval": retrieval_report(images, images, rows, rows, ks=(1, 5)),
        "zero_shot": {"modality": accuracy} if labelled else {},
    }
    return Evaluation(results, images, images[:3])


@pytest.mark.parametrize("labelled", [True, False])
def test_report_files(labelled: bool, tmp_path: Path) -> None:
    """Catches a report that fails where there are no labels, and facts that are in one of its files only."""
    labels = {"modality": ["CT", "CT", "MRI"] * 2, "anatomy": ["head", "knee", "knee"] * 2} if labelled else {}
    facts: dict[str, Any] = {"run": {"seed": 0}, "training": {"steps": 3}}
    if labelled:
        facts["training"]["chance level"] = 3.47
    result = evaluation(labelled)
    write_report(tmp_path, facts, result, result, split(labels), [3.0, 2.5, 2.0])
    figures = {"loss.png", "recall.png", "search.png"} | ({"zero_shot.png"} if labelled else set())
    assert {file.name for file in (tmp_path / "figures").iterdir()} == figures
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == facts | {"unadapted": result.results, "adapted": result.results}
    text = (tmp_path / "report.md").read_text()
    assert "- steps: 3" in text and "| text -> image, Recall@5 | 100.0 % [54.1, 100.0] |" in text
    assert all(f"](figures/{name})" in text for name in figures)


def test_example_queries_take_turns_between_modalities() -> None:
    """Catches four queries of the most frequent modality, and queries whose labels are not those of their text."""
    modality = ["X-ray"] * 9 + ["CT"] * 3 + ["", "X-ray"]
    anatomy = ["chest"] * 5 + ["knee"] * 4 + ["head"] * 2 + ["chest"] + ["chest", ""]
    queries = example_queries(split({"modality": modality, "anatomy": anatomy}, n=14))
    texts = ["X-ray of the chest", "CT of the head", "X-ray of the knee", "CT of the chest"]
    assert [text for text, _ in queries] == texts
    assert queries[1][1] == {"modality": "CT", "anatomy": "head"}


def test_example_queries_without_labels() -> None:
    """Catches the same caption searched for twice."""
    assert example_queries(split({})) == [("caption 0", {}), ("caption 1", {}), ("caption 2", {})]


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the name of the processor is available on Linux only")
def test_processor_is_named() -> None:
    """Catches "x86_64" beside a time: two processors of that architecture can differ by a factor of three."""
    name = environment()["processor"]
    assert name and name in Path("/proc/cpuinfo").read_text()


def test_architecture_stands_in_for_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a report that fails at its last step on macOS, where there is no /proc/cpuinfo."""
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert environment()["processor"] == platform.machine()
