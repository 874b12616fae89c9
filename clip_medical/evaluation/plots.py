"""The figures of a report. Grey is the unadapted model, blue the adapted one, safe for colour-blind readers."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.font_manager import fontManager
from PIL import Image
from torch import Tensor

from clip_medical.evaluation.table import Row

matplotlib.use("Agg")  # figures are files, so no window is needed
import matplotlib.pyplot as plt  # noqa: E402

UNADAPTED, ADAPTED, ACCENT = "#999999", "#0072B2", "#D55E00"  # from the palette of Okabe and Ito
COLOURS = {"unadapted": UNADAPTED, "adapted": ADAPTED}
CLASSES = [ADAPTED, ACCENT, "#009E73", "#E69F00", "#CC79A7", "#56B4E9", UNADAPTED]  # of the same palette
# For captions in Chinese, Japanese or Korean: whatever of these is installed, beside matplotlib's own font.
CJK = ["Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC"]
plt.rcParams |= {
    "font.family": ["DejaVu Sans", *(name for name in CJK if name in fontManager.get_font_names())],
    "text.parse_math": False,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}

Hit = tuple[Image.Image, str, bool | None]  # an image, its labels or caption, whether it is correct (None: unknown)


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure atomically, then close it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}")
    figure.savefig(part, bbox_inches="tight", facecolor="white", format="png")
    part.replace(file)
    plt.close(figure)


def training_curves(records: Sequence[dict[str, Any]], chance: float, file: Path) -> None:
    """Plot loss, learning rate, temperature and, where it was measured, validation recall, a panel for each.

    records: one per step, as in metrics.jsonl. chance: the chance level of the loss.
    """
    titles = {"loss": "loss (nats): each batch, and mean of the last 20", "lr": "learning rate"}
    keys = [key for key in ("loss", "lr", "temperature", "validation_recall") if any(key in step for step in records)]
    figure, grid = plt.subplots(len(keys), figsize=(7, 1.9 * len(keys)), sharex=True, layout="constrained")
    for axes, key in zip(grid, keys, strict=True):
        steps, values = np.array([(step["step"], step[key]) for step in records if key in step]).T
        axes.plot(steps, values, ".-" if len(steps) <= 50 else "-", color=ADAPTED, alpha=0.4 if key == "loss" else 1)
        axes.set_title(titles.get(key, key.replace("_", " ")), loc="left", fontsize=10)
        if key == "loss":
            axes.plot(steps, [values[max(0, i - 19) : i + 1].mean() for i in range(len(values))], color=ADAPTED)
            axes.axhline(chance, color="black", linestyle=":", label=f"chance level: {chance:.2f}")
            axes.legend(frameon=False)
    grid[0].set_ylim(0, 1.1 * grid[0].get_ylim()[1])
    axes.set_xlabel("optimizer step")
    axes.locator_params(axis="x", integer=True)
    save_figure(figure, file)


def feature_space(features: Sequence[tuple[Tensor, Tensor]], labels: Sequence[str], file: Path) -> None:
    """Plot the cosine similarities of 24 pairs and, if labels differ, the principal components of all image features.

    features: (images, texts) of the unadapted and of the adapted model, each (N, D), unit length. labels: N modalities,
    "" where unknown; the 11 most frequent are told apart. The pairs are evenly spaced over the N rows, then sorted by
    label.
    """
    frequent = sorted(set(labels), key=list(labels).count)[-11:]
    labels = [name if name in frequent else "others" for name in labels]
    names, height = sorted(set(labels)), min(2, len(set(labels)))
    rows = sorted(np.linspace(0, len(labels) - 1, min(24, len(labels)), dtype=int), key=labels.__getitem__)
    cosines = [(images[rows] @ texts[rows].T).numpy() for images, texts in features]
    figure, grid = plt.subplots(height, 2, figsize=(9.5, 4.3 * height), squeeze=False, layout="constrained")
    for axes, model, values in zip(grid[0], ("unadapted", "adapted"), cosines, strict=True):
        shown = axes.imshow(values, cmap="cividis", vmin=np.min(cosines), vmax=np.max(cosines))
        axes.set(title=model, xticks=[], yticks=[], xlabel=f"captions of {len(rows)} pairs", ylabel="their images")
    figure.colorbar(shown, ax=grid[0], label="cosine similarity (diagonal: matching pairs)")
    for axes, (images, _) in zip(grid[1:].flat, features, strict=False):
        u, s, _ = np.linalg.svd((images - images.mean(dim=0)).numpy(), full_matrices=False)
        one, two = 100 * s[:2] ** 2 / max((s**2).sum(), 1e-12)  # collapsed features have no variance
        for name, colour, marker in zip(names, itertools.cycle(CLASSES), itertools.cycle("os^DPv"), strict=False):
            text = textwrap.shorten(name or "no label", 25)
            axes.scatter(*(u * s)[np.array(labels) == name, :2].T, 16, colour, marker=marker, alpha=0.7, label=text)
        axes.set(xlabel=f"component 1 ({one:.0f} % of the variance)", ylabel=f"component 2 ({two:.0f} %)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, file)


def layer_bars(changes: dict[str, float], file: Path) -> None:
    """Plot a bar for each adapted layer, orange in the text tower. changes: layer -> norm of its change / norm of W."""
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.22 * len(changes)))
    colours = [ACCENT if "text" in name else ADAPTED for name in changes]
    axes.bar_label(axes.barh(list(changes), [100 * x for x in changes.values()], color=colours), fmt="%.1f", padding=2)
    axes.set(ylim=(len(changes) - 0.4, -0.6), xlabel="norm of the change / norm of the weight (%)")
    save_figure(figure, file)


def share_bars(rows: Sequence[Row], label: str, file: Path) -> None:
    """Plot the rows of a results table that are shares: a bar per row and model, in per cent, with its 95 % interval.

    The chance level, where a row has one, is a dotted line. label: what is counted, and its unit.
    """
    rows = [row for row in rows if all("low" in result for result in row.results.values())]
    names = [textwrap.fill(row.name, 42) + (f"\nn = {row.n:,}" if isinstance(row.n, int) else "") for row in rows]
    models = list(rows[0].results)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.55 * len(names)))
    height = 0.76 / len(models)
    for number, model in enumerate(models):
        results = [row.results[model] for row in rows]
        value, low, high = (100 * np.array([result[key] for result in results]) for key in ("value", "low", "high"))
        y = np.arange(len(names)) + (number - (len(models) - 1) / 2) * (height + 0.02)
        interval, style = np.abs([low - value, high - value]), {"elinewidth": 1, "capsize": 2}
        axes.barh(y, value, height, xerr=interval, color=COLOURS[model], label=model, error_kw=style)
        for position, end, percent in zip(y, np.maximum(high, value), value, strict=True):
            axes.text(end + 1.5, position, f"{percent:.1f}", va="center", fontsize=9)
    for position, result in enumerate(results):  # of the last model
        if "chance" in result:
            line, legend = [position - 0.42, position + 0.42], None if position else "chance level"
            axes.plot([100 * result["chance"]] * 2, line, color="black", linestyle=":", label=legend)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 112), xticks=range(0, 101, 20), xlabel=label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    save_figure(figure, file)


def search_grid(queries: Sequence[str], hits: dict[str, list[list[Hit]]], pool: int, file: Path) -> None:
    """Plot the results of a search: a row per query, and side by side the best images of each model.

    hits: model -> for each query the best of `pool` images, best first. Correct images have a blue frame, wrong ones
    an orange and dashed one.
    """
    best, *_ = next(iter(hits.values()))
    shown = len(best)
    height = 0.7 + 2.05 * len(queries)  # inches
    figure = plt.figure(figsize=(1.5 * shown * len(hits), height))
    parts: Any = figure.subfigures(1, len(hits), squeeze=False)
    for part, (model, results) in zip(parts[0], hits.items(), strict=True):
        part.suptitle(model, y=1, va="top")
        spaces = {"left": 0.03, "right": 0.97, "hspace": 0.62, "wspace": 0.08}
        spaces |= {"top": 1 - 0.95 / height, "bottom": 0.35 / height}  # for model, query and title; for the note
        grid = part.subplots(len(queries), shown, squeeze=False, gridspec_kw=spaces)
        for axes, (image, text, correct) in zip(grid.flat, itertools.chain(*results), strict=True):
            axes.imshow(image.convert("RGB"))
            axes.set_title(text, fontsize=7.5, pad=3)
            axes.set(xticks=[], yticks=[])
            colour, line = (ADAPTED, "-") if correct else (ACCENT, "--")
            axes.spines[:].set(visible=correct is not None, linewidth=3, edgecolor=colour, linestyle=line)
        for axes, query in zip(grid[:, 0], queries, strict=True):
            axes.text(0, 1.32, f"“{query}”", transform=axes.transAxes, fontsize=10.5, fontweight="bold")
    note = f"the first {shown} of {pool:,} images, best first"
    if best[0][2] is not None:
        note += "; blue frame: both labels are correct, orange and dashed: not"
    figure.text(0.5, 0.05 / height, note, ha="center", fontsize=9.5)
    save_figure(figure, file)
