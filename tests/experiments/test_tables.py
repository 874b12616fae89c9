"""The tables of the READMEs are those of the JSON files."""

import re

import pytest

from experiments.tables import MARKED, PAGES, TABLES, filled


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_tables_are_those_of_the_results(page: object) -> None:
    """Catches a figure typed by hand, and results that were measured again without their table."""
    text = page.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    assert [match[2] for match in MARKED.finditer(text)] == re.findall(r"<!-- table (\S+) -->", text)
    assert filled(text) == text, "Run python -m experiments.tables"


def test_every_table_is_shown() -> None:
    """Catches results that nobody sees."""
    shown = {match[2] for page in PAGES for match in MARKED.finditer(page.read_text(encoding="utf-8"))}
    assert shown == set(TABLES)
