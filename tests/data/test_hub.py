"""ROCOv2 from the Hub: the real clients against a stand-in for it on loopback, in good weather and bad."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_medical.data.roco import labels_from_cui
from clip_medical.data.sources import load_data
from clip_medical.errors import UserError
from tests.stand_in_hub import StandInHub, clip_folder, roco_folder

ROOT = Path(__file__).resolve().parents[2]
ROCO = "eltorio/ROCOv2-radiology"


@pytest.fixture(scope="module")
def roco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roco_folder(tmp_path_factory.mktemp("roco"))


@pytest.fixture
def hub(roco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """The stand-in, in the place of the Hub for this process."""
    from huggingface_hub import constants

    with StandInHub() as server:
        server.add("datasets", ROCO, roco)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the pauses between huggingface_hub's tries
        yield server


def pixels(split: object, row: int) -> np.ndarray:
    return np.asarray(split.open_image(row))  # type: ignore[attr-defined]


def test_streamed_downloaded_and_local_are_the_same(hub: StandInHub, roco: Path) -> None:
    """Catches rows or pixels that depend on the way they came, and shards fetched whole for their captions."""
    streamed = load_data(ROCO)
    footers = hub.fetched(".parquet")
    assert (len(streamed.train), len(streamed.validation)) == (60, 20)
    assert streamed.source.startswith("Hub commit ") and ROCO in streamed.source
    asked = [range_ for method, path, range_ in hub.requests if method == "GET" and path.endswith(".parquet")]
    assert asked and all(asked), "a shard was fetched whole"
    downloaded, local = load_data(ROCO, streaming=False), load_data(str(roco))
    assert streamed.train.captions == downloaded.train.captions == local.train.captions
    assert streamed.train.labels == downloaded.train.labels == local.train.labels
    assert streamed.train.origins == downloaded.train.origins != local.train.origins
    before = hub.fetched(".parquet")
    for row in (0, 59, 30, 7):
        np.testing.assert_array_equal(pixels(streamed.train, row), pixels(local.train, row))
        np.testing.assert_array_equal(pixels(downloaded.train, row), pixels(local.train, row))
    assert hub.fetched(".parquet") - before <= 4 * 3 and footers > 0


def test_a_limit_fetches_few_row_groups(hub: StandInHub) -> None:
    """Catches 18.6 GB fetched for a sample of 2,000 rows."""
    data = load_data(ROCO, limit=4)
    assert (len(data.train), len(data.validation)) == (4, 4)
    assert len({origin.rsplit(" ", 2)[0] for origin in data.train.origins}) == 1
    assert data.train.captions == load_data(ROCO, limit=4).train.captions
    assert data.train.captions != load_data(ROCO, limit=4, seed=3).train.captions


def test_what_is_particular_to_roco(hub: StandInHub) -> None:
    """Catches "nan" taken for a code, codes left as codes, and a row dropped because it has none."""
    train = load_data(ROCO).train
    assert train.labels["modality"][:5] == ["CT", "", "ultrasound", "MRI", "CT"]
    assert train.labels["anatomy"][5] == "chest" and train.labels["view"][5] == "anteroposterior"
    assert set(train.labels) == {"modality", "anatomy", "view"}
    assert train.ids[1] == "ROCOv2_2023_train_000001"
    cells = [None, [], ["nan"], ["C9999999", "C1306645", "C0023216", "C1996865"]]
    assert [labels[3] for labels in labels_from_cui(cells).values()] == ["X-ray", "lower limb", "posteroanterior"]
    assert all(labels[:3] == ["", "", ""] for labels in labels_from_cui(cells).values())


def test_a_revision_is_kept_to(hub: StandInHub, tmp_path: Path) -> None:
    """Catches a data set that changes under a fixed --revision, and one revision's cache read for another's."""
    commit = load_data(ROCO).source.split()[2]
    hub.add("datasets", ROCO, roco_folder(tmp_path / "new", train=30))
    newest = load_data(ROCO).train
    old = load_data(ROCO, revision=next(r for r in hub.repositories["datasets", ROCO] if r.startswith(commit))).train
    assert (len(newest), len(old)) == (30, 60)
    assert not set(newest.origins) & set(old.origins)
    with pytest.raises(UserError, match="no revision 'v9'.*--revision"):
        load_data(ROCO, revision="v9")


def test_broken_connections_are_mended(hub: StandInHub) -> None:
    """Catches a first pass of hours that ends with the first connection that breaks."""
    data = load_data(ROCO)
    expected = pixels(load_data(ROCO).train, 0)
    hub.drop["train-00000-of-00003.parquet"] = [0, 1000, 3]
    np.testing.assert_array_equal(pixels(data.train, 0), expected)
    assert hub.drop["train-00000-of-00003.parquet"] == []


def test_a_shard_that_does_not_come_is_one_sentence(hub: StandInHub) -> None:
    """Catches an unreachable shard counted as unreadable images, and a sentence without a way on."""
    data = load_data(ROCO)
    hub.refuse["train-00000-of-00003.parquet"] = 404
    with pytest.raises(
        UserError, match="train-00000-of-00003.parquet did not come from the Hub.*same command"
    ) as caught:
        data.train.open_image(0)
    assert type(caught.value) is UserError and "\n" not in str(caught.value)


def test_what_is_not_there_is_one_sentence(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, or a sentence that sends the user to the wrong place."""
    with pytest.raises(UserError, match="owner/nothing is no file or folder here and no data set on http.*auth login"):
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


def check_run(folder: Path, said: str) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["data"]["training pairs"] == 16 and "modality" in report["adapted"]["zero_shot"]
    assert "16 pictures in" in said


def test_train_roco_streaming(roco: Path, model: Path, tmp_path: Path) -> None:
    """Catches whatever keeps `python train.py roco` from its report: here it meets the names, files and columns that
    the Hub has, through HF_ENDPOINT, and connections that break."""
    with StandInHub() as hub:
        hub.add("datasets", ROCO, roco)
        hub.add("models", "openai/clip-vit-base-patch32", model)
        hub.drop["train-00001-of-00003.parquet"] = hub.drop["validation-00001-of-00003.parquet"] = [50]
        command = [sys.executable, "train.py", *FLAGS, "--output", str(tmp_path / "run")]
        environment = hub.environment(tmp_path) | {"CLIP_MEDICAL_CACHE": str(tmp_path / "images")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not any("/test-" in path for _, path, _ in hub.requests)
    check_run(tmp_path / "run", done.stdout)
    assert not list((tmp_path / "hub").rglob("*.parquet"))


def test_train_roco_downloaded(
    hub: StandInHub,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches the same where the shards are downloaded first; a model that is missing must stop it in one sentence."""
    import train

    flags = [*FLAGS, "--streaming", "off", "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    assert train.main() == 2
    assert "openai/clip-vit-base-patch32" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    hub.add("models", "openai/clip-vit-base-patch32", model)
    assert train.main() == 0
    check_run(tmp_path / "run", capsys.readouterr().out)
    assert list((tmp_path / "hub").rglob("*.parquet"))


def test_train_roco_without_its_data_is_one_sentence(
    hub: StandInHub,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, or a run folder left behind, where a shard, the data set or the whole network is missing."""
    import train

    hub.add("models", "openai/clip-vit-base-patch32", model)
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--output", str(tmp_path / "run")])
    monkeypatch.setenv("CLIP_MEDICAL_CACHE", str(tmp_path / "images"))

    def said() -> str:
        assert train.main() == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert ROCO in message and "--data" in message and not (tmp_path / "run").exists()
        return message

    hub.refuse["train-00001-of-00003.parquet"] = 404
    assert "train-00001-of-00003.parquet did not come" in said()
    del hub.repositories["datasets", ROCO]
    assert "no data set on http" in said()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert "127.0.0.1:9 cannot be reached" in said()


PICTURES = "from clip_medical.data.sources import load_data as l; print(len(l('me/pictures').train))"


def test_a_data_set_that_is_not_in_parquet(tmp_path: Path) -> None:
    """Catches a Hub id refused because its images lie beside a table: the real `datasets` reads that layout."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file_name,text", *(f"{i}.png,caption {i}" for i in range(10))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    for i in range(10):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    with StandInHub() as hub:
        hub.add("datasets", "me/pictures", folder)
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", PICTURES], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "9", done.stderr
