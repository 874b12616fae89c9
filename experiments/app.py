"""A page in the browser to try a run: `make app`, or `python -m experiments.app --run runs/demo`.

Four tabs: search by text or image, diagnosis of an image with calibrated probabilities, what the adapter adds to each
layer with a dial for its strength that classifies an image of the data, and the report of the run. Without a run it
shows the bundled CLIP alone and says which command makes a run. The page is served to this machine only, and nothing is
sent anywhere. Of the files on the disk only the images of the data, figures and report of the run and, for an hour, the
uploads can be seen.
"""

import os
import re
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from clip_medical.data.batches import Pairs
from clip_medical.data.images import decode
from clip_medical.errors import UserError
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.evidence import occlusion
from clip_medical.evaluation.report import layer_changes
from clip_medical.evaluation.zero_shot import class_cosines, class_features, class_scores, label_sets, refused
from clip_medical.model import CAPTIONS, NONE, Clip
from clip_medical.run_folder import run_root
from experiments import figures
from experiments.common import Experiment, Setup, main
from experiments.tables import compared
from lora import set_strength

OWN = "own labels"
NOTE = "# CLIP adapted to radiology with LoRA\nFor research and teaching. **Not a medical device.**"
HINT = "Here is more to see with a run: `python train.py` makes one, then start this page again."


class Page:
    """What the tabs ask for, one request at a time."""

    def __init__(self, setup: Setup, pairs: Pairs) -> None:
        self.models, self.pairs, self.lock = setup.models, pairs, threading.Lock()
        self.features = {model: encode(clip, pairs)[0] for model, clip in self.models.items()}
        present = {facet: sorted(set(names) - {""}) for facet, names in pairs.split.labels.items()}
        self.classes = {f: names for f, names in present.items() if 1 < len(names) <= 100 and not label_sets(names)}

    def search(self, text: str, file: str | None, k: int = 8) -> list[list[tuple[Image.Image, str]]]:
        """The best k images of each model, with captions."""
        if not text.strip() and not file:
            raise UserError("Type what to search for, or upload an image.")
        galleries = []
        for model, clip in self.models.items():
            query = clip.encode_images(decode(Path(file), Path(file).name)) if file else clip.encode_texts(text)
            best = (self.features[model] @ query[0]).topk(min(k, len(self.pairs)))
            rows, split = zip(best.indices.tolist(), best.values.tolist(), strict=True), self.pairs.split
            texts = {row: f"{score:.2f}  {textwrap.shorten(split.captions[row], 90)}" for row, score in rows}
            galleries.append([(split.open_image(row), text) for row, text in texts.items()])
        return galleries

    def probabilities(self, clip: Clip, facet: str, labels: list[str], image: Image.Image) -> dict[str, float]:
        """Label -> probability; "none of these" at the top, where the image is not similar enough to any label."""
        if facet == OWN:
            return clip.classify(image, labels, or_none=CAPTIONS in clip.calibration)
        feature, calibrated = clip.encode_images(image), "floor" in clip.calibration.get(facet, {})
        none = calibrated and refused(clip, facet, class_cosines(clip, facet, labels, feature))
        shares = class_scores(clip, facet, labels, feature).softmax(dim=1)[0].tolist()
        return ({NONE: 1.0} if none else {}) | dict(zip(labels, shares, strict=True))

    def diagnose(self, file: str | None, example: int, facet: str, own: str, where: bool) -> list[Any]:
        """The image, the probabilities by each model and, if asked for, where the evidence is."""
        image = decode(Path(file), Path(file).name) if file else self.pairs.split.open_image(int(example))
        labels = list(dict.fromkeys(filter(None, map(str.strip, own.splitlines()))))
        labels = labels if facet == OWN else self.classes[facet]
        if len(labels) < 2:
            raise UserError("Give two or more labels, one a line, such as X-ray of the chest.")
        results = [self.probabilities(clip, facet, labels, image) for clip in self.models.values()]
        if not where:
            return [image, *results, None]
        labels = sorted(labels, key=lambda label: -results[-1][label])
        maps = {}
        for model, clip in self.models.items():
            texts = clip.encode_texts(labels) if facet == OWN else class_features(clip, facet, labels).mean(dim=1)
            maps[model] = occlusion(clip, image, F.normalize(texts, dim=-1))
        with TemporaryDirectory() as folder:
            figures.evidence(image, labels[0], maps, Path(folder, "evidence.png"))
            return [image, *results, Image.open(Path(folder, "evidence.png")).copy()]

    def dial(self, strength: float, example: int, facet: str) -> list[Any]:
        """Classify an image of the data with the adapter at this strength."""
        clip, image = self.models["adapted"], self.pairs.split.open_image(int(example))
        set_strength(clip.model, strength)
        try:
            return [image, self.probabilities(clip, facet, self.classes[facet], image)]
        finally:
            set_strength(clip.model, 1.0)

    def layers(self) -> list[list[str]]:
        """A row for each adapted layer: norms of change and weight, ratio, effective rank (Roy and Vetterli 2007)."""
        rows = []
        for name, change, weight in layer_changes(self.models["adapted"].model):
            values, of_weight = torch.linalg.svdvals(change.detach()), weight.norm()
            norm, effective = values.norm(), torch.special.entr(values / values.sum()).sum().exp()
            rows.append([name, f"{norm:.2f}", f"{of_weight:.2f}", f"{norm / of_weight:.1%}", f"{effective:.1f}"])
        return rows


def build(gr: Any, page: Page, run: str | None, table: str) -> Any:
    """Lay out the page and connect it. gr: the module gradio. table: as returned by `compared`, or empty."""

    def answer(method: Callable[..., list[Any]]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            try:
                with page.lock:  # the strength of the adapter is part of the model
                    result = method(*values)
                return result[0] if len(result) == 1 else result
            except UserError as error:
                raise gr.Error(str(error)) from None

        return call

    models, facets, last = list(page.models), list(page.classes), len(page.pairs) - 1
    files: dict[str, Any] = dict(file_types=["image", ".dcm"], height=130)
    picture: dict[str, Any] = dict(interactive=False, buttons=["fullscreen"])  # no button that sends it elsewhere
    first = "finding" if "finding" in facets else facets[0] if facets else OWN
    with gr.Blocks(title="CLIP for radiology", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(NOTE if run else f"{NOTE}\n\n{HINT}")
        with gr.Tab("Search"):
            text = gr.Textbox("CT of the chest", label="Search for")
            image = gr.File(label="or for images like this one (PNG, JPEG, DICOM)", **files)
            button = gr.Button("Search", variant="primary")
            with gr.Row():
                grid: dict[str, Any] = dict(columns=2, buttons=["fullscreen"])
                found = [gr.Gallery(label=f"{model}: cosine, best first", **grid) for model in models]
            for event in (button.click, text.submit):
                event(answer(page.search), [text, image], found)
        with gr.Tab("Diagnose"):
            image = gr.File(label="Image (PNG, JPEG, DICOM)", **files)
            example = gr.Slider(0, last, 0, step=1, label="or this image of the data")
            facet = gr.Radio([*facets, OWN], value=first, label="What to tell apart")
            own = gr.Textbox("X-ray of the chest\nCT of the head", lines=3, label="Own labels, one a line")
            where = gr.Checkbox(label="Show where the evidence for the most probable label is (takes some seconds)")
            button = gr.Button("Diagnose", variant="primary")
            with gr.Row():
                shown = gr.Image(label="As the program reads it", height=260, **picture)
                bars = [gr.Label(label=f"{m}: probabilities, or none of these", num_top_classes=6) for m in models]
            evidence = gr.Image(label="Evidence: what lowers the score of the first label when it is hidden", **picture)
            button.click(answer(page.diagnose), [image, example, facet, own, where], [shown, *bars, evidence])
        if run and facets:
            with gr.Tab("Inside LoRA"):
                strength = gr.Slider(0, 1.5, 1, step=0.05, label="Strength of the adapter: 0 is the base, 1 as trained")
                example = gr.Slider(0, last, 0, step=1, label="Image of the data")
                facet = gr.Radio(facets, value=first, label="What to tell apart")
                with gr.Row():
                    shown = gr.Image(label="Image", height=260, **picture)
                    scores = gr.Label(label="Probabilities at this strength", num_top_classes=6)
                for event in (strength.change, example.change, facet.change, blocks.load):
                    event(answer(page.dial), [strength, example, facet], [shown, scores], show_progress="hidden")
                heads = ["layer", "|change|", "|W|", "|change| / |W|", "effective rank of the change"]
                gr.Dataframe(page.layers(), headers=heads, label="What the adapter adds", interactive=False)
        report = run_root(run or "") / "report.md"
        if run and report.is_file():
            with gr.Tab("Run"):
                gr.Markdown(table + re.sub(r"!\[.*\)", "", report.read_text(encoding="utf-8")))
                for file in sorted((report.parent / "figures").glob("*.png")):
                    gr.Image(Image.open(file), label=file.stem.replace("_", " "), **picture)
    return blocks


@dataclass(frozen=True)
class App(Experiment):
    """Try a run in the browser: search, diagnosis, the inside of the adapter, and its report."""

    # Run folders whose results stand beside those of --run.
    compare: tuple[str, ...] = ()
    # Port of the page. Default: the first free one from 7860.
    port: int | None = None

    name = "app"

    def __post_init__(self) -> None:
        if self.run is None and self.model is None:
            made = Path("runs/demo/report.json").is_file()
            object.__setattr__(self, "run" if made else "model", "runs/demo" if made else "tiny-clip")
        super().__post_init__()

    def perform(self) -> int:
        if self.compare and not self.run:
            raise UserError("--compare shows runs beside that of --run. Give one with --run.")
        table = compared([str(self.run), *self.compare]) if self.compare else ""
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at the import
        try:
            import gradio as gr

            setup = self.load_models()
            blocks = build(gr, Page(setup, self.prepare(self.load_data(setup), setup)), self.run, table)
            theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from elsewhere
            blocks.launch(server_name="127.0.0.1", server_port=self.port, theme=theme, footer_links=[], share=False)
        except ImportError as error:  # gradio itself, or what it needs
            raise UserError(f"The page needs gradio ({error}): pip install --upgrade gradio") from None
        except (OSError, OverflowError) as error:
            raise UserError(f"The page cannot be served ({error}). Choose another --port.") from error
        return 0


if __name__ == "__main__":
    sys.exit(main(App))
