"""Set before anything of the project is imported: no test may read or fill the user's own image cache, and all run on
the CPU, from which the figures that they expect are, but for the processes that test_gpu.py starts."""

import os
import tempfile

import pytest

VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")  # None: all
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def visible_gpus() -> "str | None":
    """CUDA_VISIBLE_DEVICES as the user has it."""
    return VISIBLE


@pytest.fixture(scope="session", autouse=True)
def image_cache() -> "object":
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_MEDICAL_CACHE", os.path.join(folder, "cache"))
        yield folder
