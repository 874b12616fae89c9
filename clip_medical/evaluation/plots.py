"""The figures of a report. Grey is always the unadapted model, blue the adapted one: safe for colour-blind eyes."""

import textwrap
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
        axes.set_xlabel(f"% of {last['pool']:,} queries, whole pool, 95 % interval", fontsize=10)
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


def share_bars(names: Sequence[str], rows: Rows, label: str, file: Path, chance: Sequence[float] = ()) -> None:
    """Named shares with their intervals, a bar a model; label: what is counted, in what unit."""
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.55 * max(1, len(names))))
    bars(axes, names, rows, "value", chance)
    axes.set_xlabel(label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    save_figure(figure, file)


def reliability(calibrations: dict[str, dict[str, Any]], file: Path) -> None:
    """Accuracy against confidence, a panel a facet; calibrations: model -> facet -> what `calibration` gives."""
    facets = list(list(calibrations.values())[-1])
    figure, panels = plt.subplots(1, len(facets), figsize=(3.3 * len(facets), 3.9), sharey=True, squeeze=False)
    marks = {"unadapted": "s", "adapted": "o"}  # told apart by form as well as by colour
    for axes, facet in zip(panels[0], facets, strict=True):
        axes.plot([0, 100], [0, 100], color="black", linestyle=":", linewidth=1, label="confidence = accuracy")
        said = []
        for model, of_facets in calibrations.items():
            found = of_facets[facet]
            x, y, low, high, n = (
                np.array([b[key] for b in found["bins"]]) for key in ("confidence", "accuracy", "low", "high", "n")
            )
            spread = [100 * (y - low).clip(0), 100 * (high - y).clip(0)]
            style: dict[str, Any] = dict(color=COLOURS[model], linewidth=1.2, elinewidth=1, capsize=2)
            axes.errorbar(100 * x, 100 * y, yerr=spread, fmt="-", **style)
            area = 12 + 140 * n / n.sum()
            axes.scatter(100 * x, 100 * y, area, COLOURS[model], marker=marks[model], label=model, zorder=3)
            said.append(f"{model} {100 * found['ece']:.1f} %")
        axes.set_title(f"{facet}, n = {n.sum():,}\ncalibration error: " + ",\n".join(said), fontsize=10)
        axes.set(xlabel="confidence (%)", xlim=(0, 103), ylim=(-3, 103), aspect="equal")
    panels[0][0].set_ylabel("accuracy (%), 95 % interval")
    handles, labels = panels[0][0].get_legend_handles_labels()
    note = "the larger a mark, the more pictures it stands for"
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, frameon=False, title=note)
    figure.tight_layout()
    save_figure(figure, file)


def confusion(reports: dict[str, dict[str, Any]], facet: str, file: Path, most: int = 12) -> None:
    """Which class is taken for which, a panel a model; reports: model -> classification_report of the facet.

    Of more than `most` classes the commonest are shown, the rest as "others" (being right there: another of them).
    """
    last = list(reports.values())[-1]
    counts = {model: np.array(report["confusion"]) for model, report in reports.items()}
    names = list(last["classes"])
    if len(names) > most:
        kept = np.sort(np.argsort(-counts[list(reports)[-1]].sum(axis=1), kind="stable")[: most - 1])
        group = np.full(len(names), len(kept))
        group[kept] = np.arange(len(kept))
        merge = np.eye(len(kept) + 1, dtype=int)[group]  # (classes, shown)
        names, counts = [*(names[k] for k in kept), "others"], {m: merge.T @ c @ merge for m, c in counts.items()}
    side = 1.4 + 0.5 * len(names)
    figure, panels = plt.subplots(1, len(counts), figsize=(side * len(counts) + 1.5, side + 1), squeeze=False)
    for place, (axes, (model, found)) in enumerate(zip(panels[0], counts.items(), strict=True)):
        totals = found.sum(axis=1)
        shares = 100 * found / np.maximum(totals, 1)[:, None]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                ink = "white" if share > 55 else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        rows = [f"{name} ({total})" for name, total in zip(names, totals, strict=True)] if place == 0 else []
        axes.set_yticks(range(len(rows)), rows)
        accuracy = reports[model]["accuracy"]
        interval = f"[{100 * accuracy['low']:.0f}, {100 * accuracy['high']:.0f}]"
        axes.set_title(f"{model}: {100 * accuracy['value']:.1f} % {interval} right", fontsize=11, pad=8)
        axes.set_xlabel(f"named {facet}")
    panels[0][0].set_ylabel(f"true {facet} (pictures)")
    figure.tight_layout()
    figure.suptitle(f"% of the pictures of each true {facet}, n = {last['n']:,}", fontsize=11, y=1.03)
    save_figure(figure, file)


def answer(picture: Image.Image, labels: Sequence[str], results: dict[str, dict[str, float]], file: Path) -> None:
    """A picture beside the probability of each label; results: model -> label -> probability."""
    height = max(2.6, 0.9 + 0.5 * len(labels))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, height), width_ratios=(1, 2.2))
    left.imshow(picture.convert("RGB"))
    left.set_axis_off()
    thick = 0.76 / len(results)
    for place, (model, found) in enumerate(results.items()):
        y = np.arange(len(labels)) + (place - (len(results) - 1) / 2) * (thick + 0.02)
        shares = [100 * found[label] for label in labels]
        right.barh(y, shares, thick, color=COLOURS[model], label=model)
        for at, share in zip(y, shares, strict=True):
            right.text(share + 1.5, at, f"{share:.1f}", va="center", fontsize=9)
    right.set_yticks(range(len(labels)), [textwrap.fill(label, 34) for label in labels])
    right.set(xlim=(0, 112), xticks=range(0, 101, 20), ylim=(len(labels) - 0.5, -0.5))
    right.set_xlabel("probability among these labels (%)")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.tight_layout()
    save_figure(figure, file)


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
    save_figure(figure, file)


def hits_grid(
    title: str, asked: Image.Image | None, found: dict[str, list[tuple[Image.Image, float, str]]], file: Path
) -> None:
    """What a search found, a row a model, best first; asked: the picture that was searched with, shown on the left.

    found: model -> (picture, cosine, words under it).
    """
    first = 0 if asked is None else 1
    columns = first + max(len(hits) for hits in found.values())
    figure, grid = plt.subplots(len(found), columns, figsize=(1.7 * columns, 2.5 * len(found)), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (model, hits) in zip(grid, found.items(), strict=True):
        if asked is not None:
            row[0].imshow(asked.convert("RGB"))
            row[0].set_title("searched with", fontsize=9)
        for axes, (picture, score, under) in zip(row[first:], hits, strict=False):
            axes.imshow(picture.convert("RGB"))
            axes.set_title(f"{score:.3f}", fontsize=9, color=COLOURS[model], fontweight="bold", pad=3)
            text = "\n".join(textwrap.shorten(part, 24) for part in under.split("\n"))
            axes.text(0.5, -0.04, text, transform=axes.transAxes, fontsize=8.5, ha="center", va="top")
        row[0].text(0, 1.24, f"{model}, cosine", transform=row[0].transAxes, fontsize=11, color=COLOURS[model])
    figure.suptitle(textwrap.fill(title, 14 * columns), fontsize=11, y=1.04)
    figure.subplots_adjust(hspace=0.55, wspace=0.1)
    save_figure(figure, file)


def ablation(
    variants: dict[str, dict[str, Any]],
    strengths: dict[str, dict[str, Any]],
    ks: tuple[int, int],
    n: tuple[int, int],
    file: Path,
) -> None:
    """What each variant learned and what it kept, and the way from the base to the adapter.

    variants: name -> {"recall", "shapes": share with its interval}; strengths: the same by strength; ks: the K of the
    two recalls; n: how many pairs each was measured on.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.36 * len(variants)), width_ratios=(1.5, 1))
    kinds = (
        ("recall", f"radiology, Recall@{ks[0]}, n = {n[0]:,}", ADAPTED, "o", -0.13),
        ("shapes", f"coloured shapes, Recall@{ks[1]}, n = {n[1]:,}", ACCENT, "s", 0.13),
    )
    for key, label, colour, mark, offset in kinds:
        for axes, rows in ((left, variants), (right, strengths)):
            values = 100 * np.array([[row[key]["value"], row[key]["low"], row[key]["high"]] for row in rows.values()])
            spread = np.abs(values[:, 1:].T - values[:, 0])
            if axes is left:
                y = np.arange(len(rows)) + offset
                style = dict(color=colour, marker=mark, markersize=5, linestyle="", elinewidth=1.2, capsize=2)
                axes.errorbar(values[:, 0], y, xerr=spread, label=label, **style)
            else:
                x = [float(strength) for strength in rows]
                axes.plot(x, values[:, 0], color=colour, marker=mark, markersize=4)
                axes.fill_between(x, values[:, 1], values[:, 2], color=colour, alpha=0.18, linewidth=0)
    left.set_yticks(range(len(variants)), list(variants))
    left.set(ylim=(len(variants) - 0.5, -0.5), xlim=(0, 100), xlabel="%, both ways, with 95 % interval")
    left.grid(axis="x", color="#dddddd", linewidth=0.7)
    right.set(xlabel="strength of the adapter (0: base, 1: as trained)", ylabel="%, both ways, 95 % band")
    right.set(ylim=(0, 100), xlim=(-0.02, 1.02))
    figure.tight_layout()
    figure.legend(
        *left.get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False
    )
    save_figure(figure, file)
