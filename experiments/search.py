"""Search pictures by words or by a picture, the adapted model beside the unadapted.

    python -m experiments.search --run runs/x --add held-out        what the run held out; or a folder of
    python -m experiments.search --run runs/x --add my/pictures     pictures, or whatever train.py takes as --data
    python -m experiments.search --run runs/x --text "MRI of the lumbar spine" --k 8
    python -m experiments.search --run runs/x --image my.png

Adding may be interrupted and repeated: what the index holds is not read again.
"""

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from clip_medical.data.images import decode
from clip_medical.data.sources import Split, load_data
from clip_medical.errors import UserError
from clip_medical.evaluation.search import Found, Index, Item
from experiments import common, figures

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}


@dataclass(frozen=True)
class Search(common.Common):
    """Build an index of pictures and search it by text or by picture, before and after adaptation."""

    add: tuple[str, ...] = ()
    """Pictures to put into the index: a folder of them, what train.py takes as --data, or held-out: the held-out
    pictures of the run (or of --data)."""
    text: str | None = None
    """What to search for, in words."""
    image: str | None = None
    """What to search for, as a picture."""
    k: int = 5
    """How many pictures to show."""
    index: str | None = None
    """Folder of the index; default: index/ in the folder for the results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and self.image is not None:
            raise UserError("give either --text or --image to search for, not both.")
        if not self.add and self.text is None and self.image is None:
            raise UserError("nothing to do: give --add to build the index, --text or --image to search it.")
        if self.text is not None and not self.text.strip():
            raise UserError("--text is empty: give the words to search for.")
        if not 1 <= self.k <= 10:
            raise UserError(f"--k is {self.k}: give a number from 1 to 10.")


def items_of(split: Split, source: str, part: str) -> Iterator[Item]:
    """The rows of a split, named by their part of the data."""
    for row, name in enumerate(split.ids):
        labels = {facet: names[row] for facet, names in split.labels.items() if names[row]}
        yield Item(f"{part}/{name}", source, split.captions[row], labels, partial(split.open_image, row))


def gather(source: str, setup: common.Setup, options: Search) -> list[Item]:
    """What --add SOURCE stands for."""
    if source == "held-out":
        data = common.load_evidence(setup, options)
        return list(items_of(data.validation, data.source, "validation"))
    folder = Path(source)
    if folder.is_dir() and not any(
        any(folder.glob(pattern)) for pattern in ("metadata.*", "*/metadata.*", "**/*.parquet")
    ):  # a folder of pictures and no more
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
        if not files:
            raise UserError(f"--add {source}: there are no pictures in that folder.")
        return [Item(str(f.relative_to(folder)), source, "", {}, partial(decode, f, str(f))) for f in files]
    data = load_data(source, seed=options.seed)
    return [*items_of(data.train, source, "train"), *items_of(data.validation, source, "validation")]


def extend(index: Index, setup: common.Setup, options: Search) -> None:
    """Put all of --add into the index, and say what became of it."""
    for source in options.add:
        items = gather(source, setup, options)
        with tqdm(total=len(items), desc="index", unit="image", leave=False) as bar:
            added = index.add(items, bar.update)
        print(
            f"{source}: {added.new:,} pictures added, {added.known:,} were there already, "
            f"{added.duplicates:,} duplicates left out, {len(added.unreadable):,} could not be read"
        )
        for reason in added.unreadable[:3]:
            print(f"  {reason}")
    print(f"The index in {index.folder} holds {len(index):,} pictures")


def words(found: Found) -> str:
    """What stands under a picture: its labels, or else its caption, or else its name."""
    return (
        "\n".join(found.labels[f] for f in ("modality", "anatomy") if f in found.labels) or found.caption or found.name
    )


def query(index: Index, setup: common.Setup, options: Search) -> None:
    """Search, show, write."""
    picture: Image.Image | None = None
    if options.image is not None:
        if not Path(options.image).is_file():
            raise UserError(f"--image {options.image}: there is no such file.")
        picture = decode(Path(options.image), options.image)
    results = {}
    for model, clip in setup.models.items():
        feature = clip.encode_images([picture]) if picture else clip.encode_texts([options.text or ""])
        results[model] = index.search(model, feature[0], options.k)
    for model, found in results.items():
        width = max(len(hit.name) for hit in found)
        print(f"\n{model}\n    cosine  {'picture'.ljust(width)}  caption")
        for rank, hit in enumerate(found, start=1):
            print(f"{rank:>2}  {hit.score:6.3f}  {hit.name.ljust(width)}  {textwrap.shorten(hit.caption, 90)}")
    asked = options.text or f"pictures like {Path(options.image or '').name}"
    hits = {model: [hit._asdict() for hit in found] for model, found in results.items()}
    common.save(setup, "search", {"query": asked, "pictures in the index": len(index), "hits": hits})
    grid = {
        model: [(index.thumbnail(hit.row), hit.score, words(hit)) for hit in found] for model, found in results.items()
    }
    figures.hits_grid(f"{asked}, among {len(index):,} pictures", picture, grid, setup.folder / "search.png")
    common.said(setup, "search.json", "search.png")


def run(options: Search) -> int:
    setup = common.load_models("search", options)
    folder = Path(options.index) if options.index else setup.folder / "index"
    if not options.add and not (folder / "index.json").is_file():
        raise UserError(f"there is no index in {folder}: build it with --add first.")
    index = Index(folder, setup.models)
    if options.add:
        extend(index, setup, options)
    if options.text is not None or options.image is not None:
        query(index, setup, options)
    return 0


if __name__ == "__main__":
    sys.exit(common.main("search", Search, run))
