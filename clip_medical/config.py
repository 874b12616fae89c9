"""All settings of a training run in one frozen dataclass; the presets `demo` and `roco` are two values of it.

The defaults suit images of your own: `parse` takes them where --data is given without a preset. The command line is
generated from this file: each field is a flag, its type is checked, and the comment above it is its help.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from clip_medical import cli
from clip_medical.errors import UserError


@dataclass(frozen=True)
class Config:
    """Adapt a CLIP to radiology with LoRA, and compare it with the unadapted model."""

    # Training data: "phantoms" (synthetic), a folder of images with metadata.csv or in one of many other layouts, a
    # table of image path and caption, Parquet, zip, tar, or a data set on the Hugging Face Hub. Given without a
    # preset, the other flags have defaults for real images (--lr 2e-3, --vision-lr 1, --epochs 14, --fragments 4,
    # fixed temperature).
    data: str = "phantoms"
    # Commit, tag or branch of a data set on the Hub; default: its newest commit.
    revision: str | None = None
    # The CLIP to adapt: "tiny-clip" (5.5 M parameters, bundled), a Hugging Face CLIP folder, or a name on the Hub
    # such as openai/clip-vit-base-patch32.
    model: str = "tiny-clip"
    # Run folder to write; default: runs/PRESET, or the next free runs/PRESET-2, -3, ...
    output: str | None = None
    # Column with the image; default: found by its common names.
    image_column: str | None = None
    # Column with the caption; default: found by its common names.
    caption_column: str | None = None
    # Column with the patient, whose rows are held out together; default: found by its common names.
    group_column: str | None = None
    # Write the captions from other columns: "{modality} of the {anatomy}".
    template: str | None = None
    # Folder of the images, to which their paths are relative and in which absolute ones may lie; default: the table's.
    image_root: str | None = None
    # Use at most this many rows of each split, drawn by seed; default: all.
    limit: int | None = None

    # Rank r of the update B A. The number of trainable parameters is proportional to it.
    rank: int = 8
    # Numerator of the scaling alpha / rank of the update.
    alpha: float = 16.0
    # Dropout probability on the input of A, during training.
    dropout: float = 0.0
    # Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA).
    rslora: bool = False
    # DoRA instead: train the length of each row of the weights by itself (Liu et al. 2024).
    dora: bool = False
    # lora_only: train the biases of the adapted layers too, at a tenth of --lr.
    bias: Literal["none", "lora_only"] = "none"
    # Names of the linear layers to adapt, such as q_proj v_proj visual_projection text_projection; one alone can be
    # all-linear, or a regular expression.
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    # Linear layers to train whole, without LoRA, at a tenth of --lr: visual_projection text_projection, for instance.
    modules_to_save: tuple[str, ...] = ()
    # Towers to adapt.
    towers: Literal["both", "vision", "text"] = "both"
    # Go on from this adapter of --model, instead of a new one: a run, a folder as PEFT writes it, or one on the Hub.
    # Rank, alpha, kind and layers are those of the adapter.
    from_adapter: str | None = None

    # Pairs in a contrastive batch, over all processes together. Each pair is contrasted with all others.
    batch_size: int = 32
    # Pairs that a process encodes at a time; auto: as many as fit into memory. Loss and gradient stay those of the
    # whole batch (cached gradients, Gao et al. 2021), for one more forward pass. Plain gradient accumulation is not
    # offered: it would take away negatives.
    chunk_size: int | Literal["auto"] = "auto"
    # Fragments of each caption, a few of its first words and in the second one a few of all its words, that are trained
    # beside it, so that the text encoder learns short labels and queries too; the mean of their losses is added to that
    # of the captions. 0: captions alone.
    fragments: int = 4
    # Rotate, shift and zoom each training image a little, differently in every epoch. Never mirrored: left and right
    # matter.
    augment: bool = False
    # Passes over the training pairs.
    epochs: int = 14
    # Optimizer steps; default: as many as `epochs` makes.
    steps: int | None = None
    # Peak learning rate of the adapter (AdamW).
    lr: float = 2e-3
    # Learning rate of B as a multiple of that of A (LoRA+, Hayou et al. 2024).
    lora_plus: float = 1.0
    # Learning rate of the vision tower as a multiple of that of the text tower. Below 1, the text tower learns to name
    # what the vision tower already sees; 0 would be --towers text (LiT, Zhai et al. 2022).
    vision_lr: float = 1.0
    # AdamW's weight decay of A and B.
    weight_decay: float = 0.01
    # Warmup fraction: share of the steps with a linearly rising learning rate; cosine decay to 0 follows.
    warmup: float = 0.05
    # Gradients of all adapters together are clipped to this norm.
    max_grad_norm: float = 1.0
    # Train CLIP's temperature too (logit_scale, clamped to [0, ln 100]); default: the checkpoint's value.
    train_logit_scale: bool = False
    # Peak learning rate of logit_scale, where it is trained, without weight decay.
    logit_scale_lr: float = 1e-3
    # Train on the first batch alone: its loss must go to zero. The first thing to try when a run does not learn.
    overfit_batch: bool = False

    # Dtype of the frozen weights; the adapter is always fp32. auto: fp32 on a CPU; on a GPU bf16 if it has bf16
    # instructions, else fp16 with loss scaling.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # reference: transformers' forward pass. fast: packed captions, the same numbers. auto: fast where a check at the
    # start finds that it matches the reference.
    encoder: Literal["auto", "reference", "fast"] = "auto"
    # Gradient checkpointing: recompute activations in the backward pass instead of storing them; about a third
    # slower, a tenth of the memory. auto: off where the batch fits without it.
    checkpointing: Literal["auto", "on", "off"] = "auto"
    # Measure recall on the validation pairs every this many steps and keep the best adapter; default: the last.
    validate_every: int | None = None
    # Minutes between two checkpoints for --resume; one is also written on Ctrl-C.
    checkpoint_every_minutes: float = 5.0
    # Steps between two checkpoints, in addition to those by the minute; default: none.
    checkpoint_every_steps: int | None = None
    # Seed of the split, the order of the pairs, the initial A and the phantoms.
    seed: int = 0
    # Continue the run in --output.
    resume: bool = False

    def __post_init__(self) -> None:
        smallest = {"batch_size": 2, "chunk_size": 1, "epochs": 1, "steps": 1, "limit": 2, "rank": 1, "fragments": 0,
                    "validate_every": 1, "checkpoint_every_steps": 1, "seed": 0}  # fmt: skip
        for name, lowest in smallest.items():
            value = getattr(self, name)
            if isinstance(value, float) or (isinstance(value, int) and value < lowest):
                self._refuse(name, f"a whole number of {lowest} or more")
        for name in "lr alpha vision_lr max_grad_norm lora_plus logit_scale_lr checkpoint_every_minutes".split():
            if not 0 < getattr(self, name) < float("inf"):
                self._refuse(name, "a number above 0")
        given = (self.from_adapter, self.dora, self.bias != "none")
        if sum(map(bool, given)) > 1 or self.from_adapter and self.modules_to_save:
            what = "two of --from-adapter, --dora and --bias, or --from-adapter with --modules-to-save"
            raise UserError(f"Found {what}. Keep one of them: an adapter says itself what it is.")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                self._refuse(name, "a number from 0 up to, not including, 1")
        if not 0 <= self.weight_decay < float("inf"):
            self._refuse("weight_decay", "a number of 0 or more")

    def reading(self) -> dict[str, Any]:
        """The settings that decide which rows are read and how: the keyword arguments of `load_data`."""
        names = "image_column caption_column group_column template image_root limit seed revision"
        return {name: getattr(self, name) for name in names.split()}

    def _refuse(self, name: str, expected: str) -> None:
        raise UserError(f"Found --{name.replace('_', '-')} {getattr(self, name)}, expected {expected}.")


RESUME_MAY_CHANGE = frozenset(
    ("resume", "output", "chunk_size", "checkpointing", "checkpoint_every_minutes", "checkpoint_every_steps")
    + ("encoder", "precision")  # the trainer compares the dtype that precision resolves to
    # the trainer compares the content of data and base model, which may lie elsewhere now
    + ("data", "revision", "model", "image_root", "image_column", "caption_column", "group_column", "template")
)
"""Settings that may change with --resume: where and how to compute, not what is learned."""
RESUME_MAY_EXTEND = frozenset(("steps", "epochs", "lr"))
"""Settings that change with --resume where their flag is given with it."""


PRESETS = {
    # Phantoms, in minutes. Their clean images and captions allow a high learning rate and a trained temperature. The
    # bundled CLIP sees findings and only lacks their names: at the full rate its vision tower would forget them.
    "demo": replace(Config(), epochs=4, lr=1e-2, vision_lr=0.1, fragments=2, train_logit_scale=True),
    # ViT-B/32 on ROCOv2, for a 16 GB GPU. More than one fragment was not tried.
    "roco": replace(
        Config(), data="eltorio/ROCOv2-radiology", model="openai/clip-vit-base-patch32",
        batch_size=256, epochs=6, lr=5e-4, fragments=1,
    ),
}  # fmt: skip


def parse(arguments: list[str]) -> tuple[str, Config]:
    """Read the command line of train.py: a preset, and flags that change it -> (name of the preset, configuration)."""
    named = bool(arguments) and not arguments[0].startswith("-")
    preset, flags = (arguments[0], arguments[1:]) if named else ("demo", arguments)
    if preset not in PRESETS:
        raise UserError(f"Found no preset {preset!r}, expected one of {', '.join(PRESETS)} or a flag.")
    own = not named and any(flag.split("=")[0] == "--data" for flag in flags)
    command, default = f"{cli.console or 'python train.py'} {preset}", Config() if own else PRESETS[preset]
    return preset, cli.parse(Config, flags, command, default)
