"""Pretrain the tiny CLIP of the offline demo from scratch: `python -m experiments.train_tiny_clip`.

The tiny CLIP stands in for OpenAI's CLIP where that cannot be downloaded. It is a general-domain model: it is trained
on coloured shapes and sees little radiology, as 5 % of its images are phantoms, most of them with the caption of
another phantom. Training has two phases:

both-towers   image and text encoder learn from whole captions
text          with the image encoder frozen (LiT, Zhai et al. 2022), the text encoder also learns from fragments of
              captions, since labels and queries are short

The result, `clip_medical/assets/tiny-clip/`, is a Hugging Face CLIP folder. Its `training.json` records the commands,
seeds, times, hardware and versions. The phantoms have changed since it was trained, so that a new training gives an
equivalent model, not the same weights.
"""

import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from clip_medical import cli
from clip_medical.data.batches import row_batches
from clip_medical.data.images import resize_and_crop
from clip_medical.data.processor import Processor
from clip_medical.data.synthetic.phantoms import describe, phantom
from clip_medical.data.synthetic.shapes import SIZE, scene
from clip_medical.evaluation.report import environment
from clip_medical.model import Clip, load_clip
from clip_medical.run_folder import write_text
from clip_medical.training.loss import info_nce, same_rows

# terms that get tokens of their own; few of them occur in the training captions, so their embeddings stay untrained
RADIOLOGY_WORDS = Path(__file__).with_name("radiology_words.txt")
MISLABELLED = 0.7  # fraction of the phantoms that get another phantom's caption


@dataclass(frozen=True)
class Options:
    """Pretrain the tiny CLIP of the offline demo."""

    phase: tyro.conf.Positional[Literal["both-towers", "text"]]
    """"both-towers" trains a new model. "text" continues with the model in --output."""
    scenes: int = 80_000
    """Number of training images of coloured shapes."""
    phantoms: int = 4_000
    """Number of training images of phantoms."""
    steps: int = 2_400
    """Number of optimizer steps."""
    batch_size: int = 256
    """Pairs per step."""
    bf16: bool = False
    """Train under bf16 autocast, which is faster on CPUs with bf16 arithmetic and much slower on others."""
    seed: int = 0
    """Seed of the data, the initial weights and the order of the pairs."""
    output: str = "clip_medical/assets/tiny-clip"
    """Folder of the model."""


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


def make_data(scenes: int, phantoms: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Return the training images (N, 3, SIZE, SIZE) uint8 and their N captions, scenes first."""
    pixels = torch.empty((scenes + phantoms, 3, SIZE, SIZE), dtype=torch.uint8)
    captions = []
    for row in tqdm(range(scenes + phantoms), desc="images"):
        if row < scenes:
            image, caption, _ = scene(seed, "pretrain", row)
        else:
            image, caption, _ = phantom(seed, "pretrain", row - scenes)
            if np.random.default_rng((seed, row - scenes)).random() < MISLABELLED:
                caption, _ = describe(seed, "pretrain", row - scenes + 1)
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
    model, text_only = clip.model.train(), options.phase == "text"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not text_only or name.startswith("text") or name == "logit_scale")
    if text_only:  # the image features are constant
        with torch.no_grad():
            image_features = torch.cat([clip.image_features(part) for part in torch.split(pixels, 256)])

    lr, warmup_steps = (5e-4, 50) if text_only else (1e-3, 200)
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup_steps, options.steps, min_lr_rate=0.02)
    rng = np.random.default_rng(options.seed)
    losses: list[float] = []
    batches = islice(row_batches(len(captions), options.batch_size, options.seed), options.steps)
    for rows in (progress := tqdm(batches, total=options.steps)):
        texts = [fragment(captions[row], rng) if text_only else captions[row] for row in rows.tolist()]
        positives = same_rows(torch.tensor([texts.index(text) for text in texts]))
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            batch_features = image_features[rows] if text_only else clip.image_features(pixels[rows])
            text_features = clip.text_features(*clip.processor.tokens(texts))
        loss = info_nce(batch_features, text_features, model.logit_scale, positives)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
    return float(np.mean(losses[-50:]))


def run() -> int:
    options = cli.parse(Options, sys.argv[1:], "python -m experiments.train_tiny_clip")
    start = time.time()
    torch.manual_seed(options.seed)
    pixels, captions = make_data(options.scenes, options.phantoms, options.seed)
    record_file = Path(options.output, "training.json")
    if options.phase == "text":
        clip, records = load_clip(options.output), json.loads(record_file.read_text())
    else:
        tokenizer = make_tokenizer(captions[:2_000] + captions[-2_000:])
        model = make_model(tokenizer)
        images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        clip, records = Clip(model, Processor(tokenizer, images, model.config), "tiny-clip"), []
    loss = train(clip, pixels, captions, options)

    for part in (clip.model.half(), clip.processor.tokenizer, clip.processor.image_processor):
        part.save_pretrained(options.output)
    record = asdict(options) | dict(
        command=shlex.join(["python", "-m", "experiments.train_tiny_clip", *sys.argv[1:]]),
        parameters=sum(p.numel() for p in clip.model.parameters()),
        mislabelled_phantoms=MISLABELLED,
        mean_loss_of_last_50_steps=round(loss, 3),
        minutes=round((time.time() - start) / 60, 1),
        environment=environment(),
    )
    write_text(record_file, json.dumps([*records, record], indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_code("train_tiny_clip", run))
