"""Results tables: one row per metric, one column per model."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One metric of each model."""

    name: str
    results: dict[str, dict[str, Any]]  # model -> {"value", "chance" (optional); of a share also "low", "high"}
    n: int | str


def metric_rows(name: str, reports: dict[str, dict[str, Any]], n: int | str) -> list[Row]:
    """Make a row of every metric in the reports (model -> report). A metric is an entry that has a "value"."""
    rows = []
    for key, entry in list(reports.values())[-1].items():
        if isinstance(entry, dict) and "value" in entry:
            # "recall@10" -> "Recall@10", "median_rank" -> "median rank", "mrr" -> "MRR"
            short = len(key.partition("@")[0]) <= 5
            title = key.upper() if short else key.capitalize() if "@" in key else key.replace("_", " ")
            rows.append(Row(f"{name}, {title}", {model: report[key] for model, report in reports.items()}, n))
    return rows


def percent(row: dict[str, float]) -> str:
    """Format a share and its interval: "18.4 % [15.2, 21.5]"."""
    return f"{100 * row['value']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def comparison(rows: Sequence[Row]) -> list[list[str]]:
    """Format rows as text, heading first: metric, one column per model, chance level, n.

    Metrics with an interval are shares, shown in per cent. Others, such as a median rank, are shown as they are.
    """
    cells = [["", *rows[0].results, "chance level", "n"]]
    for name, results, n in rows:
        last = list(results.values())[-1]
        values = [percent(result) if "low" in result else f"{result['value']:g}" for result in results.values()]
        chance = f"{last['chance']:g}" if "chance" in last else ""
        if chance and "low" in last:
            chance = f"{100 * last['chance']:.1f} %" if last["chance"] >= 0.001 else f"{100 * last['chance']:.2g} %"
        cells.append([name, *values, chance, f"{n:,}" if isinstance(n, int) else n])
    return cells


def as_text(rows: list[list[str]]) -> str:
    """Align a table in columns, for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: list[list[str]]) -> str:
    """Format a table in Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|--:" * (len(rows[0]) - 1) + "|", *body])
