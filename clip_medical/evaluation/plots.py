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

from clip_medical.evaluation.table import Row

matplotlib.use("Agg")  # figures are files, so no window is needed
import matplotlib.pyplot as plt  # noqa: E402

UNADAPTED, ADAPTED, ACCENT = "#999999", "#0072B2", "#D55E00"  # from the palette of Okabe and Ito
COLOURS = {"unadapted": UNADAPTED, "adapted": ADAPTED}
# For captions in Chinese, Japanese or Korean: whatever of these is installed, beside matplotlib's own font.
CJK = ["Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC"]
INSTALLED = {font.name for font in fontManager.ttflist}
plt.rcParams |= {
    "font.family": ["DejaVu Sans", *(name for name in CJK if name in INSTALLED)],
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


def loss_curve(losses: Sequence[float], chance: float | None, file: Path) -> None:
    """Plot the loss of each step, its running mean, and the chance level of the loss if it is given."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=ADAPTED, alpha=0.35, linewidth=1, label="batch loss")
    if len(losses) > 20:
        mean = np.convolve(losses, np.ones(20) / 20, mode="valid")
        axes.plot(steps[19:], mean, color=ADAPTED, linewidth=2, label="mean of 20 steps")
    if chance is not None:
        axes.axhline(chance, color="black", linestyle=":", linewidth=1, label=f"chance level: {chance:.2f}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats)", ylim=(0, None), xlim=(0, len(losses) + 1))
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    save_figure(figure, file)


def share_bars(rows: Sequence[Row], label: str, file: Path) -> None:
    """Plot the rows of a results table that are shares: a bar per row and model, in per cent, with its 95 % interval.

    The chance level, where a row has one, is a dotted line. label: what is counted, and its unit.
    """
    rows = [row for row in rows if all("low" in result for result in row.results.values())]
    counts = [f"\nn = {row.n:,}" if isinstance(row.n, int) else "" for row in rows]
    names = [textwrap.fill(row.name, 42) + count for row, count in zip(rows, counts, strict=True)]
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
