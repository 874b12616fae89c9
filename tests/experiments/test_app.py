"""The page: what its tabs compute, bad uploads, and the page itself in a browser."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_medical.data.batches import prepare
from clip_medical.data.dataset import load_data
from clip_medical.errors import UserError
from clip_medical.model import NONE, load_clip
from clip_medical.run_folder import read_json
from experiments import figures
from experiments.app import OWN, App, Page
from experiments.common import RESULTS, Setup
from experiments.tables import compared
from lora import adapter_parameters, inject

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page() -> Page:
    """Twelve phantoms, the bundled model and the same with a random adapter."""
    models = {"unadapted": load_clip(), "adapted": load_clip()}
    inject(models["adapted"].model)
    with torch.no_grad():
        for matrix in adapter_parameters(models["adapted"].model):
            matrix.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    split = load_data("phantoms", limit=12, phantom_counts=(12, 12)).validation
    return Page(Setup(models, Path(), {}, []), prepare(split, models["adapted"].processor, "page"))


def test_search_shows_the_best_images_of_each_model(page: Page) -> None:
    """Catches images of one model beside scores of the other, and the worst images first."""
    unadapted, adapted = page.search("CT of the head", None, 3)
    scores = page.features["adapted"] @ page.models["adapted"].encode_texts("CT of the head")[0]
    assert [caption[:4] for _, caption in adapted] == [f"{score:.2f}" for score in scores.topk(3).values.tolist()]
    assert len(unadapted) == 3 and unadapted != adapted
    with pytest.raises(UserError, match="Type what to search for"):
        page.search("  ", None, 3)


def test_diagnosis_with_facets_and_with_own_labels(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an upload that is ignored beside the example, evidence for a label that is not the most probable one,
    and an unrelated image that is given a diagnosis."""
    page.pairs.split.open_image(5).save(tmp_path / "x.png")
    by_upload = page.diagnose(str(tmp_path / "x.png"), 0, "modality", "", False)
    assert by_upload[1:] == page.diagnose(None, 5, "modality", "", False)[1:] and by_upload[3] is None
    assert sum(by_upload[2].values()) == pytest.approx(1) and set(by_upload[2]) == set(page.classes["modality"])
    explained: list[str] = []
    draw = figures.evidence

    def spy(image: Image.Image, label: str, *others: Any) -> None:
        explained.append(label)
        draw(image, label, *others)

    monkeypatch.setattr(figures, "evidence", spy)
    shown = page.diagnose(None, 0, OWN, "CT of the head\n\n X-ray of the chest \nCT of the head", True)
    assert set(shown[1]) == {"CT of the head", "X-ray of the chest"} and shown[3].width > 300
    assert explained == [max(shown[2], key=lambda label: shown[2][label])]
    with pytest.raises(UserError, match="two or more labels"):
        page.diagnose(None, 0, OWN, "CT of the head", False)
    clip = page.models["adapted"]
    clip.calibration = {"modality": {"scale": 50.0, "floor": 1.1, "offsets": {}}}
    assert next(iter(page.diagnose(None, 0, "modality", "", False)[2])) == NONE
    clip.calibration = {}


def test_the_dial_moves_the_scores_and_is_put_back(page: Page) -> None:
    """Catches a dial without effect, and a page that goes on with the strength that was last tried."""
    trained = page.dial(1.0, 3, "anatomy")[1]
    base = page.dial(0.0, 3, "anatomy")[1]
    assert trained != base and page.dial(1.0, 3, "anatomy")[1] == trained
    assert base == pytest.approx(page.diagnose(None, 3, "anatomy", "", False)[1], abs=1e-5)
    rows = page.layers()
    assert len(rows) == 12 and all(0 < float(row[4]) <= 8 for row in rows)


def test_runs_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches results under the name of another run or of the unadapted model, a metric of one run that moves the
    columns of the others, and a traceback for a folder that holds no finished run."""
    monkeypatch.chdir(tmp_path)
    stored = read_json(RESULTS / "phantoms" / "report.json")
    for name, recall in (("b", 0.5), ("a", 0.25)):
        stored["adapted"]["retrieval"]["text_to_image"]["recall@10"] |= {"value": recall, "low": 0.125, "high": 0.75}
        Path(name).mkdir()
        Path(name, "report.json").write_text(json.dumps(stored))
        stored["adapted"]["zero_shot"].pop("modality", None)  # the second has none
    table = [line[2:-2].split(" | ") for line in compared(["a", "b"]).splitlines() if line.startswith("| ")]
    assert table[0] == ["", "a", "b"]
    cells = {name: values for name, *values in table[1:]}
    assert cells["text -> image, Recall@10"] == ["25.0 % [12.5, 75.0]", "50.0 % [12.5, 75.0]"]
    (modality,) = (values for name, values in cells.items() if name.startswith("zero-shot modality"))
    assert len(modality) == 2 and not modality[0] and modality[1].endswith("]")
    with pytest.raises(UserError, match=r"^c has no report.json\. Give the folder of a finished run of train.py\.$"):
        App(run="a", compare=("b", "c")).perform()
    with pytest.raises(UserError, match="--run"):
        App(model="tiny-clip", compare=("b",)).perform()


def bad_uploads(folder: Path) -> Iterator[Path]:
    """Files that are no usable image: empty, truncated, of other types, with odd DICOM tags, and bombs."""
    png = io.BytesIO()
    Image.new("L", (64, 64), 90).save(png, "PNG")
    contents = {f"cut{n}.png": png.getvalue()[:n] for n in (0, 1, 8, 20, 33, 40, 60)}
    contents |= {f"{name}.png": start + b"\0" * 500 for name, start in {
        "zip": b"PK\3\4", "pdf": b"%PDF-1.7", "html": b"<html>", "gzip": b"\x1f\x8b", "heic": b"\0\0\0\x18ftypheic",
        "video": b"\0\0\0\x18ftypisom", "elf": b"\x7fELF", "npy": b"\x93NUMPY", "nrrd": b"NRRD0004",
        "lfs": b"version https://git-lfs", "tiff": b"II*\0\xff\xff\xff\xff", "jpeg": b"\xff\xd8\xff\xe0",
        "gif": b"GIF89a", "bmp": b"BM", "webp": b"RIFF\xff\xff\xff\x7fWEBP", "psd": b"8BPS",
    }.items()}  # fmt: skip
    dicom = b"\0" * 128 + b"DICM"
    contents |= {"tags.dcm": dicom + b"\xff" * 400, "short.dcm": dicom}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name


def test_bad_uploads_get_a_sentence(page: Page, tmp_path: Path) -> None:
    """Catches a traceback, or an answer, for a file that is no image."""
    files = list(bad_uploads(tmp_path))
    assert len(files) == 25
    for file in files:
        with pytest.raises(UserError) as caught:
            page.diagnose(str(file), 0, "modality", "", False)
        assert file.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_a_browser(finished: Path, tmp_path: Path) -> None:
    """Catches a tab that does not answer, errors on the console, requests to other hosts, and a page that does not fit
    on a phone. Prints how long search and dial take."""
    pytest.importorskip("gradio")
    api = pytest.importorskip("playwright.sync_api")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "bad.png").write_bytes(b"%PDF-1.7")
    shutil.copytree(finished, tmp_path / "other")
    command = [sys.executable, "-m", "experiments.app", "--run", str(finished), "--port", str(port)]
    command += ["--compare", str(tmp_path / "other")]
    with open(tmp_path / "log.txt", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for width, height in ((1280, 900), (390, 844)):
                use_the_page(browser.new_page(viewport={"width": width, "height": height}), port, tmp_path / "bad.png")
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=30)


def open_tab(tab: Any, name: str) -> None:
    """Click a tab; on a narrow window the last ones are in a menu."""
    button = tab.get_by_role("tab", name=name)
    if not button.count():
        tab.locator(".overflow-menu > button").click()
        button = tab.locator(".overflow-dropdown button", has_text=name)
    button.first.click()


def use_the_page(tab: Any, port: int, bad_file: Path) -> None:
    """Use each tab as a person would."""
    errors: list[str] = []
    hosts: set[str] = set()
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    for _ in range(120):
        try:
            tab.goto(f"http://127.0.0.1:{port}")
            break
        except Exception:  # the server is still loading the run
            time.sleep(0.5)
    began = time.perf_counter()
    tab.get_by_role("button", name="Search", exact=True).click()
    tab.locator(".grid-container img, .gallery-item img, button.thumbnail-item img").first.wait_for(timeout=20_000)
    searched = time.perf_counter() - began
    open_tab(tab, "Diagnose")
    tab.get_by_role("button", name="Diagnose", exact=True).click()
    tab.get_by_text("%").first.wait_for(timeout=20_000)
    tab.locator("input[type=file]").nth(1).set_input_files(str(bad_file))
    tab.get_by_role("button", name="Diagnose", exact=True).click()
    tab.get_by_text("bad.png cannot be read").first.wait_for(timeout=20_000)
    open_tab(tab, "Inside LoRA")
    tab.get_by_text("effective rank").first.wait_for(timeout=20_000)
    open_tab(tab, "Run")
    tab.get_by_role("heading", name="Before and after adaptation").wait_for(timeout=20_000)
    tab.get_by_role("heading", name="Adapted results of the runs").wait_for(timeout=20_000)
    tab.get_by_role("columnheader", name="/other").first.wait_for(timeout=20_000)
    print(f"search {searched:.1f} s; hosts {hosts}; console {errors}")
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    assert hosts == {f"127.0.0.1:{port}"} and not errors
