"""Results tables: which metrics they show, and how."""

import pytest
import torch

from clip_medical.evaluation import retrieval
from clip_medical.evaluation.report import result_rows
from clip_medical.evaluation.retrieval import retrieval_report
from clip_medical.evaluation.table import Row, as_markdown, as_text, comparison, metric_rows

SHARE = {"value": 0.184, "low": 0.152, "high": 0.215, "chance": 0.25}


def test_new_metric_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tables with a list of metrics of their own, which a metric added to METRICS would not enter."""
    monkeypatch.setitem(retrieval.METRICS, "ndcg@2", lambda rank: (rank < 2) / (rank + 2).log2())
    texts = torch.tensor([[1.0, 0, 0], [0.9, 0.5, 0], [0.3, 0.2, 0.1]])  # image i is axis i: text ranks 0, 1, 2
    report = retrieval_report(torch.eye(3), texts, torch.arange(3), torch.arange(3), ks=(1,))
    expected = (1 + 0.63093 + 0) / 3  # 1 / log2(3) = 0.63093
    assert report["text_to_image"]["ndcg@2"]["value"] == pytest.approx(expected, abs=1e-5)
    assert report["text_to_image"]["ndcg@2"]["chance"] == pytest.approx(expected, abs=1e-5)  # each rank once in three
    results = {"retrieval": report, "zero_shot": {}}
    cells = {row[0]: row[1:] for row in comparison(result_rows(results, results))}
    assert list(cells)[1:5] == [f"image -> text, {name}" for name in ("Recall@1", "MRR", "NDCG@2", "median rank")]
    assert cells["text -> image, NDCG@2"][2:] == ["54.4 %", "3"]
    assert cells["text -> image, median rank"] == ["2", "2", "2", "3"]


def test_cells_by_hand() -> None:
    """Catches shares of one model printed under another, and a low chance level rounded to 0.0 %."""
    low = {"value": 0.05, "low": 0.01, "high": 0.125, "chance": 0.000_24}
    rows = [
        Row("accuracy", {"unadapted": SHARE, "adapted": SHARE | {"value": 0.2}}, 1234),
        Row("recall", {"unadapted": low, "adapted": low}, "2,000"),
        Row("error", {"unadapted": {"value": 1.5}, "adapted": {"value": 3.0}}, ""),
    ]
    assert comparison(rows) == [
        ["", "unadapted", "adapted", "chance level", "n"],
        ["accuracy", "18.4 % [15.2, 21.5]", "20.0 % [15.2, 21.5]", "25.0 %", "1,234"],
        ["recall", "5.0 % [1.0, 12.5]", "5.0 % [1.0, 12.5]", "0.024 %", "2,000"],
        ["error", "1.5", "3", "", ""],
    ]


def test_entries_that_are_no_metrics_have_no_row() -> None:
    """Catches a pool size or a confusion matrix printed as a metric."""
    report = {"pool": 3, "auroc": SHARE, "confusion": [[1]], "calibration": {"ece": 0.1}}
    assert [row.name for row in metric_rows("modality", {"adapted": report}, 3)] == ["modality, AUROC"]


def test_layouts() -> None:
    """Catches columns that do not line up in a terminal, and Markdown without the line that makes it a table."""
    rows = [["", "adapted"], ["recall", "5 %"]]
    assert as_text(rows).splitlines() == ["        adapted", "-" * 15, "recall      5 %"]
    assert as_markdown(rows).splitlines() == ["|  | adapted |", "|---|--:|", "| recall | 5 % |"]
