"""Train the tiny CLIP of the offline demo from scratch: `python -m experiments.train_tiny_clip`.

It plays the part of OpenAI's CLIP where that cannot be downloaded: a general model that knows coloured shapes and
textures well, and radiology by hearsay only: a few per cent of its pictures are phantoms, most of them under the
caption of some other phantom. Two phases: first both towers learn from whole captions; then, with the images locked
(LiT, Zhai et al. 2022), the text tower learns to read fragments of captions too, as it must for labels and queries.

The result, `clip_medical/assets/tiny-clip/`, is an ordinary Hugging Face CLIP folder; `training.json` in it says with
what commands, seeds, times, hardware and versions it was made. Its phantoms were drawn by the code of that day; they
have been improved since, so that training anew gives a like model, not the same.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from clip_medical import command_line
from clip_medical.data.batches import row_batches
from clip_medical.data.images import resize_and_crop
from clip_medical.data.phantoms import describe, phantom
from clip_medical.data.shapes import SIZE, scene
from clip_medical.model import Clip, load_clip
from clip_medical.runs import write_text
from clip_medical.training.losses import info_nce, same_rows

ASSETS = Path(__file__).resolve().parent.parent / "clip_medical" / "assets" / "tiny-clip"
START, END = "<|startoftext|>", "<|endoftext|>"

# Words for the tokenizer alone: they get tokens of their own, and embeddings that training hardly touches.
RADIOLOGY = """radiology radiograph radiographic radiographs x ray film plain portable digital computed tomography
tomographic scan scans magnetic resonance imaging image images ultrasound ultrasonography sonogram
sonography sonographic doppler echocardiogram mammogram mammography angiography fluoroscopy contrast
enhanced enhancement weighted flair t1 t2 axial coronal sagittal transverse longitudinal frontal
lateral posteroanterior anteroposterior oblique view views slice section plane level through
obtained demonstrating demonstrates showing shows shown reveals revealing seen observed noted
consistent with suggestive suspected confirmed positive negative without evidence of normal abnormal
unremarkable patient patients man woman male female child children infant year old years day days
case cases history presented admission hospital chest thorax thoracic lung lungs lobe lobes
pulmonary pleural effusion pneumothorax consolidation ground glass opacity opacities infiltrate
infiltrates pneumonia covid infection bilateral unilateral left right upper lower middle medial
anterior posterior superior inferior heart cardiac aorta mediastinum rib ribs clavicle diaphragm
head brain skull cranial cerebral intracranial hemorrhage haemorrhage hematoma infarct stroke
ventricle tumor tumour glioma meningioma pituitary sellar mass masses lesion lesions nodule nodules
cyst cysts cystic solid calcification calcified benign malignant cancer carcinoma metastasis
metastases abscess fracture dislocation osteoarthritis degenerative joint space narrowing osteophyte
osteophytes kellgren lawrence grade doubtful minimal mild moderate severe knee femur tibia fibula
patella hand wrist finger fingers bone bones age assessment skeletal elbow shoulder humerus hip
pelvis pelvic sacrum iliac ankle foot spine spinal lumbar cervical vertebra vertebrae vertebral disc
canal cord abdomen abdominal liver hepatic spleen kidney kidneys renal pancreas gallbladder stomach
bowel colon bladder uterus ovary ovarian prostate breast breasts fibroglandular tissue soft tissues
fat muscle vessel vessels artery vein lymph node nodes neck thyroid jaw jaws dental teeth tooth
caries panoramic orthopantomogram fetal fetus obstetric prenatal antenatal pregnancy head
circumference biometry gestational weeks mm cm small large multiple single diffuse focal size
measuring increased decreased density intensity signal hypoechoic hyperechoic anechoic heterogeneous
homogeneous swelling thickening dilated dilatation stenosis obstruction thrombus embolus catheter
tube device implant postoperative preoperative follow up study findings finding impression report
diagnosis disease syndrome acute chronic control subject specimen cross sectional grayscale"""


def make_tokenizer(captions: list[str], vocabulary: int) -> CLIPTokenizer:
    """Byte-pair encoding with CLIP's own normaliser and word splitting, learned on the captions and the word list."""
    clip = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>", unk_token=END))
    learner.normalizer = clip.backend_tokenizer.normalizer
    learner.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary - 2 - 256, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions + [RADIOLOGY] * 500, trainer)
    model = json.loads(learner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [letter + "</w>" for letter in sorted(alphabet) if letter + "</w>" not in model["vocab"]]  # as CLIP has
    vocab = {token: i for i, token in enumerate([*tokens, START, END])}
    merges: Any = [tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of about 5.5 M parameters. Like ViT-B/32 it sees 7 x 7 patches; everything else is smaller."""
    # gelu is one kernel where CLIP's quick_gelu is three, and at this size that shows
    tower = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4, projection_dim=128, hidden_act="gelu")
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = tower | ids | dict(num_hidden_layers=2, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    vision = tower | dict(num_hidden_layers=4, image_size=SIZE, patch_size=16)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def _draw(job: tuple[str, int, int]) -> tuple[np.ndarray, str]:
    """One training picture (SIZE, SIZE, 3) uint8 with its caption."""
    kind, seed, index = job
    if kind == "scene":
        made = scene(seed, "pretrain", index)
        return np.asarray(made.image), made.caption
    image, caption, _ = phantom(seed, "pretrain", index)
    if np.random.default_rng((seed, index)).random() < NOISE:
        caption, _ = describe(seed, "pretrain", index + 1)
    return np.repeat(resize_and_crop(image, SIZE)[..., None], 3, axis=2), caption


NOISE = 0.7  # share of the phantoms that come under another phantom's caption


def make_data(scenes: int, phantoms: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """All pictures (N, 3, SIZE, SIZE) uint8 and their captions, drawn on every core."""
    jobs = [("scene", seed, i) for i in range(scenes)] + [("phantom", seed, i) for i in range(phantoms)]
    pixels, captions = np.empty((len(jobs), SIZE, SIZE, 3), np.uint8), []
    with ProcessPoolExecutor() as pool:
        for i, (image, caption) in enumerate(
            tqdm(pool.map(_draw, jobs, chunksize=64), total=len(jobs), desc="drawing")
        ):
            pixels[i] = image
            captions.append(caption)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), captions


def optimizer_and_schedule(
    model: CLIPModel, lr: float, steps: int, warmup: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW on all weights that want a gradient; linear warm-up, then a cosine to 2 % of the peak."""
    learned = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in learned if p.ndim > 1]
    plain = [p for p in learned if p.ndim <= 1]
    groups = [dict(params=decay, weight_decay=0.1), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    cosine = lambda t: min(1, (t + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * t / steps)) / 2)  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)


def learn(
    model: CLIPModel,
    features: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    count: int,
    args: argparse.Namespace,
    lr: float,
    warmup: int,
) -> float:
    """`args.steps` steps of InfoNCE. features: rows -> image features, text features, positives.

    Returns the mean loss of the last 50 steps.
    """
    optimizer, schedule = optimizer_and_schedule(model, lr, args.steps, warmup)
    losses: list[float] = []
    progress = tqdm(islice(row_batches(count, args.batch_size, args.seed), args.steps), total=args.steps)
    for step, rows in enumerate(progress):
        images, texts, positives = features(rows)
        loss = info_nce(images, texts, model.logit_scale, positives)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        if step % 50 == 0:
            progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
    return float(np.mean(losses[-50:]))


def train(clip: Clip, pixels: torch.Tensor, captions: list[str], args: argparse.Namespace) -> float:
    """First phase: all weights, whole captions, bf16 autocast (slow on a CPU that has no bf16 arithmetic)."""
    ids, lengths = clip.tokens(captions)

    def features(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        with torch.autocast("cpu", torch.bfloat16):
            return clip.image_features(pixels[rows]), clip.text_features(ids[rows], lengths[rows]), None

    return learn(clip.model.train(), features, len(captions), args, lr=1e-3, warmup=200)


def fragment(caption: str, rng: np.random.Generator) -> str:
    """Half of the time the caption, else up to eight of its words in a row: "red ring", "CT of the chest"."""
    if rng.random() < 0.5:
        return caption
    words = caption.split()
    first = int(rng.integers(len(words)))
    return " ".join(words[first : first + int(rng.integers(1, 9))])


def train_text(clip: Clip, pixels: torch.Tensor, captions: list[str], args: argparse.Namespace) -> float:
    """Second phase: the text tower alone, on fragments, in fp32, against image features computed once."""
    with torch.no_grad():
        images = torch.cat([clip.image_features(part) for part in tqdm(pixels.split(256), desc="features")])
    for name, parameter in clip.model.named_parameters():
        parameter.requires_grad_(name.startswith("text") or name == "logit_scale")
    rng = np.random.default_rng(args.seed)

    def features(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        read = [fragment(captions[row], rng) for row in rows.tolist()]
        ids, lengths = clip.tokens(read)
        numbers = torch.tensor([read.index(text) for text in read])  # the same words are right for both pictures
        return images[rows], clip.text_features(ids, lengths), same_rows(numbers)

    return learn(clip.model.train(), features, len(captions), args, lr=5e-4, warmup=50)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("both-towers", "text"), help="the second takes up what the first has written")
    parser.add_argument("--scenes", type=int, default=80_000)
    parser.add_argument("--phantoms", type=int, default=4_000)
    parser.add_argument("--steps", type=int, default=2_400)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ASSETS)
    args = parser.parse_args()
    started = time.time()
    torch.manual_seed(args.seed)
    pixels, captions = make_data(args.scenes, args.phantoms, args.seed)
    log = args.output / "training.json"
    if args.phase == "text":
        clip, history = load_clip(str(args.output)), json.loads(log.read_text())
        loss = train_text(clip, pixels, captions, args)
    else:
        tokenizer = make_tokenizer(captions[:2_000] + captions[-2_000:], vocabulary=2048)
        picture = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        clip, history = Clip(make_model(tokenizer), tokenizer, picture, "tiny-clip"), []
        loss = train(clip, pixels, captions, args)

    args.output.mkdir(parents=True, exist_ok=True)
    clip.model.half().save_pretrained(args.output)
    clip.tokenizer.save_pretrained(args.output)
    clip.image_processor.save_pretrained(args.output)
    facts = dict(
        command=" ".join(["python -m experiments.train_tiny_clip", *sys.argv[1:]]),
        parameters=sum(p.numel() for p in clip.model.parameters()),
        data=f"{args.scenes} scenes and {args.phantoms} phantoms, {NOISE:.0%} of the phantoms under a wrong caption",
        seed=args.seed,
        steps=args.steps,
        batch=args.batch_size,
        loss_of_last_50_steps=round(loss, 3),
        minutes=round((time.time() - started) / 60, 1),
        hardware=f"{platform.machine()}, {torch.get_num_threads()} cores",
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version()),
    )
    write_text(log, json.dumps([*history, facts], indent=2) + "\n")
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code("train_tiny_clip", run))
