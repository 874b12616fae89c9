"""The benchmark: what it refuses before it measures, and what it leaves out."""

from pathlib import Path
from typing import Any

import pytest

from clip_medical.errors import UserError
from experiments import benchmark, benchmark_parts


@pytest.mark.parametrize("options", [{"repeats": 0}, {"batch_size": 1}, {"memory": 0.0}])
def test_settings_that_measure_nothing_are_refused(options: dict[str, Any]) -> None:
    """Mistake: a traceback of the median of no numbers, at the end of the measurement."""
    with pytest.raises(UserError, match="--repeats"):
        benchmark.Benchmark(**options)


def test_an_output_that_cannot_be_written_is_told_before_the_measurement(tmp_path: Path) -> None:
    """Mistake: a traceback after minutes of measuring, whose result is lost."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another --output"):
        benchmark.run(benchmark.Benchmark(output=str(tmp_path / "file" / "x")))


def test_the_largest_batch_is_told_only_where_memory_grows_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: a straight line through two peaks of which the larger batch has the smaller: minus 18,715 pairs."""
    peaks = {4: 2**30, 8: 2**30 + 4 * 2**20}
    monkeypatch.setattr(benchmark_parts, "fresh_process", lambda action, name, rows, size, precision: peaks[size])
    told = benchmark_parts.memory([], 8, "auto", budget=2.0)["ours"]
    assert told == {"peak bytes": peaks[8], "largest batch in 2.0 GiB, extrapolated": 8 + (2**30 - 4 * 2**20) / 2**20}
    peaks[8] = 2**30 - 1
    assert benchmark_parts.memory([], 8, "auto", budget=2.0)["ours"] == {"peak bytes": peaks[8]}
