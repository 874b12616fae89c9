"""Datasets on the Hub: the real clients against a local stand-in, with and without failures."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_medical.data.dataset import load_data
from clip_medical.data.roco import labels_from_cui
from clip_medical.data.splits import Split
from clip_medical.errors import UserError
from tests.stand_in_hub import StandInHub, clip_folder, roco_folder

ROOT = Path(__file__).resolve().parents[2]
ROCO, CLIP = "eltorio/ROCOv2-radiology", "openai/clip-vit-base-patch32"


@pytest.fixture(scope="module")
def roco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roco_folder(tmp_path_factory.mktemp("roco"))


@pytest.fixture
def hub(roco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """The stand-in, as the Hub of this process."""
    from huggingface_hub import constants

    with StandInHub() as server:
        server.add("datasets", ROCO, roco)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the pauses between huggingface_hub's attempts
        yield server


def assert_same_pixels(split: Split, other: Split, rows: list[int]) -> None:
    for row in rows:
        np.testing.assert_array_equal(np.asarray(split.open_image(row)), np.asarray(other.open_image(row)))


def test_the_hub_and_a_folder_give_the_same_rows(hub: StandInHub, roco: Path) -> None:
    """Catches rows, labels or pixels that depend on where the shards lie, and origins without the commit."""
    remote, local = load_data(ROCO), load_data(str(roco))
    commit = next(revision for revision in hub.repositories["datasets", ROCO] if revision != "main")
    assert (len(remote.train), len(remote.validation)) == (60, 20)
    assert remote.source == f"Hub commit {commit[:8]} of {ROCO} (train, validation)"
    assert remote.train.captions == local.train.captions and remote.train.ids == local.train.ids
    assert remote.train.labels == local.train.labels
    assert all(commit in origin for origin in remote.train.origins) and len(set(remote.train.origins)) == 60
    assert_same_pixels(remote.train, local.train, [0, 59, 30, 7])


def test_few_rows_cost_few_bytes(hub: StandInHub, tmp_path: Path) -> None:
    """Catches images fetched with the captions, and all row groups fetched for a sample of a few rows."""
    folder = roco_folder(tmp_path / "large", train=40, validation=40, shards=1, rows_per_group=5, size=200)
    name = "data/train-00000-of-00001.parquet"
    hub.add("datasets", "owner/large", folder)
    whole, footer = (folder / name).stat().st_size, 2**16  # pyarrow reads the last 64 KiB for the footer

    def fetched() -> int:
        return sum(last + 1 - first for first, last in hub.ranges(name))

    train = load_data("owner/large").train
    captions = fetched()
    assert len(train) == 40 and captions < footer + 0.1 * whole
    hub.requests.clear()
    train = load_data("owner/large", limit=4).train
    for row in range(len(train)):
        train.open_image(row)
    assert len(train) == 4 and fetched() < footer + 0.2 * whole  # one of eight row groups


def test_limit_is_drawn_by_the_seed(hub: StandInHub) -> None:
    """Catches a sample that is not reproducible, or that ignores the seed."""
    first, again, other = (load_data(ROCO, limit=4, seed=seed) for seed in (0, 0, 3))
    assert (len(first.train), len(first.validation)) == (4, 4)
    assert first.train.captions == again.train.captions != other.train.captions


def test_labels_of_roco(hub: StandInHub) -> None:
    """Catches "nan" taken for a code, codes that are not translated, and a row dropped because it has no codes."""
    train = load_data(ROCO).train
    assert train.labels["modality"][:5] == ["CT", "", "ultrasound", "MRI", "CT"]
    assert train.labels["anatomy"][5] == "chest" and train.labels["view"][5] == "anteroposterior"
    assert set(train.labels) == {"modality", "anatomy", "view"}
    assert train.ids[1] == "ROCOv2_2023_train_000001"
    cells = [None, [], ["nan"], ["C9999999", "C1306645", "C0023216", "C1996865"]]
    assert [labels[3] for labels in labels_from_cui(cells).values()] == ["X-ray", "lower limb", "posteroanterior"]
    assert all(labels[:3] == ["", "", ""] for labels in labels_from_cui(cells).values())
    assert labels_from_cui(["C1306645"]) == {}


def test_revision(hub: StandInHub, tmp_path: Path) -> None:
    """Catches --revision ignored, and cached images of one revision used for another."""
    commit = load_data(ROCO).source.split()[2]
    hub.add("datasets", ROCO, roco_folder(tmp_path / "new", train=30))
    newest = load_data(ROCO).train
    old = load_data(ROCO, revision=next(r for r in hub.repositories["datasets", ROCO] if r.startswith(commit))).train
    assert (len(newest), len(old)) == (30, 60)
    assert not set(newest.origins) & set(old.origins)
    with pytest.raises(UserError, match="no revision 'v9'.*--revision"):
        load_data(ROCO, revision="v9")


# ---- failures


def test_broken_connections_are_retried(hub: StandInHub, roco: Path) -> None:
    """Catches a first pass of hours that ends with the first broken connection."""
    remote = load_data(ROCO).train
    hub.drop["train-00000-of-00003.parquet"] = [0, 1000, 3]
    assert_same_pixels(remote, load_data(str(roco)).train, [0])
    assert hub.drop["train-00000-of-00003.parquet"] == []


def test_an_unavailable_shard_is_not_an_unreadable_image(hub: StandInHub) -> None:
    """Catches a failure of the network counted as one unreadable image, and a message that names no shard."""
    data = load_data(ROCO)
    hub.refuse["train-00000-of-00003.parquet"] = 404
    with pytest.raises(
        UserError, match="train-00000-of-00003.parquet cannot be read: .*run the same command"
    ) as caught:
        data.train.open_image(0)
    assert type(caught.value) is UserError and "\n" not in str(caught.value)


def test_unavailable_datasets(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and a message with the wrong advice."""
    with pytest.raises(UserError, match="owner/nothing is neither a local file or folder nor a dataset.*auth login"):
        load_data("owner/nothing")
    hub.refuse[ROCO] = 503
    with pytest.raises(UserError, match="cannot be reached.*hf download eltorio/ROCOv2-radiology .*--data FOLDER"):
        load_data(ROCO)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match="127.0.0.1:9 cannot be reached.*--data FOLDER") as caught:
        load_data(ROCO)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be reached.*--data FOLDER"):
        load_data(ROCO)


# ---- end to end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


FLAGS = "roco --limit 16 --batch-size 8 --steps 2".split()


@pytest.mark.slow
def test_train_roco(roco: Path, model: Path, tmp_path: Path) -> None:
    """Catches `python train.py roco` failing on the names, files and columns of the Hub, or on broken connections."""
    with StandInHub() as hub:
        hub.add("datasets", ROCO, roco)
        hub.add("models", CLIP, model)
        hub.drop["train-00001-of-00003.parquet"] = hub.drop["validation-00001-of-00003.parquet"] = [50]
        command = [sys.executable, "train.py", *FLAGS, "--output", str(tmp_path / "run")]
        environment = hub.environment(tmp_path) | {"CLIP_MEDICAL_CACHE": str(tmp_path / "images")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not any("/test-" in path for _, path, _ in hub.requests)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["data"]["training pairs"] == 16 and "modality" in report["adapted"]["zero_shot"]
    assert not list((tmp_path / "hub").rglob("*.parquet"))


@pytest.mark.slow
def test_train_roco_with_missing_parts(
    hub: StandInHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or a run folder left behind, if the model, a shard, the dataset or the Hub is missing."""
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--output", str(tmp_path / "run")])
    monkeypatch.setenv("CLIP_MEDICAL_CACHE", str(tmp_path / "images"))

    def error_message() -> str:
        assert train.main() == 2 and not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert CLIP in error_message()
    hub.add("models", CLIP, model)
    hub.refuse["train-00001-of-00003.parquet"] = 404
    assert "train-00001-of-00003.parquet cannot be read" in error_message()
    del hub.repositories["datasets", ROCO]
    assert f"{ROCO} is neither" in error_message()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert "127.0.0.1:9 cannot be reached" in error_message()


@pytest.mark.slow
def test_a_dataset_without_parquet(tmp_path: Path) -> None:
    """Catches a Hub id refused because its images are files beside a table, which `datasets` can read."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,caption {i}\n" for i in range(10)))
    for i in range(10):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    code = (
        "from clip_medical.data.dataset import load_data; train = load_data('owner/images').train\n"
        "print([f'caption {train.open_image(i).getpixel((0, 0))}' for i in range(len(train))] == train.captions)"
    )
    with StandInHub() as hub:
        hub.add("datasets", "owner/images", folder)
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
