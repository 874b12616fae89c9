"""The report of a run: its example queries, its files, and the hardware it names."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_medical import load_clip
from clip_medical.data.batches import Pairs
from clip_medical.data.splits import Split
from clip_medical.evaluation.classification import best_threshold
from clip_medical.evaluation.report import Evaluation, choose_thresholds, environment, example_queries, write_report
from clip_medical.evaluation.retrieval import retrieval_report
from clip_medical.evaluation.zero_shot import multilabel_scores


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
    accuracy = {"accuracy": 0.5, "low": 0.2, "high": 0.8, "chance": 0.5, "n": 6, "classes": ["CT", "MRI"]}
    rows = torch.arange(6)
    results = {
        "retrieval": retrieval_report(images, images, rows, rows, ks=(1, 5)),
        "zero_shot": {"modality": accuracy} if labelled else {},
    }
    return Evaluation(results, images, images[:3])


def test_thresholds_are_chosen_on_rows_with_a_label() -> None:
    """Catches an unlabelled row counted as without findings, and thresholds of exclusive classes."""
    clip = load_clip()
    pixels = torch.randint(0, 256, (5, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = {"finding": ["cyst|mass", "cyst", "mass", "", "fracture"], "modality": ["CT", "MRI", "CT", "CT", "MRI"]}
    empty = torch.zeros(5, 2, dtype=torch.long)
    pairs = Pairs(pixels, empty, empty[:, 0], empty[:, 0], empty[:, 0], split(labels, 5))
    thresholds = choose_thresholds({"adapted": clip}, pairs)["adapted"]
    assert thresholds == clip.thresholds and set(thresholds) == {"finding"}
    scores = multilabel_scores(clip, "finding", ["cyst", "fracture", "mass"], clip.image_features(pixels).cpu())
    known = torch.tensor([0, 1, 2, 4])
    truth = {"cyst": [1, 1, 0, 0], "fracture": [0, 0, 0, 1], "mass": [1, 0, 1, 0]}
    for column, (label, present) in enumerate(truth.items()):
        expected = best_threshold(scores[known, column], torch.tensor(present).float())
        assert thresholds["finding"][label] == pytest.approx(expected, abs=1e-5)


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
