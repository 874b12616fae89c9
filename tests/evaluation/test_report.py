"""The report of a run: its example queries, its files, and the hardware it names."""

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_medical.data.splits import Split
from clip_medical.evaluation import plots
from clip_medical.evaluation.report import Evaluation, environment, example_queries, layer_changes, write_report
from clip_medical.evaluation.retrieval import retrieval_report
from clip_medical.model import load_clip
from lora import inject
from lora.inject import lora_layers


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
    return Evaluation(results, images, images, images[:3], {"text.0.q_proj": 0.25, "vision.0.q_proj": 0.5})


def records(steps: int) -> list[dict[str, float]]:
    return [{"step": n, "loss": 3.0 / n, "lr": 0.1 * n, "temperature": 0.01 + 0.001 * n} for n in range(1, steps + 1)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that a test draws, open and without a file."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, file: figures.append(figure))
    return figures


@pytest.mark.parametrize("labelled", [True, False])
def test_report_files(labelled: bool, tmp_path: Path) -> None:
    """Catches a report that fails where there are no labels, and facts that are in one of its files only."""
    labels = {"modality": ["CT", "CT", "MRI"] * 2, "anatomy": ["head", "knee", "knee"] * 2} if labelled else {}
    facts: dict[str, Any] = {"run": {"seed": 0}, "training": {"steps": 3, "chance level": 3.47}}
    result = evaluation(labelled)
    write_report(tmp_path, facts, result, result, split(labels), records(3))
    figures = {f"{name}.png" for name in ("training", "recall", "search", "features", "layers")}
    figures |= {"zero_shot.png"} if labelled else set()
    assert {file.name for file in (tmp_path / "figures").iterdir()} == figures
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == facts | {"unadapted": result.results, "adapted": result.results}
    text = (tmp_path / "report.md").read_text()
    assert "- steps: 3" in text and "| text -> image, Recall@5 | 100.0 % [54.1, 100.0] |" in text
    assert all(f"](figures/{name})" in text for name in figures)


def test_the_report_shows_the_layers_of_the_adapted_model(drawn: list[Any], tmp_path: Path) -> None:
    """Catches the bars of the unadapted model, which has no changed layer."""
    after, facts = evaluation(False), {"training": {"steps": 3, "chance level": 3.47}}
    write_report(tmp_path, facts, replace(after, layers={}), after, split({}), records(3))
    names = [[text.get_text() for text in axes.get_yticklabels()] for figure in drawn for axes in figure.axes]
    assert list(after.layers) in names


def test_training_curves(drawn: list[Any], tmp_path: Path) -> None:
    """Catches an empty panel where recall was not measured, a value at another step than its own, and a running mean
    that looks ahead."""
    steps = records(40)
    plots.training_curves(steps, 3.47, tmp_path)
    steps[9]["validation_recall"], steps[39]["validation_recall"] = 0.25, 0.5
    plots.training_curves(steps, 3.47, tmp_path)
    without, panels = (figure.axes for figure in drawn)
    assert [axes.get_title(loc="left") for axes in panels][1:] == ["learning rate", "temperature", "validation recall"]
    assert len(without) == 3 and panels[3].lines[0].get_xydata().tolist() == [[10, 0.25], [40, 0.5]]
    losses = [step["loss"] for step in steps]
    assert panels[0].lines[0].get_ydata().tolist() == losses
    mean = panels[0].lines[1].get_ydata()
    assert mean[0] == losses[0] and mean[39] == pytest.approx(sum(losses[20:]) / 20)
    assert list(panels[0].lines[2].get_ydata()) == [3.47, 3.47]


def test_feature_space(drawn: list[Any], tmp_path: Path) -> None:
    """Catches captions in another order than their images, a colour scale for each model, components that are not
    centred, and points under the label of others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(60, 5, generator=generator) + 2, dim=1)
    labels = ["CT", "MRI", "MRI"] * 20
    images[[label == "MRI" for label in labels], 0] += 3  # these are far away in the first direction
    plots.feature_space([(images, images), (2 * images, images)], labels, tmp_path)
    plots.feature_space([(images, images), (2 * images, images)], [""] * 60, tmp_path)
    *panels, _ = drawn[0].axes
    assert len(panels) == 4 and len(drawn[1].axes) == 3  # with the colour bar
    matrices = [axes.images[0] for axes in panels[:2]]
    assert matrices[0].get_array().shape == (24, 24) and len({matrix.get_clim() for matrix in matrices}) == 1
    norms = (images.norm(dim=1) ** 2).tolist()
    for matrix, factor in zip(matrices, (1, 2), strict=True):
        diagonal = matrix.get_array().diagonal() / factor
        assert all(min(abs(x - n) for n in norms) < 1e-4 for x in diagonal)
    points = {group.get_label(): group.get_offsets() for group in panels[2].collections}
    assert {name: len(xy) for name, xy in points.items()} == {"CT": 20, "MRI": 40}
    assert abs(sum(xy.sum() for xy in points.values())) < 1e-3
    assert (points["CT"][:, 0] > 0).all() != (points["MRI"][:, 0] > 0).all()
    share = (images - images.mean(dim=0)).svd().S ** 2
    assert panels[2].get_xlabel() == f"component 1 ({100 * share[0] / share.sum():.0f} % of the variance)"


@pytest.mark.filterwarnings("error")
def test_feature_space_of_collapsed_features_and_many_labels(drawn: list[Any], tmp_path: Path) -> None:
    """Catches a division by a variance of 0, and a legend of long labels that pushes the panels aside."""
    one_point, labels = torch.full((90, 4), 0.5), [f"{'long ' * 20}{row % 30}" for row in range(60)] + ["CT"] * 30
    plots.feature_space([(one_point, one_point)] * 2, labels, tmp_path)
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert len(texts) == 12 and {"CT", "others"} <= set(texts) and max(map(len, texts)) < 30


def test_layer_changes_and_their_bars(drawn: list[Any], tmp_path: Path) -> None:
    """Catches a ratio without the scaling of B A, bars under the names of other layers, and towers of one colour."""
    clip = load_clip()
    assert not list(layer_changes(clip.model))
    inject(clip.model, rank=2, alpha=6)
    ratios: dict[str, float] = {}
    with torch.no_grad():
        for name, layer in lora_layers(clip.model).items():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(len(ratios)))
            ratios[name] = (3 * (layer.lora_B @ layer.lora_A).norm() / layer.base.weight.norm()).item()
    changes = {name: (change.norm() / weight.norm()).item() for name, change, weight in layer_changes(clip.model)}
    assert list(changes.values()) == pytest.approx(list(ratios.values()), rel=1e-5)  # of fp32
    assert [name.partition(".")[0] for name in changes] == [name.partition("_")[0] for name in ratios]
    assert "vision.3.q_proj" in changes
    plots.layer_bars(changes, tmp_path)
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == list(changes)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * x for x in changes.values()], rel=1e-5)
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2


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
