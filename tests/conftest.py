"""Settings of the whole test run. The environment is set before anything of the project is imported.

No test reads or fills the user's own image cache. All tests run on the CPU, which the expected numbers come from,
except the processes that test_gpu.py starts.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # None: all
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TQDM_DISABLE"] = "1"
os.environ.pop("HF_HUB_OFFLINE", None)  # offline mode would refuse the local server of stand_in_hub.py too


@pytest.fixture
def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES as it was when pytest started."""
    return VISIBLE_GPUS


@pytest.fixture(scope="session", autouse=True)
def image_cache() -> Iterator[None]:
    """Put the image cache into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_MEDICAL_CACHE", os.path.join(folder, "cache"))
        yield


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Restore the handlers that a training run replaces, so that Ctrl-C ends the tests."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def project_copy(tmp_path: Path) -> Path:
    """Copy the project, for tests that edit its files."""
    copy, names = tmp_path / "project", ("lora", "clip_medical", "train.py")
    copy.mkdir()
    for name in names:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
    return copy
