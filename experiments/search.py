"""Search images by text or by image, with the unadapted and the adapted model.

    python -m experiments.search --run runs/x --add validation      index the validation images of the run,
    python -m experiments.search --run runs/x --add my/images       or a folder of images, or any --data of train.py
    python -m experiments.search --run runs/x --text "MRI of the lumbar spine" --k 8
    python -m experiments.search --run runs/x --image my.png

Indexing can be interrupted and repeated: indexed images are not read again.
"""

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from clip_medical.data.dataset import load_data
from clip_medical.data.images import decode
from clip_medical.data.splits import Split
from clip_medical.errors import UserError
from clip_medical.evaluation.search import Index, Item
from clip_medical.evaluation.table import as_text
from experiments import figures
from experiments.common import Experiment, Setup, main

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}


def items_of(split: Split, source: str, part: str) -> Iterator[Item]:
    """Yield the rows of a split as index items, named PART/ID."""
    for row, name in enumerate(split.ids):
        labels = {facet: names[row] for facet, names in split.labels.items() if names[row]}
        yield Item(f"{part}/{name}", source, split.captions[row], labels, partial(split.open_image, row))


@dataclass(frozen=True)
class Search(Experiment):
    """Index images and search them by text or by image, before and after adaptation."""

    add: tuple[str, ...] = ()
    """Index a folder of images, a data set as for train.py, or "validation": the validation images of the run."""
    text: str | None = None
    """Text query."""
    image: str | None = None
    """Image query: an image file."""
    k: int = 5
    """Number of images to return; the figure shows the first 10."""
    index: str | None = None
    """Folder of the index. Default: index/ in the folder for the results."""

    name = "search"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and self.image is not None:
            raise UserError("Give either --text or --image as the query, not both.")
        if not (self.add or self.text or self.image):
            raise UserError("Nothing to do. Give --add to index images, or --text or --image to search them.")

    def perform(self) -> int:
        setup = self.load_models()
        folder = Path(self.index) if self.index else setup.folder / "index"
        if not self.add and not (folder / "index.json").is_file():
            raise UserError(f"{folder} holds no index. Create it with --add.")
        index = Index(folder, setup.models)
        for source in self.add:
            items = self.items_to_add(source, setup)
            with tqdm(total=len(items), desc="index", unit="image", leave=False) as bar:
                added = index.add(items, bar.update)
            print(
                f"{source}: {added.new:,} images added, {added.known:,} already indexed, "
                f"{added.duplicates:,} duplicates skipped, {len(added.unreadable):,} unreadable"
            )
            print("".join(f"  {reason}\n" for reason in added.unreadable[:3]), end="")
        print(f"The index in {folder} holds {len(index):,} images")
        if self.text or self.image:
            self.search(index, setup)
        return 0

    def items_to_add(self, source: str, setup: Setup) -> list[Item]:
        """Return the images that `--add source` stands for."""
        if source == "validation":
            data = self.load_data(setup)
            return list(items_of(data.validation, data.source, "validation"))
        folder = Path(source)
        tables = ("metadata.*", "*/metadata.*", "**/*.parquet")
        if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in tables):  # image files, no captions
            files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not files:
                raise UserError(f"--add {source}: the folder contains no images.")
            return [Item(str(f.relative_to(folder)), source, "", {}, partial(decode, f, str(f))) for f in files]
        data = load_data(source, seed=self.seed)
        return [*items_of(data.train, source, "train"), *items_of(data.validation, source, "validation")]

    def search(self, index: Index, setup: Setup) -> None:
        """Search with every model, then print, draw and save the best images."""
        image = decode(Path(self.image), self.image) if self.image else None
        query = self.text or f"images similar to {self.image}"
        hits, grid = {}, {}
        for model, clip in setup.models.items():
            feature = clip.encode_texts([query]) if image is None else clip.encode_images([image])
            found = index.search(model, feature[0], self.k)
            hits[model] = [hit._asdict() for hit in found]
            grid[model] = [] if image is None else [(image, "query", "")]
            cells = [[model, "cosine"]]
            for hit in found:
                cells.append([f"{hit.name}  {textwrap.shorten(hit.caption, 90)}", f"{hit.score:.3f}"])
                labels = [hit.labels[facet] for facet in ("modality", "anatomy") if facet in hit.labels]
                text = "\n".join(labels) or hit.caption or hit.name
                grid[model].append((index.thumbnail(hit.row), f"{hit.score:.3f}", text))
            print(f"\n{as_text(cells)}")
        shown = {model: panels[:10] for model, panels in grid.items()}
        figures.search_results(f"{query}, among {len(index):,} images", shown, setup.folder / "search.png")
        results = {"query": query, "images in the index": len(index), "hits": hits}
        self.save(setup, self.name, results, "search.png")


if __name__ == "__main__":
    sys.exit(main(Search))
