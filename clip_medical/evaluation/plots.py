"""The figures of a report. Grey is always the unadapted model, blue the adapted one: safe for colour-blind eyes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")  # no window: figures are files
import matplotlib.pyplot as plt  # noqa: E402

UNADAPTED, ADAPTED, ACCENT = "#999999", "#0072B2", "#D55E00"  # from the palette of Okabe and Ito
plt.rcParams |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110}


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure whole or not at all, and forget it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}")
    figure.savefig(part, bbox_inches="tight", facecolor="white", format="png")
    part.replace(file)
    plt.close(figure)


def loss_curve(losses: Sequence[float], batch_size: int, file: Path) -> None:
    """Loss of each step, its running mean, and ln(batch): the loss of a model that knows nothing."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=ADAPTED, alpha=0.35, linewidth=1, label="batch loss")
    if len(losses) > 20:
        mean = np.convolve(losses, np.ones(20) / 20, mode="valid")
        axes.plot(steps[19:], mean, color=ADAPTED, linewidth=2, label="mean of 20 steps")
    axes.axhline(np.log(batch_size), color="black", linestyle=":", linewidth=1, label=f"ln {batch_size}: knows nothing")
    axes.set(xlabel="optimizer step", ylabel="InfoNCE loss (nats)", ylim=(0, None), xlim=(0, len(losses) + 1))
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    save_figure(figure, file)


Rows = dict[str, list[dict[str, Any]]]  # of each model, "unadapted" first, its rows of results
COLOURS = {"unadapted": UNADAPTED, "adapted": ADAPTED}


def bars(axes: Any, names: Sequence[str], rows: Rows, key: str, chance: Sequence[float] = ()) -> None:
    """A horizontal bar a model and row, in per cent, with its interval; chance is a dotted tick.

    rows: model -> a dictionary a name, with the value under `key`, its 95 % interval under "low" and "high".
    """
    height = 0.76 / len(rows)
    for place, (model, results) in enumerate(rows.items()):
        values = np.array([[100 * r[key], 100 * r["low"], 100 * r["high"]] for r in results])
        spread = np.abs(values[:, 1:].T - values[:, 0])
        y = np.arange(len(names)) + (place - (len(rows) - 1) / 2) * (height + 0.02)
        style = {"elinewidth": 1, "capsize": 2}
        axes.barh(y, values[:, 0], height, xerr=spread, color=COLOURS[model], label=model, error_kw=style)
        for at, (value, _, high) in zip(y, values, strict=True):
            axes.text(max(high, value) + 1.5, at, f"{value:.1f}", va="center", fontsize=9)
    for at, value in enumerate(chance):
        reach, label = [at - 0.42, at + 0.42], None if at else "chance"
        axes.plot([100 * value] * 2, reach, color="black", linestyle=":", label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))


def recall_bars(retrieval: dict[str, dict[str, Any]], file: Path) -> None:
    """Recall@K both ways with the size of the pool; retrieval: model -> what retrieval_report gives."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    last = list(retrieval.values())[-1]
    for axes, way in zip(both, ("image_to_text", "text_to_image"), strict=True):
        keys = [k for k in last[way] if k.startswith("recall")]
        rows = {model: [report[way][k] for k in keys] for model, report in retrieval.items()}
        chance = [last[way][k]["chance"] for k in keys]
        bars(axes, [k.replace("recall", "Recall") for k in keys], rows, "value", chance)
        axes.set_title(way.replace("_to_", " to "), pad=10)
        axes.set_xlabel(
            f"% of {last[way]['queries']:,} queries, pool of {last[way]['pool']:,}, 95 % interval", fontsize=10
        )
    handles = both[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3, frameon=False)
    figure.tight_layout()
    save_figure(figure, file)


def zero_shot_bars(zero_shot: dict[str, dict[str, Any]], file: Path, key: str = "accuracy") -> None:
    """Zero-shot accuracy of each facet; zero_shot: model -> what zero_shot_report gives."""
    last = list(zero_shot.values())[-1]
    names = [f"{facet}\n{len(row['classes'])} classes, n = {row['n']:,}" for facet, row in last.items()]
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.85 * len(names)))
    rows = {model: [report[facet] for facet in last] for model, report in zero_shot.items()}
    bars(axes, names, rows, key, [row["chance"] for row in last.values()])
    axes.set_xlabel(f"zero-shot {key.replace('_', ' ')} (%), 95 % interval")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    save_figure(figure, file)


Hit = tuple[Image.Image, str, bool | None]  # a picture, what it shows, whether it is right (None: not known)


def search_grid(queries: Sequence[str], found: Sequence[dict[str, list[Hit]]], pool: int, file: Path) -> None:
    """Text-to-image search: a row a query, on the left the best pictures of the unadapted model, right of the adapted.

    found: for each query {"unadapted": hits, "adapted": hits}, best first, out of `pool` pictures. Right pictures have
    a blue frame, wrong ones an orange and dashed one.
    """
    shown = len(found[0]["adapted"])
    columns = 2 * shown + 1  # one empty column between the halves
    widths = [1.0] * shown + [0.25] + [1.0] * shown
    figure, grid = plt.subplots(
        len(queries), columns, figsize=(1.45 * sum(widths), 2.05 * len(queries)), squeeze=False, width_ratios=widths
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (query, halves) in enumerate(zip(queries, found, strict=True)):
        for first, half in ((0, "unadapted"), (shown + 1, "adapted")):
            for column, (picture, caption, right) in enumerate(halves[half], start=first):
                axes = grid[row][column]
                axes.imshow(picture.convert("RGB"))
                axes.set_title(caption, fontsize=7.5, pad=3)
                if right is not None:
                    colour, line = (ADAPTED, "-") if right else (ACCENT, "--")
                    frame = plt.Rectangle((0, 0), 1, 1, fill=False, linewidth=3, edgecolor=colour, linestyle=line)
                    frame.set_transform(axes.transAxes)
                    axes.add_patch(frame)
        grid[row][0].text(0, 1.32, f"“{query}”", transform=grid[row][0].transAxes, fontsize=10.5, fontweight="bold")
    for column, half in ((0, "unadapted"), (shown + 1, "adapted")):
        grid[0][column].text(0, 1.62, half, transform=grid[0][column].transAxes, fontsize=12)
    figure.subplots_adjust(hspace=0.62, wspace=0.08)
    note = f"the first {shown} of {pool:,} held-out pictures, best first"
    if any(right is not None for halves in found for _, _, right in halves["adapted"]):
        note += "; blue frame: both labels are right, orange and dashed: not"
    figure.text(0.5, 0.06, note, ha="center", fontsize=9.5)
    save_figure(figure, file)
