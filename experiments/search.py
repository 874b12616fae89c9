"""Search images by text or by image, with the unadapted and the adapted model.

    python -m experiments.search --run runs/x --add validation      index the validation images of the run,
    python -m experiments.search --run runs/x --add my/images       or a folder of images, or any --data of train.py
    python -m experiments.search --run runs/x --text "MRI of the lumbar spine" --k 8
    python -m experiments.search --run runs/x --image my.png

Indexing can be interrupted and repeated: indexed images are not read again.
"""

import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from clip_medical.data.dataset import load_data
from clip_medical.data.dicom import is_dicom
from clip_medical.data.images import IMAGE_SUFFIXES, decode
from clip_medical.data.splits import Split
from clip_medical.data.tables import READERS
from clip_medical.errors import UserError
from clip_medical.evaluation import plots
from clip_medical.evaluation.search import Found, Index, Item
from clip_medical.evaluation.table import as_text
from clip_medical.training import distributed
from experiments.common import Experiment, Setup, main


def is_image(file: Path) -> bool:
    """Whether a file is to be indexed: by its suffix or, as DICOM files often have none, by its first bytes."""
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with open(file, "rb") as handle:
            return is_dicom(handle.read(256))
    except OSError:  # of another user
        return False


def items_of(split: Split, source: str, part: str) -> Iterator[Item]:
    """Yield the rows of a split as index items, named PART/ID."""
    for row, name in enumerate(split.ids):
        labels = {facet: names[row] for facet, names in split.labels.items() if names[row]}
        yield Item(f"{part}/{name}", source, split.captions[row], labels, partial(split.open_image, row))


@dataclass(frozen=True)
class Search(Experiment):
    """Index images and search them by text or by image, before and after adaptation."""

    # Index a folder of images, a data set as for train.py, or "validation": the validation images of the run.
    add: tuple[str, ...] = ()
    # Text query.
    text: str | None = None
    # Image query: an image file.
    image: str | None = None
    # Number of images to return; the figure shows the first 5.
    k: int = 5
    # Folder of the index. Default: index/ in the folder for the results.
    index: str | None = None

    name = "search"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text and self.image or not (self.add or self.text or self.image):
            raise UserError("Give --add to index images, or either --text or --image to search them.")

    @distributed.processes()
    def perform(self) -> int:
        setup = self.load_models()
        folder = Path(self.index) if self.index else setup.folder / "index"
        if not self.add and not (folder / "index.json").is_file():
            raise UserError(f"{folder} holds no index. Create it with --add.")
        process, processes = distributed.rank(), distributed.world_size()
        with distributed.rank_0_first():
            index = Index(folder, setup.models)
        if self.add:
            before, items = len(index), [item for source in self.add for item in self.items_to_add(source, setup)]
            share = items[process::processes]
            with tqdm(total=len(share), desc="index", unit="image", leave=False, disable=process > 0) as bar:
                parts = distributed.all_gather_objects(index.add(share, bar.update, process))
            index.load()  # with what the others added
            new, unreadable = len(index) - before, [message for part in parts for message in part.unreadable]
            known, same = sum(part.known for part in parts), sum(part.new + part.duplicates for part in parts) - new
            counts = f"{new:,} images added, {known:,} already indexed, {same:,} duplicates"
            print(f"{', '.join(self.add)}: {counts}, {len(unreadable):,} unreadable", *unreadable[:3], sep="\n  ")
        if process:
            return 0
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
        every = {file: None for file in sorted(folder.rglob("*")) if file.is_file() and file.name[0] != "."}
        files = {file: None for file in every if is_image(file)}
        stems = {file.with_suffix("") for file in files}
        suffixes = READERS.keys() - {".txt"}
        tables = [f for f in every if f.suffix.lower() in suffixes or f.suffix == ".txt" and f.with_suffix("") in stems]
        if files and not tables:  # images without captions, which load_data would refuse
            if others := Counter(f.suffix for f in every if f not in files):
                listed = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common())
                print(f"{source}: files that are no images are left out: {listed}")
            return [Item(str(f.relative_to(folder)), source, "", {}, partial(decode, f, str(f))) for f in files]
        names = "image_column", "caption_column", "template", "image_root", "seed"
        data = load_data(source, **{name: getattr(self, name) for name in names})
        parts = {"train": data.train, "calibration": data.calibration, "validation": data.validation}
        return [item for part, split in parts.items() for item in items_of(split, source, part)]

    def search(self, index: Index, setup: Setup) -> None:
        """Search with every model, then print, draw and save the best images."""
        query = self.text or f"images similar to {self.image}"
        image = decode(Path(self.image), self.image) if self.image else None
        results: dict[str, list[Found]] = {}
        for model, clip in setup.models.items():
            feature = clip.encode_texts([query]) if image is None else clip.encode_images([image])
            results[model] = index.search(model, feature[0], self.k)
            cells = [[f"{h.name}  {textwrap.shorten(h.caption, 90)}", f"{h.score:.3f}"] for h in results[model]]
            print("\n" + as_text([[model, "cosine"], *cells]))

        def panel(hit: Found) -> plots.Hit:
            text = " of the ".join(hit.labels[facet] for facet in ("modality", "anatomy") if facet in hit.labels)
            text = textwrap.shorten(text or hit.caption or hit.name, 30)
            return index.thumbnail(hit.row), f"{text}\ncosine {hit.score:.3f}", None

        panels = {model: [[panel(hit) for hit in hits[:5]]] for model, hits in results.items()}
        plots.search_grid([query], panels, len(index), setup.folder / "search.png")
        hits = {model: [hit._asdict() for hit in hits] for model, hits in results.items()}
        self.save(setup, self.name, {"query": query, "images in the index": len(index), "hits": hits}, "search.png")


if __name__ == "__main__":
    sys.exit(main(Search))
