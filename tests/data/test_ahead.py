"""Phantoms drawn ahead: those that train.py will ask for, by a process that nobody notices."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

from clip_medical import load_clip
from clip_medical.data import ahead
from clip_medical.data.cache import cache_key, cache_root
from clip_medical.data.sources import load_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIP_MEDICAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wanted(limit: int, seed: int) -> set[Path]:
    """The folders of the cache that train.py will look for."""
    data, size = load_data("phantoms", limit=limit, seed=seed), load_clip("tiny-clip").image_size
    return {cache_root() / cache_key(split, size) for split in (data.train, data.validation)}


def python(code: str, *arguments: str, cwd: Path = ROOT) -> tuple[str, str]:
    """What the code says on stdout and stderr."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr


def drawn(cache: Path, *arguments: str) -> set[Path]:
    """The folders of the cache when the drawing has ended."""
    code = "import sys; from clip_medical.data import ahead; ahead.start(sys.argv[1:]).wait(); print('quiet')"
    assert python(code, *arguments) == ("quiet\n", "")
    return {path for path in cache.glob("*") if path.is_dir()}


def test_it_draws_what_train_will_ask_for(own_cache: Path) -> None:
    """Catches another seed, limit, size or split than train.py's: then everything would be drawn twice."""
    assert drawn(own_cache, "--limit", "4", "--seed=3") == wanted(limit=4, seed=3)


def test_train_starts_it_with_its_own_arguments_in_any_folder(tmp_path: Path) -> None:
    """Catches flags lost on the way, modules not found or found in the current folder, and drawing that needs torch."""
    # in torch's place a module that ends train.py as soon as both folders are there
    modules, here = tmp_path / "modules", tmp_path / "here"
    modules.mkdir()
    here.mkdir()
    (modules / "torch.py").write_text(
        "import os, sys, time\n"
        f"while not all(map(os.path.isdir, {[str(folder) for folder in wanted(limit=4, seed=5)]})):\n"
        "    time.sleep(0.05)\n"
        "sys.exit('both are there')\n"
    )
    (here / "random.py").write_text("raise SystemExit('not this one')")
    code = f"""
import runpy, sys
sys.path[:] = {[str(modules), str(ROOT)]} + [path for path in sys.path if path]
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""
    assert python(code, "demo", "--limit", "4", "--seed", "5", cwd=here) == ("", "both are there\n")


@pytest.mark.parametrize("arguments", [["--data=/nowhere"], ["roco"], ["demo", "--model", "/nowhere"], ["--bogus"]])
def test_the_rest_is_left_to_train(own_cache: Path, arguments: list[str]) -> None:
    """Catches phantoms that nobody asked for or of a size that the model does not see, and a mistake told twice."""
    assert not drawn(own_cache, *arguments, "--limit", "4")


def test_it_ends_with_the_process_that_started_it() -> None:
    """Catches a process that draws on after a mistake or a kill: this one would wait at a lock for ever."""
    code = """
import time
from clip_medical.data import ahead
process = ahead.start(["--limit", "4"])
time.sleep(2)
print(process.poll())
process.stdin.close()  # as it is closed when a process ends
print(process.wait(30))
"""
    with ExitStack() as locks:
        for folder in wanted(limit=4, seed=0):
            folder.parent.mkdir(exist_ok=True)
            locks.enter_context(FileLock(folder.with_suffix(".lock")))
        assert python(code) == ("None\n0\n", "")


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fails for what was to save it time."""

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert ahead.start([]) is None
