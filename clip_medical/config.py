"""Every choice of a training run, in one frozen dataclass; the presets `demo` and `roco` are two values of it.

What stands here as default is for pictures of your own: `choose` takes it where --data is given without a preset.

The command line is generated from this file: a field is a flag, its type is checked, the sentence below it is its help.
"""

from dataclasses import dataclass, replace
from typing import Literal

from clip_medical.errors import UserError


@dataclass(frozen=True)
class Config:
    """Adapt a CLIP to radiology with a LoRA written by hand, and report what it bought."""

    data: str = "phantoms"
    """What to train on: "phantoms" (drawn on the spot), a folder of images with metadata.csv, a CSV, TSV or JSONL of
    image path and caption, Parquet, or a data set on the Hugging Face Hub. Given without a preset, the other flags
    start from what suits real pictures (--lr 2e-3, --epochs 14, --fragments 4, a fixed temperature), not phantoms."""
    revision: str | None = None
    """Commit, tag or branch of a data set on the Hub; default: its newest commit."""
    streaming: Literal["on", "off"] = "on"
    """Read a data set on the Hub once, straight into the image cache; off: download its files first and keep them."""
    model: str = "tiny-clip"
    """The CLIP to adapt: "tiny-clip" (5.5 M parameters, comes with this repository), a Hugging Face CLIP folder, or a
    name on the Hub such as openai/clip-vit-base-patch32."""
    output: str | None = None
    """Run folder to write; default: runs/PRESET, or the next free runs/PRESET-2, -3, ..."""
    image_column: str | None = None
    """Column with the image; default: found by its common names."""
    caption_column: str | None = None
    """Column with the caption; default: found by its common names."""
    limit: int | None = None
    """Use at most so many rows of each split, drawn by seed; default: all. Of Parquet: from as few row groups as hold
    so many."""

    rank: int = 8
    """Rank r of the update B A; parameters grow with it."""
    alpha: float = 16.0
    """Scale of the update: it is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs of A dropped in training, 0 to 1."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers to adapt, in both towers."""

    batch_size: int = 32
    """Pairs in a contrastive batch, over all processes together: each is set against all others of its batch."""
    chunk_size: int | Literal["auto"] = "auto"
    """Pairs that a process encodes at a time; auto: as many as fit into memory. The loss and its gradient stay those of
    the whole batch (cached gradients, Gao et al. 2021), for one more forward pass. Plain gradient accumulation is not
    offered: the pairs of one part would not be negatives for those of another, which makes small batches of a large
    one."""
    fragments: int = 4
    """Fragments of each caption, a few of its first words in a row, that are read beside it, so that the model learns
    to read labels and queries too; the mean of their losses is added to that of the captions. 0: captions alone."""
    augment: bool = False
    """Turn, shift and enlarge each training picture a little, anew in every epoch; never mirrored, as left and right
    matter."""
    epochs: int = 14
    """Passes over the training pairs."""
    steps: int | None = None
    """Optimizer steps; default: as many as `epochs` makes."""
    lr: float = 2e-3
    """Peak learning rate of the adapter (AdamW)."""
    lora_plus: float = 1.0
    """How many times that rate B learns at (LoRA+, Hayou et al. 2024); 1: as A."""
    weight_decay: float = 0.01
    """AdamW's decay of A and B."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0; then it falls to 0 along a cosine."""
    clip_norm: float = 1.0
    """Largest norm of the gradient of all adapters together; longer ones are shortened to it."""
    train_logit_scale: bool = False
    """Learn CLIP's temperature too (its logarithm kept within [0, ln 100]); default: as the checkpoint has it."""
    logit_scale_lr: float = 1e-3
    """Peak learning rate of the temperature, where it is learned; it is not decayed."""
    overfit_batch: bool = False
    """Take the first batch at every step: its loss must go to zero. First thing to try when a run learns nothing."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen model; the adapter is always fp32. auto: fp32 on a CPU; on a GPU bf16 where it
    computes in bf16, else fp16 with loss scaling."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Gradient checkpointing: compute activations twice instead of keeping them; about a third slower, a tenth of the
    memory. auto: off where the batch fits without."""
    validate_every: int | None = None
    """Measure recall on the held-out pairs every so many steps, and keep the best adapter; default: keep the last."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too, into OUTPUT/tensorboard."""
    checkpoint_every_minutes: float = 5.0
    """Minutes between two checkpoints to resume from; one is also written on Ctrl-C."""
    checkpoint_every_steps: int | None = None
    """Steps between two checkpoints, besides those by the minute; default: no such count."""
    seed: int = 0
    """Decides the split, the order of the pairs, the initial A and the phantoms."""
    resume: bool = False
    """Continue the run that stands in --output."""

    def __post_init__(self) -> None:
        for name, lowest in (
            ("batch_size", 2),
            ("chunk_size", 1),
            ("epochs", 1),
            ("steps", 1),
            ("limit", 2),
            ("rank", 1),
            ("validate_every", 1),
            ("fragments", 0),
            ("seed", 0),
            ("checkpoint_every_steps", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, float) or (isinstance(value, int) and value < lowest):
                raise UserError(f"--{name.replace('_', '-')} is {value}: give a whole number of {lowest} or more.")
        for name in ("lr", "alpha", "clip_norm", "lora_plus", "logit_scale_lr", "checkpoint_every_minutes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0.")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give a share from 0 up to, not including, 1.")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"--weight-decay is {self.weight_decay}: give a number of 0 or more.")


RESUME_MAY_CHANGE = frozenset(
    ("resume", "output", "chunk_size", "checkpointing", "checkpoint_every_minutes", "checkpoint_every_steps")
    + ("tensorboard", "precision")  # precision is compared by the format that it came to
)
"""What --resume may have other values of: where and how to compute and to keep, not what is learned."""


PRESETS = {
    # Phantoms, in 3 minutes. Clean pictures and captions bear large steps and a temperature that follows.
    "demo": replace(Config(), epochs=12, lr=6e-3, fragments=2, train_logit_scale=True),
    # ViT-B/32 on ROCOv2, for a 16 GB card. 256 pairs fit it without checkpointing. More than one fragment: not tried.
    "roco": replace(
        Config(),
        data="eltorio/ROCOv2-radiology",
        model="openai/clip-vit-base-patch32",
        batch_size=256,
        epochs=6,
        lr=5e-4,
        fragments=1,
    ),
}


def choose(arguments: list[str]) -> tuple[str, Config, list[str]]:
    """Command line -> preset, the configuration to start from, and the flags that change it."""
    named = bool(arguments) and not arguments[0].startswith("-")
    preset, flags = (arguments[0], arguments[1:]) if named else ("demo", arguments)
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}: the first word may be one of {', '.join(PRESETS)}.")
    own = not named and any(flag.split("=")[0] == "--data" for flag in flags)
    return preset, Config() if own else PRESETS[preset], flags
