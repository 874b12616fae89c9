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


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def loss_curve(losses: Sequence[float], batch_size: int, file: Path) -> None:
    """Loss of each step, its running mean, and ln(batch): the loss of a model that knows nothing."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=ADAPTED, alpha=0.35, linewidth=1, label="batch loss")
    if len(losses) >= 20:
        mean = np.convolve(losses, np.ones(20) / 20, mode="valid")
        axes.plot(steps[19:], mean, color=ADAPTED, linewidth=2, label="mean of 20 steps")
    axes.axhline(np.log(batch_size), color="black", linestyle=":", linewidth=1, label=f"ln {batch_size}: knows nothing")
    axes.set(xlabel="optimizer step", ylabel="InfoNCE loss (nats)", ylim=(0, None), xlim=(0, len(losses) + 1))
    axes.legend(frameon=False)
    _save(figure, file)


def _bars(axes: Any, names: list[str], before: list[dict], after: list[dict], key: str, chance: list[float]) -> None:
    """Pairs of horizontal bars with 95 % intervals, values written at their ends, chance as a dotted tick."""
    for offset, rows, colour, label in ((-0.2, before, UNADAPTED, "unadapted"), (0.2, after, ADAPTED, "adapted")):
        values = np.array([[100 * r[key], 100 * r["low"], 100 * r["high"]] for r in rows])
        spread = np.abs(values[:, 1:].T - values[:, 0])
        y = np.arange(len(names)) + offset
        axes.barh(
            y, values[:, 0], 0.38, xerr=spread, color=colour, label=label, error_kw={"elinewidth": 1, "capsize": 2}
        )
        for at, (value, _, high) in zip(y, values, strict=True):
            axes.text(high + 1.5, at, f"{value:.1f}", va="center", fontsize=9)
    for at, value in enumerate(chance):
        axes.plot(
            [100 * value] * 2, [at - 0.42, at + 0.42], color="black", linestyle=":", label=None if at else "chance"
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))


def recall_bars(before: dict[str, Any], after: dict[str, Any], file: Path) -> None:
    """Recall@K both ways, before and after, with the size of the pool."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axes, way in zip(both, ("image_to_text", "text_to_image"), strict=True):
        old, new = before["retrieval"][way], after["retrieval"][way]
        keys = [k for k in new if k.startswith("recall")]
        names = [k.replace("recall", "Recall") for k in keys]
        _bars(axes, names, [old[k] for k in keys], [new[k] for k in keys], "value", [new[k]["chance"] for k in keys])
        axes.set_title(way.replace("_to_", " to "))
        axes.set_xlabel(f"% of {after['retrieval']['pool']} queries, whole pool")
    figure.legend(
        *both[0].get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=3, frameon=False
    )
    figure.tight_layout()
    _save(figure, file)


def zero_shot_bars(before: dict[str, Any], after: dict[str, Any], file: Path) -> None:
    """Zero-shot accuracy of each facet, before and after."""
    old, new = before["zero_shot"], after["zero_shot"]
    names = [f"{facet}\n{len(row['classes'])} classes, n = {row['n']}" for facet, row in new.items()]
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.85 * len(names)))
    chance = [row["chance"] for row in new.values()]
    _bars(axes, names, [old[f] for f in new], list(new.values()), "accuracy", chance)
    axes.set_xlabel("zero-shot accuracy (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    _save(figure, file)


Hit = tuple[Image.Image, str, bool | None]  # a picture, what it shows, whether it is right (None: not known)


def search_grid(queries: Sequence[str], found: Sequence[dict[str, list[Hit]]], file: Path) -> None:
    """Text-to-image search: a row a query, on the left the best pictures of the unadapted model, right of the adapted.

    found: for each query {"unadapted": hits, "adapted": hits}, best first. Right pictures have a blue frame, wrong ones
    an orange and dashed one.
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
    _save(figure, file)
