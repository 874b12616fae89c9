"""Write the tables of the READMEs from the results: `python -m experiments.tables`.

Between `<!-- table NAME -->` and `<!-- end -->` of each file in PAGES stands what `TABLES[NAME]` returns from the JSON
files in experiments/results, so that no figure is typed by hand. `tests/experiments/test_tables.py` compares them.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clip_medical.errors import UserError
from clip_medical.evaluation.report import WAYS, result_rows
from clip_medical.evaluation.table import Row, as_markdown, comparison, metric_rows
from clip_medical.run_folder import read_json, run_root
from experiments.common import RESULTS
from experiments.common import ROOT_OF_PROJECT as ROOT

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", RESULTS / "README.md"]
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHORT = tuple(f"{way}, Recall@10" for way in WAYS.values()) + ("zero-shot modality", "zero-shot anatomy", "zero-shot f")


def report_rows(file: Path) -> list[Row]:
    """The rows of a run's report.json."""
    if not (report := read_json(file)):
        raise UserError(f"{file.parent} has no report.json. Give the folder of a finished run of train.py.")
    return result_rows(report["unadapted"], report["adapted"])


def short_rows(file: Path) -> list[Row]:
    """The main rows of a run's report.json, without the number of classes, which can differ between runs."""
    rows = [row for row in report_rows(file) if row.name.startswith(SHORT)]
    return [row._replace(name=re.sub(r", \d+ classes", "", row.name)) for row in rows]


def side_by_side(columns: Sequence[dict[str, str]]) -> list[list[str]]:
    """The rows of a table, given its columns as name of the row -> cell. A cell that a column lacks is empty."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "") for column in columns)] for name in names]


def compared(folders: Sequence[str]) -> str:
    """The adapted results of several runs: a heading, then a row for each metric and a column for each folder."""
    tables = {folder: comparison(report_rows(run_root(folder) / "report.json")) for folder in folders}
    columns = [{metric: cell for metric, _, cell, *_ in rows} | {"": name} for name, rows in tables.items()]
    return f"# Adapted results of the runs\n\n{as_markdown(side_by_side(columns))}\n\n"


def overview() -> str:
    """The main rows of both data sets side by side."""
    columns: list[dict[str, str]] = []
    for folder, what in (("phantoms", "phantoms"), ("real", "real radiology images")):
        shown = short_rows(RESULTS / folder / "report.json")
        for place, head in ((1, f"{what}, n = {shown[0].n}: unadapted"), (2, "adapted")):
            columns.append({row[0]: row[place] for row in comparison(shown)} | {"": head})
    return as_markdown(side_by_side(columns))


def runs(folder: str, mean: bool = True) -> str:
    """The adapted results of several runs, report*.json, each under the flags of its command, and their mean."""
    files = sorted((RESULTS / folder).glob("report*.json"), key=lambda file: (len(file.name), file.name))
    flags = [re.sub("^python train.py|--(output|data) \\S+", "", read_json(f)["run"]["command"]).strip() for f in files]
    values = [{row.name: 100 * row.results["adapted"]["value"] for row in short_rows(file)} for file in files]
    assert files and all(of.keys() == values[0].keys() for of in values), f"{folder}: a run lacks a row"
    values += [{name: sum(of[name] for of in values) / len(files) for name in values[0]}] * mean
    body = side_by_side([{name: f"{x:.1f}" for name, x in of.items()} for of in values])
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
