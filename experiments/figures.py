"""The figures of the experiments. Colours as in reports: grey is the unadapted model, blue the adapted one."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_medical.evaluation.plots import ACCENT, ADAPTED, COLOURS, Rows, bars, plt, save_figure


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


def hits_grid(
    title: str, asked: Image.Image | None, found: dict[str, list[tuple[Image.Image, float, str]]], file: Path
) -> None:
    """What a search found, a row a model, best first; asked: the picture that was searched with, shown on the left.

    found: model -> (picture, cosine, words under it).
    """
    first = 0 if asked is None else 1
    inks = {"unadapted": "#555555", "adapted": ADAPTED}  # the grey of bars is too pale for letters
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
            axes.set_title(f"{score:.3f}", fontsize=9, color=inks[model], fontweight="bold", pad=3)
            text = "\n".join(textwrap.shorten(part, 24) for part in under.split("\n"))
            axes.text(0.5, -0.04, text, transform=axes.transAxes, fontsize=8.5, ha="center", va="top")
        row[0].text(0, 1.24, f"{model}, cosine", transform=row[0].transAxes, fontsize=11, color=inks[model])
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


def memory_curve(curve: dict[str, Any], file: Path) -> None:
    """Peak memory against the batch, in chunks and at once, beside what chunks are allowed to take."""
    rows, plain = curve["in chunks"], curve["plain"]
    first, gib = rows[0]["peak"], 2**30
    batches = [row["batch"] for row in rows]
    allowed = [1.15 * (first + row["features"] + row["logits"]) / gib for row in rows]
    figure, axes = plt.subplots(figsize=(7, 4))
    at_once: dict[str, Any] = dict(color=ACCENT, marker="s", linestyle="-.", label="all pairs at once: the plain step")
    axes.plot([row["batch"] for row in plain], [row["peak"] / gib for row in plain], **at_once)
    label = f"the same gradient in chunks of {curve['chunk']} pairs"
    axes.plot(batches, [row["peak"] / gib for row in rows], color=ADAPTED, marker="o", label=label)
    label = f"peak of {batches[0]}, features and logits, and 15 %"
    axes.plot(batches, allowed, color="black", linestyle=":", linewidth=1, label=label)
    ticks = sorted({*batches, *(row["batch"] for row in plain)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel="pairs in the contrastive batch", ylabel="peak memory of a step (GiB)", ylim=(0, None))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save_figure(figure, file)
