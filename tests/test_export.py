"""Exports as their users meet them: PEFT, transformers and onnxruntime load them; what is wrong gets one sentence."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from stand_in_hub import clip_folder
from stand_in_upload import UploadHub
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, pipeline

import train
from clip_medical import export, load_clip, load_run
from clip_medical.data.phantoms import phantom
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.model_card import model_card
from clip_medical.provenance import weights_fingerprint

ROOT = Path(export.__file__).resolve().parent.parent
LABELS = ["X-ray of the chest", "CT of the head", "MRI of the knee"]
PICTURES = [phantom(1, "validation", row).image for row in range(4)]


def command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        return export.main()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("base") / "clip", bin_file=False)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose adapter shows: a high learning rate, and a temperature that was trained."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    flags = "--limit 20 --batch-size 8 --steps 4 --lr 0.05 --train-logit-scale".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags, "--model", str(base), "--output", str(folder)])
        assert train.main() == 0
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export once, use often."""

    def get(to: str, *flags: str) -> Path:
        folder = run / "export" / "-".join([to, *flags[1:]])
        assert folder.exists() or command("--run", run, "--to", to, *flags) == 0
        return folder

    return get


@pytest.fixture(scope="module")
def adapted(run: Path) -> Clip:
    return load_run(run)


def both(clip: Clip) -> Tensor:
    return torch.cat([clip.encode_images(PICTURES), clip.encode_texts(LABELS)])


def differ(a: Clip, b: Clip) -> float:
    return (both(a) - both(b)).abs().max().item()


# ---- adapter


def test_the_adapter_works_in_peft(exported: Callable[..., Path], adapted: Clip, base: Path) -> None:
    """Catches an export that PEFT reads otherwise than we do, and files beside it that PEFT stumbles over."""
    peft = pytest.importorskip("peft")
    model = CLIPModel.from_pretrained(base)
    inputs = {"input_ids": adapted.tokens(LABELS)[0], "pixel_values": torch.randn(3, 3, 224, 224)}
    adapted.model.eval()
    with torch.no_grad():
        before = model(**inputs).logits_per_image
        theirs = peft.PeftModel.from_pretrained(model, exported("adapter")).eval()
        theirs.base_model.model.logit_scale.copy_(adapted.model.logit_scale)  # beside the adapter, as the card says
        logits, expected = theirs(**inputs).logits_per_image, adapted.model(**inputs).logits_per_image
    assert (before - expected).abs().max() > 1e-2, "the adapter must show"
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_the_adapter_folder_is_the_run(exported: Callable[..., Path], run: Path, adapted: Clip) -> None:
    """Catches an export without the trained temperature or without its provenance."""
    again = load_run(exported("adapter"))
    assert differ(again, adapted) == 0
    assert again.model.logit_scale.item() == adapted.model.logit_scale.item()
    assert again.model.logit_scale.item() != load_clip(adapted.name).model.logit_scale.item()
    facts = json.loads((exported("adapter") / "provenance.json").read_text())
    assert facts["model"]["fingerprint"] == adapted.fingerprint and facts["data"]["fingerprint"]
    assert facts["run"]["command"].startswith("python train.py") and facts["environment"]["torch"]


def test_a_foreign_adapter_without_provenance_loads(base: Path, tmp_path: Path) -> None:
    """Catches a loader that takes its own exports alone: an adapter that PEFT saved names its base itself."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(CLIPModel.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["k_proj"]))
    model.save_pretrained(tmp_path / "theirs")
    assert load_run(tmp_path / "theirs").classify(PICTURES[0], LABELS)


# ---- merged


def test_the_merged_model_needs_no_code_of_ours(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches an adapter not merged, a temperature not baked in, and a missing or wrong preprocessor."""
    folder = exported("merged")
    model = CLIPModel.from_pretrained(folder)
    assert model.dtype == torch.float32 and not any("lora" in name for name in model.state_dict())
    assert model.logit_scale.item() == adapted.model.logit_scale.item()
    assert differ(load_clip(str(folder)), adapted) < 1e-5
    assert differ(load_clip(adapted.name), adapted) > 1e-2, "the adapter must show"
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    for picture in PICTURES:
        answers = classify(picture.convert("RGB"), candidate_labels=LABELS, hypothesis_template="{}")
        expected = adapted.classify(picture, LABELS)
        assert {a["label"]: a["score"] for a in answers} == pytest.approx(expected, abs=1e-4)


def test_half_precision_is_cast_once_and_its_loss_told(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a merge computed in fp16 (the base rounded first, then the sum), and a loss that nobody is told of."""
    half = load_file(exported("merged", "--dtype", "fp16") / "model.safetensors")
    full = load_file(exported("merged") / "model.safetensors")
    assert all(torch.equal(half[name], full[name].half()) for name in full)
    off = differ(load_clip(str(exported("merged", "--dtype", "fp16"))), adapted)
    assert 0 < off < 1e-2
    card = (exported("merged", "--dtype", "fp16") / "README.md").read_text()
    told = float(re.search(r"float16 and read back, by at most (\S+);", card)[1])  # type: ignore[index]
    assert off / 10 < told < off * 10


# ---- ONNX


@pytest.fixture
def needs_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


@pytest.mark.usefixtures("needs_onnx")
def test_onnx_gives_the_features_of_the_model(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a batch or length that the tracing froze, a mask that was dropped, an adapter that was not merged."""
    from clip_medical.onnx_export import compare, image_cases, text_cases

    pixels, texts = export.samples(adapted)
    folder = exported("onnx")
    assert compare(folder / "image_encoder.onnx", list(image_cases(adapted, pixels))) < 1e-4
    cases = list(text_cases(adapted, texts, range(5, 78)))
    assert {tuple(case["input_ids"].shape) for case, _ in cases} == {(n, k) for n in (1, 3, 17) for k in range(5, 78)}
    assert compare(folder / "text_encoder.onnx", cases) < 1e-4
    assert compare(folder / "text_encoder.onnx", list(text_cases(load_clip(adapted.name), texts, [9]))) > 1e-3


@pytest.mark.usefixtures("needs_onnx")
def test_onnx_serves_with_what_lies_in_its_folder(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a folder without tokenizer, preprocessor or temperature; and this machine's paths in a published file."""
    import onnxruntime

    folder = exported("onnx")
    names = ("image_encoder.onnx", "text_encoder.onnx")
    images, texts = (onnxruntime.InferenceSession(folder / name) for name in names)
    pixels = CLIPImageProcessor.from_pretrained(folder)([PICTURES[0].convert("RGB")], return_tensors="np")
    ids = CLIPTokenizer.from_pretrained(folder)(LABELS, padding=True, return_tensors="np")
    cosines = torch.from_numpy(images.run(None, dict(pixels))[0] @ texts.run(None, dict(ids))[0].T)
    scale = json.loads((folder / "logit_scale.json").read_text())["logit_scale"]
    probabilities = (torch.tensor(scale).exp() * cosines).softmax(-1)[0].tolist()
    assert dict(zip(LABELS, probabilities, strict=True)) == pytest.approx(
        adapted.classify(PICTURES[0], LABELS), abs=1e-4
    )
    for name in names:
        content = (folder / name).read_bytes()
        assert b"site-packages" not in content and str(Path(export.__file__).parent).encode() not in content


# ---- the card


def report(run: Path, source: str, base: str, revision: str | None = None) -> dict[str, Any]:
    found = json.loads((run / "report.json").read_text())
    return found | {
        "data": found["data"] | {"source": source},
        "model": found["model"] | {"base": base, "revision": revision},
    }


@pytest.mark.parametrize("to", ["adapter", "merged", "onnx"])
@pytest.mark.parametrize(
    ("source", "model", "revision", "licence", "says"),
    [
        ("Hub eltorio/ROCOv2-radiology (train, validation)", "openai/clip", "abc", "cc-by-nc-sa-4.0", "non-commercial"),
        ("phantoms, seed 0", "tiny-clip", None, "mit", "no patient"),
        ("phantoms, seed 0", "openai/clip", "abc", None, "no patient"),
        ("folder ../phantoms", "tiny-clip", None, None, "fill them in"),
    ],
)
def test_the_card_claims_what_is_known(
    run: Path, tmp_path: Path, to: str, source: str, model: str, revision: str | None, licence: str | None, says: str
) -> None:
    """Catches a licence nobody gave, weights of ROCOv2 without its terms, bad YAML, a base that is not on the Hub."""
    (tmp_path / "README.md").write_text(model_card(to, report(run, source, model, revision), ["It was checked."]))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.get("license") == licence and says in card.text
    assert card.data.library_name == {"adapter": "peft", "merged": "transformers", "onnx": "onnx"}[to]
    assert card.data.get("base_model") == (model if revision else None)
    assert "Not a medical device" in card.text and "It was checked." in card.text
    text = json.loads((run / "report.json").read_text())["adapted"]["retrieval"]["text_to_image"]["recall@5"]
    row = next(line for line in card.text.splitlines() if line.startswith("| text -> image, Recall@5"))
    assert f"{100 * text['value']:.1f} % [{100 * text['low']:.1f}, {100 * text['high']:.1f}]" in row
    assert row.endswith("| 20 |")


# ---- interruptions and mistakes


def test_an_interrupted_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an export that is written under its final name from the start: here Ctrl-C comes before the card."""

    def stop(*_: object) -> str:
        assert [p.name for p in tmp_path.rglob("model.safetensors")], "the weights were there already"
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", stop)
    assert command("--run", run, "--to", "merged", "--output", tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("needs_onnx")
def test_an_onnx_file_that_differs_is_not_published(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison whose result nobody looks at."""
    from clip_medical import onnx_export

    monkeypatch.setattr(onnx_export, "TOLERANCE", 1e-12)
    with pytest.raises(RuntimeError, match="differ"):
        command("--run", run, "--to", "onnx", "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def another_base(copy: Path, base: Path) -> None:
    """The same folder name in the adapter's config, other weights in the folder."""
    shutil.copytree(base, copy / "base")
    weights = load_file(copy / "base" / "model.safetensors")
    weights["visual_projection.weight"] += 0.01
    save_file(weights, copy / "base" / "model.safetensors", {"format": "pt"})
    edit(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(copy / "base"))


def another_architecture(copy: Path, base: Path) -> None:
    edit(copy / "adapter" / "adapter_config.json", r=3)


MISTAKES: dict[str, tuple[list[str], Callable[[Path, Path], object], str]] = {
    "no run": (["--run", "{copy}/nowhere", "--to", "merged"], lambda *_: 0, "train.py"),
    "half a run": (["--to", "merged"], lambda copy, _: (copy / "report.json").unlink(), "--resume"),
    "no adapter": (["--to", "merged"], lambda copy, _: shutil.rmtree(copy / "adapter"), "--resume"),
    "damaged report": (["--to", "merged"], lambda copy, _: (copy / "report.json").write_text("{"), "report.json"),
    "another base": (["--to", "merged"], another_base, "bring back that version"),
    "another rank": (["--to", "adapter"], another_architecture, "another model or rank"),
    "base is gone": (
        ["--to", "merged"],
        lambda copy, _: edit(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(copy / "gone")),
        "gone",
    ),
    "output exists": (["--to", "adapter", "--output", "{copy}"], lambda *_: 0, "choose another --output"),
    "output below a file": (["--to", "adapter", "--output", "{copy}/config.json/x"], lambda *_: 0, "--output"),
    "unknown kind": (["--to", "tflite"], lambda *_: 0, "tflite"),
    "kind not given": ([], lambda *_: 0, "--to"),
    "dtype of an adapter": (["--to", "adapter", "--dtype", "fp16"], lambda *_: 0, "leave it out"),
    "bad name": (["--to", "adapter", "--push", "thing"], lambda *_: 0, "owner/name"),
    "yes to nothing": (["--to", "adapter", "--yes"], lambda *_: 0, "--push"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_writes_nothing(
    mistake: str, run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, another exit code, a sentence without the remedy, and an export made all the same."""
    arguments, harm, named = MISTAKES[mistake]
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    harm(copy, base)
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(copy=copy) for argument in arguments]
    assert command(*([] if "--run" in given else ["--run", copy]), *given) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("export: ") and named in said and len(said) < 500
    assert not (copy / "export" / "merged").exists() and not (copy / "export" / "adapter").exists()
    assert [p for p in sorted(tmp_path.rglob("*")) if p.name != "export"] == before


def test_a_missing_extra_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an ImportError from the depths, after the model was loaded and the folder made."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert command("--run", run, "--to", "onnx", "--output", run / "out") == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
    assert not (run / "out").exists()


@pytest.mark.parametrize("name", ["runs/nowhere", "nowhere", "merged", "too/many/parts"])
def test_load_run_refuses_what_is_no_adapter(
    name: str, exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a search of the Hub for a folder that was misspelt, and a merged model taken for a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="load_clip"):
        load_run(exported("merged") if name == "merged" else name)


def test_fingerprints_tell_weights_apart_and_not_formats(base: Path) -> None:
    """Catches a fingerprint that ignores a weight, or that changes where the same values are stored in fp16."""
    model = load_clip(str(base)).model.half()
    before = weights_fingerprint(model)
    assert weights_fingerprint(model.float()) == before
    weight = model.text_model.encoder.layers[0].mlp.fc1.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert weights_fingerprint(model) != before
    assert load_clip(str(base), dtype=torch.bfloat16).fingerprint == load_clip(str(base)).fingerprint


# ---- the Hub


def test_a_dry_run_lists_and_sends_nothing(
    run: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an upload nobody confirmed, a list that leaves files out, and a card made anew over edits."""
    folder = exported("merged")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nWords of the user.\n")
    monkeypatch.setattr(export, "HfApi", lambda: pytest.fail("nothing may be asked of the Hub"))
    capsys.readouterr()
    assert command("--run", run, "--to", "merged", "--push", "me/chest") == 0
    said = capsys.readouterr().out
    for file in folder.iterdir():
        assert re.search(rf"{file.stat().st_size:,} bytes  {re.escape(file.name)}\n", said)
    assert "Nothing was uploaded" in said and "--yes" in said
    assert "Words of the user." in card.read_text() and 'model="me/chest"' in card.read_text()


def test_no_network_is_one_sentence(
    run: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of the HTTP library, whose exceptions are not OSErrors. Nothing listens on port 9."""
    assert exported("adapter").is_dir()
    monkeypatch.setattr(export, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    assert command("--run", run, "--to", "adapter", "--push", "me/chest", "--yes") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("export: me/chest was not uploaded") and "network" in said


def test_only_the_export_of_this_adapter_is_pushed_again(
    run: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches a push of whatever stands in the output folder: here an export made before the adapter changed."""
    shutil.copytree(exported("adapter"), tmp_path / "old")
    push = ["--run", run, "--output", tmp_path / "old", "--push", "me/chest"]
    assert command(*push, "--to", "adapter") == 0
    assert command(*push, "--to", "merged") == 2
    facts = json.loads((tmp_path / "old" / "provenance.json").read_text())
    edit(tmp_path / "old" / "provenance.json", export=facts["export"] | {"adapter": "0" * 64})
    assert command(*push, "--to", "adapter") == 2


UPLOAD_AND_LOAD = """
import json, os, sys
from PIL import Image
from clip_medical import export, load_run
from clip_medical.errors import UserError

sys.argv[0] = "export.py"
token = os.environ.pop("HF_TOKEN")
codes = [export.main()]
os.environ["HF_TOKEN"] = token
codes += [export.main(), export.main()]
clip = load_run("me/chest")
try:
    load_run("me/nothing")
except UserError as error:
    refusal = str(error)
print(json.dumps([codes, clip.classify(Image.open(os.environ["PICTURE"]), json.loads(os.environ["LABELS"])), refusal]))
"""


def test_what_was_pushed_loads_by_its_name(
    run: Path, exported: Callable[..., Path], adapted: Clip, tmp_path: Path
) -> None:
    """Catches a broken upload, a public repository that nobody asked for, a traceback where the login is missing.

    A process of its own, with a stand-in for the Hub: first without a token, then with it, twice; then it loads.
    """
    folder = exported("adapter")
    PICTURES[0].save(tmp_path / "picture.png")
    with UploadHub(tmp_path / "hub") as hub:
        mine = {"PICTURE": str(tmp_path / "picture.png"), "LABELS": json.dumps(LABELS)}
        done = subprocess.run(
            [sys.executable, "-c", UPLOAD_AND_LOAD, "--run", run, "--to", "adapter", "--push", "me/chest", "--yes"],
            env=hub.environment(tmp_path / "home") | mine, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, probabilities, refusal = json.loads(done.stdout.splitlines()[-1])
    assert codes == [2, 0, 0] and "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert probabilities == pytest.approx(adapted.classify(PICTURES[0], LABELS), abs=1e-5)
    assert refusal.startswith("me/nothing is neither a folder here nor an adapter on the Hub")
    assert hub.visibility == {"me/chest": "private"}
    for file in folder.iterdir():
        assert (tmp_path / "hub" / "me" / "chest" / file.name).read_bytes() == file.read_bytes()


# ---- from Python


def test_classify_is_a_softmax_at_the_temperature_of_the_model(adapted: Clip) -> None:
    """Catches a temperature that is forgotten or not exponentiated, and labels that get each other's probability."""
    clip = load_clip(adapted.name)
    cosines = (clip.encode_images(PICTURES[:1]) @ clip.encode_texts(LABELS).T)[0].double()
    clip.model.logit_scale.data.fill_(3.0)
    weights = (torch.tensor(3.0).double().exp() * cosines).exp()
    expected = dict(zip(LABELS, (weights / weights.sum()).tolist(), strict=True))
    assert clip.classify(PICTURES[0], LABELS) == pytest.approx(expected, abs=1e-5)
    assert len({round(p, 4) for p in expected.values()}) == 3, "labels must differ"
    for wrong in ([], "chest", ["chest", "chest"]):
        with pytest.raises(UserError, match="labels"):
            clip.classify(PICTURES[0], wrong)


def test_search_gives_the_nearest_first(adapted: Clip) -> None:
    """Catches an order from worst to best, rows of another order than the features, and a k beyond their number."""
    features = adapted.encode_images(PICTURES)
    cosines = (features @ adapted.encode_texts([LABELS[0]])[0]).tolist()
    found = adapted.search(LABELS[0], features, k=99)
    assert [row for row, _ in found] == sorted(range(4), key=lambda row: -cosines[row])
    assert [cosine for _, cosine in found] == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)
    assert adapted.search(LABELS[0], features, k=2) == found[:2]
    with pytest.raises(UserError, match="encode_images"):
        adapted.search(LABELS[0], features[0])
