"""Write the tables of the READMEs from the results: `python -m experiments.tables`.

Between `<!-- table NAME -->` and `<!-- end -->` of each file in PAGES stands what `TABLES[NAME]` returns from the JSON
files in experiments/results, so that no figure is typed by hand. `tests/experiments/test_tables.py` compares them.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from clip_medical.evaluation.report import WAYS, result_rows
from clip_medical.evaluation.table import Row, as_markdown, comparison, metric_rows
from clip_medical.run_folder import read_json
from experiments.common import RESULTS
from experiments.common import ROOT_OF_PROJECT as ROOT

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", RESULTS / "README.md"]
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHORT = tuple(f"{way}, Recall@10" for way in WAYS.values()) + ("zero-shot modality", "zero-shot anatomy", "zero-shot f")


def report_rows(file: Path) -> list[Row]:
    """The rows of a run's report.json."""
    report = read_json(file)
    return result_rows(report["unadapted"], report["adapted"])


def short_rows(file: Path) -> list[Row]:
    """The main rows of a run's report.json, without the number of classes, which can differ between runs."""
    rows = [row for row in report_rows(file) if row.name.startswith(SHORT)]
    return [row._replace(name=re.sub(r", \d+ classes", "", row.name)) for row in rows]


def overview() -> str:
    """The main rows of both data sets side by side."""
    head, parts = [""], []
    for folder, what in (("phantoms", "phantoms"), ("real", "real radiology images")):
        shown = short_rows(RESULTS / folder / "report.json")
        head += [f"{what}, n = {shown[0].n}: unadapted", "adapted"]
        parts.append({name: [before, after] for name, before, after, *_ in comparison(shown)[1:]})
    return as_markdown([head, *([name, *(x for part in parts for x in part.get(name, ["", ""]))] for name in parts[0])])


def runs(folder: str, mean: bool = True) -> str:
    """The adapted results of several runs, report*.json, each under the flags of its command, and their mean."""
    files = sorted((RESULTS / folder).glob("report*.json"), key=lambda file: (len(file.name), file.name))
    commands = [read_json(file)["run"]["command"] for file in files]
    flags = [re.sub("^python train.py|--(output|data) \\S+", "", command).strip() for command in commands]
    values: dict[str, list[float]] = {}
    for row in (row for file in files for row in short_rows(file)):
        values.setdefault(row.name, []).append(100 * row.results["adapted"]["value"])
    assert files and all(len(of) == len(files) for of in values.values()), f"{folder}: a run lacks a row"
    body = [[name, *(f"{x:.1f}" for x in [*of, sum(of) / len(of)][: len(of) + mean])] for name, of in values.items()]
    return as_markdown([["", *(f"`{x}`" if x else "as above" for x in flags), *["mean"] * mean], *body])


def experiment(name: str) -> str:
    """All rows of an experiment's results."""
    results = read_json(RESULTS / name)["results"]
    tasks = [(task, {model: reports[task] for model, reports in results.items()}) for task in results["adapted"]]
    rows = [row for task, reports in tasks for row in metric_rows(task, reports, reports["adapted"]["n"])]
    return as_markdown(comparison(rows))


TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "phantoms": lambda: as_markdown(comparison(report_rows(RESULTS / "phantoms" / "report.json"))),
    "phantoms-seeds": lambda: runs("phantoms"),
    "real-seeds": lambda: runs("real"),
    "real": lambda: as_markdown(comparison(report_rows(RESULTS / "real" / "report.json"))),
    "phantoms-pneumonia": lambda: experiment("phantoms/pneumonia.json"),
    "phantoms-head-or-spine": lambda: experiment("phantoms/head-or-spine.json"),
    "phantoms-stress": lambda: experiment("phantoms/stress_test.json"),
    "phantoms-towers": lambda: runs("phantoms/towers", mean=False),
    "phantoms-pointing": lambda: experiment("phantoms/pointing.json"),
    "real-stress": lambda: experiment("real/stress_test.json"),
}


def filled(page: str) -> str:
    """The text of a page with all its tables made anew."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def main() -> int:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
