"""The rows of mutants.py fit the code. That a test fails on each of them is checked by `make mutants`, in minutes."""

from tests.mutants import MUTANTS, misfits


def test_every_mutant_fits_the_code() -> None:
    """Catches a row whose text has changed in its file, or whose test was renamed: it would test nothing any more."""
    assert not misfits()


def test_every_mutant_changes_something() -> None:
    """Catches a row that replaces a text by itself, and one mistake listed twice."""
    assert all(mutant.right != mutant.wrong for mutant in MUTANTS)
    assert len({(mutant.file, mutant.right, mutant.wrong) for mutant in MUTANTS}) == len(MUTANTS) <= 64
