"""Figures of the experiments. Colours as in the reports: grey is the unadapted model, blue the adapted one."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from clip_medical.evaluation.plots import ACCENT, ADAPTED, COLOURS, save_figure
from clip_medical.evaluation.table import percent

LEGEND_ABOVE: dict[str, Any] = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def reliability(reports: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw accuracy over confidence, a panel for each facet. reports: model -> facet -> `classification_report`."""
    facets = reports["unadapted"]
    figure, panels = plt.subplots(1, len(facets), figsize=(3.3 * len(facets), 3.9), sharey=True, squeeze=False)
    for axes, facet in zip(panels[0], facets, strict=True):
        axes.plot([0, 100], [0, 100], color="black", linestyle=":", linewidth=1, label="confidence = accuracy")
        title = f"{facet}, n = {facets[facet]['n']:,}\ncalibration error"
        for (model, of_model), marker in zip(reports.items(), "so", strict=False):
            calibration, colour = of_model[facet]["calibration"], COLOURS[model]
            keys = ("n", "confidence", "accuracy", "low", "high")
            n, x, y, low, high = np.array([[100 * b[key] for key in keys] for b in calibration["bins"]]).T
            axes.errorbar(x, y, yerr=np.clip([y - low, high - y], 0, None), color=colour, linewidth=1.2, capsize=2)
            axes.scatter(x, y, 12 + 140 * n / n.sum(), colour, marker=marker, label=model, zorder=3)
            title += f"\n{model} {100 * calibration['ece']:.1f} points"
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="confidence (%)", xlim=(0, 103), ylim=(-3, 103), aspect="equal")
    panels[0][0].set_ylabel("accuracy (%), 95 % interval")
    place = LEGEND_ABOVE | dict(loc="upper center", bbox_to_anchor=(0.5, 0.02))
    figure.legend(*axes.get_legend_handles_labels(), title="marker area: number of images", **place)
    figure.tight_layout()
    save_figure(figure, file)


def confusion(reports: dict[str, dict[str, Any]], facet: str, file: Path, most: int = 12) -> None:
    """Draw a confusion matrix for each model, in % of the images of each true class.

    reports: model -> `classification_report` of the facet. Only the `most` frequent classes are shown, so that the
    shares of a row may add up to less than 100 %.
    """
    first = reports["unadapted"]
    totals = np.array(first["confusion"]).sum(axis=1)
    shown = np.sort(np.argsort(-totals, kind="stable")[:most])
    names = [first["classes"][c] for c in shown]
    side = 1.4 + 0.5 * len(names)
    size = (side * len(reports) + 1.5, side + 1)
    figure, panels = plt.subplots(1, len(reports), figsize=size, squeeze=False, sharey=True)
    for axes, (model, report) in zip(panels[0], reports.items(), strict=True):
        shares = (100 * np.array(report["confusion"]) / np.maximum(totals, 1)[:, None])[np.ix_(shown, shown)]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.argwhere(shares >= 0.5):
            colour = "white" if shares[row, column] > 55 else "black"
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), [f"{name} ({totals[c]})" for name, c in zip(names, shown, strict=True)])
        axes.set_title(f"{model}: accuracy {percent(report['accuracy'])}", fontsize=11, pad=8)
        axes.set_xlabel(f"predicted {facet}")
    panels[0][0].set_ylabel(f"true {facet} (images)")
    figure.tight_layout()
    of_all = f", the {most} most frequent of {len(totals)} classes" if len(totals) > most else ""
    figure.suptitle(f"% of the images of each true {facet}, n = {first['n']:,}{of_all}", fontsize=11, y=1.03)
    save_figure(figure, file)


def search_results(title: str, rows: dict[str, list[tuple[Image.Image, str, str]]], file: Path) -> None:
    """Draw the images of a search, a row per model. rows: model -> (image, text above it, text below it)."""
    colours = {"unadapted": "#555555", "adapted": ADAPTED}  # the grey of bars is too pale for text
    columns = max(map(len, rows.values()))
    figure, grid = plt.subplots(len(rows), columns, figsize=(1.7 * columns, 2.5 * len(rows)), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for panels, (model, cells) in zip(grid, rows.items(), strict=True):
        style: dict[str, Any] = dict(color=colours[model], transform=panels[0].transAxes, fontsize=11)
        panels[0].text(0, 1.24, f"{model}, cosine similarity", **style)
        for axes, (image, above, below) in zip(panels, cells, strict=False):
            axes.imshow(image.convert("RGB"))
            axes.set_title(above, fontsize=9, color=colours[model], fontweight="bold", pad=3)
            text = "\n".join(textwrap.shorten(line, 24) for line in below.split("\n"))
            axes.text(0.5, -0.04, text, transform=axes.transAxes, fontsize=8.5, ha="center", va="top")
    figure.suptitle(textwrap.fill(title, 14 * columns), fontsize=11, y=1.04)
    figure.subplots_adjust(hspace=0.55, wspace=0.1)
    save_figure(figure, file)


def memory_curve(curve: dict[str, Any], file: Path) -> None:
    """Draw peak memory over the batch size, in chunks and at once, and the limit that is expected of chunks."""
    chunks, plain = curve["in chunks"], curve["plain"]
    first, label = chunks[0], f"cached gradients in chunks of {curve['chunk']} pairs"
    limits = [{**row, "peak": 1.15 * (first["peak"] + row["features"] + row["logits"])} for row in chunks]
    figure, axes = plt.subplots(figsize=(7, 4))
    lines: list[tuple[list[dict[str, Any]], str, dict[str, Any]]] = [
        (plain, "plain step, all pairs at once", dict(color=ACCENT, marker="s", linestyle="-.")),
        (chunks, label, dict(color=ADAPTED, marker="o")),
        (limits, f"peak of {first['batch']}, features and logits, plus 15 %", dict(color="black", linestyle=":")),
    ]
    for rows, name, style in lines:
        axes.plot([row["batch"] for row in rows], [row["peak"] / 2**30 for row in rows], label=name, **style)
    ticks = sorted({row["batch"] for row in [*chunks, *plain]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel="pairs in the contrastive batch", ylabel="peak memory of a step (GiB)", ylim=(0, None))
    axes.legend(**LEGEND_ABOVE | {"ncols": 1})
    save_figure(figure, file)
