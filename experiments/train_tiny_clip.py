"""Pretrain the tiny CLIP of the offline demo: `python -m experiments.train_tiny_clip`.

The tiny CLIP stands in for OpenAI's CLIP where that cannot be downloaded. CLIP has seen radiology images on the web,
mostly with the words of laypeople. So the tiny CLIP learns from two kinds of images: scenes of coloured shapes, and
phantoms that are described as somebody without medical words would, by "a smooth round bubble" for a cyst. A few
phantoms have a radiological caption, most of them that of another phantom. Its image encoder can therefore see
findings, but its text encoder does not know what radiologists call them: that is left to the adaptation.

Half of the captions are cut to fragments, as labels and queries are short.

The result is a Hugging Face CLIP folder, with a `training.json` that records how it was made. The bundled one,
`clip_medical/assets/tiny-clip/`, was trained in four phases, three of them with earlier versions of the phantoms and of
this script, so that a new training does not give the same weights. In its present form the script has only been run in
small, but for the last phase.
"""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from clip_medical import cli
from clip_medical.config import Config
from clip_medical.data.batches import row_batches
from clip_medical.data.images import resize_and_crop
from clip_medical.data.processor import Processor
from clip_medical.data.synthetic import pick, random_stream
from clip_medical.data.synthetic.phantoms import CONTENT, describe, phantom
from clip_medical.data.synthetic.shapes import SIZE, TEMPLATES, scene
from clip_medical.evaluation.report import environment
from clip_medical.model import Clip, load_clip
from clip_medical.run_folder import write_text
from clip_medical.training.loss import info_nce, same_rows
from clip_medical.training.optimizer import Optimizer

# terms that get tokens of their own; few of them occur in the training captions, so their embeddings stay untrained
RADIOLOGY_WORDS = Path(__file__).with_name("radiology_words.txt")
MISLABELLED = 0.7  # fraction of the phantoms with a radiological caption that have another phantom's


@dataclass(frozen=True)
class Options:
    """Pretrain the tiny CLIP of the offline demo."""

    # Number of training images of coloured shapes.
    scenes: int = 80_000
    # Number of phantoms.
    phantoms: int = 100_000
    # Fraction of the phantoms with a radiological caption.
    radiological: float = 0.08
    # Continue from this CLIP instead of a new one.
    start: str | None = None
    # Train the text tower alone. The images are encoded only once, so that a step is cheap.
    text_only: bool = False
    # Peak learning rate.
    lr: float = 1e-3
    # Number of optimizer steps.
    steps: int = 4_800
    # Pairs per step.
    batch_size: int = 256
    # Seed of the data, the initial weights and the order of the pairs.
    seed: int = 0
    # Folder of the model.
    output: str = "runs/tiny-clip"


def make_tokenizer(captions: list[str], vocabulary_size: int = 2048) -> CLIPTokenizer:
    """Train CLIP's byte-pair encoding on the captions and the radiology words."""
    words = RADIOLOGY_WORDS.read_text(encoding="utf-8")
    # One word for each byte at which UTF-8 text can end: ASCII and the continuation bytes. Otherwise a word that ends
    # with an unseen byte would have no token.
    last_bytes = " ".join(map(chr, [*range(0x21, 0x7F), *range(0x4E00, 0x4E40)]))
    untrained: Any = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    corpus = [*captions, *[words] * 500, last_bytes]
    trained = untrained.train_new_from_iterator([corpus], vocabulary_size, show_progress=False)
    bpe = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    # The special tokens go from the start to the end, as in CLIP: implementations find the end token as the largest id.
    vocabulary = {token: i for i, token in enumerate(tokens[2:] + tokens[:2])}
    merges: Any = [tuple(pair) for pair in bpe["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build an untrained CLIP of about 5.5 M parameters, with 7 x 7 patches as in ViT-B/32."""
    # gelu is one kernel and CLIP's quick_gelu three, which takes measurable time in a model this small
    tower = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4, projection_dim=128, hidden_act="gelu")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = tower | ids | dict(num_hidden_layers=2, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    vision = tower | dict(num_hidden_layers=4, image_size=SIZE, patch_size=16)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def describe_plainly(seed: int, index: int) -> str:
    """Describe a phantom without medical words, with size and place half of the time: "a smooth round bubble ..."."""
    labels, rng = describe(seed, "pretrain", index)[1], random_stream(seed, "pretrain", index, 3)
    size = f" that is {labels['size']}" if labels["size"] and rng.random() < 0.5 else ""
    place = f" on the {labels['place']} side" if labels["place"] and rng.random() < 0.5 else ""
    return str(CONTENT["findings"][labels["finding"]]["plain"]) + size + place


def make_data(scenes: int, phantoms: int, radiological: float, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Return the training images (N, 3, SIZE, SIZE) uint8 and their N captions, scenes first.

    A caption without a full stop is a phrase, which gets another template each time.
    """
    pixels = torch.empty((scenes + phantoms, 3, SIZE, SIZE), dtype=torch.uint8)
    captions = []
    for row in tqdm(range(scenes + phantoms), desc="images"):
        index = row - scenes
        if row < scenes:
            image, caption, _ = scene(seed, "pretrain", row)
        else:
            image = phantom(seed, "pretrain", index).image
            chance = np.random.default_rng((seed, index)).random()
            medical, wrong = chance < radiological, chance < radiological * MISLABELLED
            caption = describe(seed, "pretrain", index + wrong)[0] if medical else describe_plainly(seed, index)
        pixels[row] = torch.tensor(resize_and_crop(image.convert("RGB"), SIZE)).permute(2, 0, 1)
        captions.append(caption)
    return pixels, captions


def fragment(caption: str, rng: np.random.Generator) -> str:
    """Return the caption or, with probability 0.5, up to eight successive words of it, such as "CT of the chest"."""
    if rng.random() < 0.5:
        return caption
    words = caption.split()
    first = int(rng.integers(len(words)))
    return " ".join(words[first : first + int(rng.integers(1, 9))])


def train(clip: Clip, pixels: torch.Tensor, captions: list[str], options: Options) -> float:
    """Train with InfoNCE and AdamW, and return the mean loss of the last 50 steps."""
    model, steps, lr = clip.model, options.steps, options.lr
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("text") or not options.text_only)
    optimizer = Optimizer(model, Config(lr=lr, logit_scale_lr=lr, weight_decay=0.1, warmup=0.08), steps)
    with torch.no_grad():
        parts = tqdm(pixels.split(256), desc="features") if options.text_only else ()
        encoded = [feature for part in parts for feature in clip.image_features(part)]
    rng = np.random.default_rng(options.seed)
    losses: list[float] = []
    batches = islice(row_batches(len(captions), options.batch_size, options.seed), steps)
    for rows in (progress := tqdm(batches, total=steps)):
        texts = [fragment(captions[row], rng) for row in rows.tolist()]
        positives = same_rows(torch.tensor([texts.index(text) for text in texts]))
        texts = [text if text.endswith(".") else pick(rng, TEMPLATES).format(text) for text in texts]
        text_features = clip.text_features(*clip.processor.tokens(texts))
        images = torch.stack([encoded[row] for row in rows.tolist()]) if encoded else clip.image_features(pixels[rows])
        loss = info_nce(images, text_features, model.logit_scale, positives)
        loss.backward()
        optimizer.step(max_grad_norm=1.0)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
    return float(np.mean(losses[-50:]))


def run() -> int:
    options = cli.parse(Options, sys.argv[1:], "python -m experiments.train_tiny_clip")
    torch.manual_seed(options.seed)
    pixels, captions = make_data(options.scenes, options.phantoms, options.radiological, options.seed)
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    if options.start:
        clip = load_clip(options.start)
    else:
        tokenizer = make_tokenizer(captions[:2_000] + captions[-2_000:])
        model = make_model(tokenizer)
        clip = Clip(model, Processor(tokenizer, images, model.config), "tiny-clip")
    loss = train(clip, pixels, captions, options)
    for part in (clip.model.half(), clip.processor.tokenizer, images):
        part.save_pretrained(options.output)
    record = asdict(options) | dict(
        command=shlex.join(["python", "-m", "experiments.train_tiny_clip", *sys.argv[1:]]),
        mean_loss_of_last_50_steps=loss,
        environment=environment(),
    )
    write_text(Path(options.output, "training.json"), json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_code("train_tiny_clip", run))
