"""Splits of a dataset: their rows, their usual names, and the validation rows drawn where a source has none."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from PIL import Image

from clip_medical.errors import UserError

# Names of splits in real datasets, in lower case. Other spellings are added here.
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(["validation", "validate", "valid", "val", "dev"], "validation")
TO_EVALUATE = ("validation", "test", "", "train")  # where no split is named: the first of these that there is
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """N rows of one split: captions, labels, and a function that opens the images."""

    captions: list[str]  # N, non-empty, stripped
    ids: list[str]  # N, unique names for messages: file name, image_id or row number
    labels: dict[str, list[str]]  # facet -> N labels, "" where unknown; only the facets that the source has
    open_image: Callable[[int], Image.Image]  # row -> "L" or "RGB", upright; UnreadableImage names a damaged one
    origins: list[str]  # N: location and version of each row's pixels; sorted, they follow the order on disk
    groups: Sequence[str] = ()  # N: rows of one group (a patient, else an image) stay together; (): each by itself

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, indices: Sequence[int]) -> "Split":
        """Return the rows at `indices`, in that order."""
        captions, ids, origins = ([column[i] for i in indices] for column in (self.captions, self.ids, self.origins))
        labels = {facet: [column[i] for i in indices] for facet, column in self.labels.items()}
        open_image = partial(_open_selected, self.open_image, list(indices))
        return Split(captions, ids, labels, open_image, origins, [self.groups[i] for i in indices if self.groups])


# A function with bound arguments, because a closure could not be pickled for worker processes.
def _open_selected(open_image: Callable[[int], Image.Image], indices: list[int], row: int) -> Image.Image:
    return open_image(indices[row])


def by_split(parts: Mapping[str, T], source: str, split: str | None = None) -> dict[str, T]:
    """Choose the parts of a source by their split.

    parts  names as the source has them ("val", "Test", ..., "" for a source without splits) -> anything
    split  None: the parts to train on, which are "train" and "validation", or "test" where there is no validation
           split; "train" alone; or {"": part} for a single part under another name. "": the part to evaluate on, the
           first of TO_EVALUATE. Otherwise the part of that name

    Raises UserError if a split is unknown or twice there, or the wanted one is missing.
    """
    if len(parts) == 1 and next(iter(parts)).lower() not in SPLIT_NAMES and not split:
        return {"": next(iter(parts.values()))}
    splits = {SPLIT_NAMES.get(name.lower(), name): part for name, part in parts.items()}
    found = ", ".join(name or "(rows without a split)" for name in parts)
    if split is not None and len(splits) == len(parts):
        names = [SPLIT_NAMES.get(split.lower(), split)] if split else TO_EVALUATE
        if chosen := [name for name in names if name in splits]:
            return {chosen[0]: splits[chosen[0]]}
        raise UserError(f"{source} has the splits {found}. Choose one of them with --split.")
    if "train" not in splits or len(splits) < len(parts) or not splits.keys() <= SPLIT_NAMES.keys():
        raise UserError(f"{source} has the splits {found}. Expected one train and one validation (or test) split.")
    validation = "validation" if "validation" in splits else "test"
    return {name: splits[name] for name in ("train", validation) if name in splits}


def hold_out(groups: Sequence[str], seed: int, source: str, count: int) -> tuple[list[int], list[int]]:
    """Draw about `count` of N rows, in whole groups -> (other rows, drawn rows), each ascending.

    groups  (N,) the patient or image of each row. Rows of one group are never on both sides, and a group that is larger
            than `count` is not drawn (if all are, the smallest is)

    Raises UserError if all rows are in one group.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    if len(members) < 2:
        raise UserError(f"{source} has only one image or group, so none can be held out. Add a validation split.")
    order = list(members.values())
    random.Random(seed).shuffle(order)
    drawn: list[int] = []
    for rows in order:
        if len(drawn) + len(rows) <= max(1, count):
            drawn += rows
    drawn = drawn or min(order, key=len)
    return sorted(set(range(len(groups))) - set(drawn)), sorted(drawn)
