"""Figures of the experiments. Colours as in the reports: grey is the unadapted model, blue the adapted one."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from torch import Tensor

from clip_medical.evaluation.plots import ACCENT, ADAPTED, COLOURS, save_figure
from clip_medical.evaluation.table import percent


def reliability(reports: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw accuracy over confidence, a panel for each facet. reports: facet -> model -> `classification_report`."""
    figure, panels = plt.subplots(1, len(reports), figsize=(3.3 * len(reports), 3.9), sharey=True, squeeze=False)
    for axes, (facet, models) in zip(panels[0], reports.items(), strict=True):
        axes.plot([0, 100], [0, 100], color="black", linestyle=":", linewidth=1, label="confidence = accuracy")
        title = f"{facet}, n = {models['unadapted']['n']:,}\ncalibration error"
        for (model, report), marker in zip(models.items(), "so", strict=False):
            calibration, colour = report["calibration"], COLOURS[model]
            keys = ("n", "confidence", "accuracy", "low", "high")
            n, x, y, low, high = np.array([[100 * b[key] for key in keys] for b in calibration["bins"]]).T
            axes.errorbar(x, y, yerr=np.clip([y - low, high - y], 0, None), color=colour, linewidth=1.2, capsize=2)
            axes.scatter(x, y, 12 + 140 * n / n.sum(), colour, marker=marker, label=model, zorder=3)
            own = report["uncalibrated"]
            x, y = np.array([[100 * b[key] for key in ("confidence", "accuracy")] for b in own["bins"]]).T
            axes.plot(x, y, ":", color=colour, linewidth=1.2, label=f"{model}, CLIP's own temperature")
            title += f"\n{model} {100 * own['ece']:.1f} -> {100 * calibration['ece']:.1f} points"
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="confidence (%)", xlim=(0, 103), ylim=(-3, 103), aspect="equal")
    panels[0][0].set_ylabel("accuracy (%), 95 % interval")
    place: dict[str, Any] = dict(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False)
    figure.legend(*axes.get_legend_handles_labels(), title="marker area: number of images", **place)
    figure.tight_layout()
    save_figure(figure, file)


def two_classes(reports: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw a task of two classes: the probabilities of the first class, and the ROC curve with the point chosen.

    reports: model -> `classification_report` with `two_class_report`.
    """
    figure, panels = plt.subplots(1, len(reports) + 1, figsize=(4 * (len(reports) + 1), 4.2))
    for axes, (model, report) in zip(panels, reports.items(), strict=False):
        positive, negative = report["classes"]
        edges = np.linspace(0, 1, 21)
        for name, key, colour in ((positive, "positive", ACCENT), (negative, "negative", ADAPTED)):
            values = report["probabilities"][key]
            axes.hist(values, edges, color=colour, alpha=0.55, label=f"{name} ({len(values)})")
        axes.axvline(report["threshold"], color="black", linestyle="--", linewidth=1, label="threshold")
        lines = [f"{name} {percent(report[name])}" for name in ("sensitivity", "specificity")]
        axes.set_title("\n".join([f"{model}: {positive}?", *lines]), fontsize=10)
        axes.set(xlabel=f"probability of {positive}", ylabel="images", xlim=(0, 1))
        axes.legend(frameon=False, fontsize=9)
        panels[-1].plot(
            *np.array(report["roc"]).T, color=COLOURS[model], label=f"{model}: AUROC {percent(report['auroc'])}"
        )
        point = 1 - report["specificity"]["value"], report["sensitivity"]["value"]
        panels[-1].plot(*point, "o", color=COLOURS[model])
    panels[-1].plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    panels[-1].set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", title="ROC; dot: at the threshold")
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    save_figure(figure, file)


def evidence(image: Image.Image, label: str, maps: dict[str, Tensor], file: Path) -> None:
    """Draw an image, and over it the `occlusion` map of each model: orange, where hiding it lowers the label."""
    figure, panels = plt.subplots(1, len(maps) + 1, figsize=(3.4 * (len(maps) + 1), 3.9))
    width, height = image.size
    most = max(float(drop.max()) for drop in maps.values())  # one scale for all models
    for axes, (model, drop) in zip(panels, [("image", None), *maps.items()], strict=True):
        axes.imshow(image.convert("L"), cmap="gray")
        axes.set(xticks=[], yticks=[], title=model if drop is None else f"{model}: at most {drop.max():.1f} nats")
        if drop is not None:
            side = min(image.size)  # the processor cuts the centre square
            x, y = (width - side) / 2, (height - side) / 2
            strength = drop.clamp(min=0).numpy() / max(most, 1e-9)
            axes.imshow(strength, cmap="Oranges", alpha=0.6 * strength, extent=(x, x + side, y + side, y))
            axes.set(xlim=(0, width), ylim=(height, 0))
    figure.suptitle(f"Evidence for “{label}” over the other labels: log-odds lost by hiding that part", fontsize=10)
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
    width, height = (1.4 + 0.5 * len(names)) * len(reports) + 1.5, 2.4 + 0.5 * len(names)
    figure, panels = plt.subplots(1, len(reports), figsize=(width, height), squeeze=False, sharey=True)
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
    classes = f"{len(names)} most frequent of {len(totals)} classes"
    figure.suptitle(f"% of the images of each true {facet}, n = {first['n']:,}, {classes}", fontsize=11, y=1.03)
    save_figure(figure, file)
