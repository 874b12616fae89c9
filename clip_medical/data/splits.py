"""The rows of one split of a data set, and how some are held out where the source has no split of its own."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from clip_medical.errors import UserError


@dataclass(frozen=True)
class Split:
    """Rows of one split: N captions, what is known of each, and a way to open each image."""

    captions: list[str]  # N, non-empty, stripped
    ids: list[str]  # N, unique: what an error message calls the row (file name, image_id or row number)
    labels: dict[str, list[str]]  # facet -> N labels, "" where unknown; only the facets that the source has
    open_image: Callable[[int], Image.Image]  # row -> "L" or "RGB", upright; UnreadableImage names a damaged one
    origins: list[str]  # N: where the pixels of each row come from, in which version; they sort as they lie on disk

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, indices: Sequence[int]) -> "Split":
        """The rows at `indices`, in that order."""
        labels = {facet: [values[i] for i in indices] for facet, values in self.labels.items()}
        opener = partial(_open_selected, self.open_image, list(indices))
        captions, ids, origins = ([one[i] for i in indices] for one in (self.captions, self.ids, self.origins))
        return Split(captions, ids, labels, opener, origins)


# a function with bound arguments and not a closure, so that it can be sent to worker processes
def _open_selected(open_image: Callable[[int], Image.Image], indices: list[int], row: int) -> Image.Image:
    return open_image(indices[row])


def hold_out(rows: list[int], ties: list[str], seed: int, source: str) -> tuple[list[int], list[int]]:
    """A tenth of `rows` is held out -> (kept, held), with no tie from one to the other."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(ties[row], []).append(row)
    if len(groups) < 2:
        raise UserError(f"{source}: there is nothing to hold out, as all rows ({len(rows)}) are of one image or group.")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held: list[int] = []
    for group in order:
        if len(held) + len(group) <= max(1, round(len(rows) / 10)):  # a group that is too large stays in training
            held += group
    held = held or min(order, key=len)
    return sorted(set(rows) - set(held)), sorted(held)
