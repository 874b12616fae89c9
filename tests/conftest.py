"""Set before anything of the project is imported: no test may read or fill the user's own image cache."""

import os
import tempfile

import pytest


@pytest.fixture(scope="session", autouse=True)
def image_cache() -> "object":
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIP_MEDICAL_CACHE", os.path.join(folder, "cache"))
        yield folder
