"""A searchable index of images, on disk in parts that are either complete or absent.

index.json            the models that computed the features, by hash: other models are refused
part-00000-0.parquet  a row per image: name, source, caption, labels (JSON), hash of the pixels, thumbnail (JPEG), and
                      for each model its feature (D,), fp32, unit length

Adding can be interrupted and continued: images in finished parts are not read again. Identical images are found once,
under one of their names. Thumbnails stay on disk until they are shown. Other programs read the parts as they are:
see "Search at scale" in clip_medical/export/README.md.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from clip_medical.errors import UserError
from clip_medical.model import Clip, weights_fingerprint
from clip_medical.run_folder import make_folder, read_json, write_text
from lora.inject import lora_layers, own_parameters

PART = 512  # images per part: at most this many are read again after an interruption
THUMBNAIL = 160  # longest side in pixels
TEXTS = ("name", "source", "caption", "labels", "hash")
SCHEMA = pa.schema([*((name, pa.string()) for name in TEXTS), ("thumbnail", pa.binary())])
FEATURE = "feature: "  # column of a model's features: this and the name of the model


class Item(NamedTuple):
    """An image to add."""

    name: str  # unique within its source
    source: str
    caption: str  # "" if there is none
    labels: Mapping[str, str]
    open: Callable[[], Image.Image]  # raises UserError if the image cannot be read


class Added(NamedTuple):
    """What became of the images passed to `Index.add`."""

    new: int
    known: int  # already in the index under the same name: not read again
    duplicates: int  # already in the index under another name
    unreadable: list[str]  # an error message for each


class Found(NamedTuple):
    """A search result."""

    row: int
    score: float  # cosine similarity
    name: str
    caption: str
    labels: dict[str, str]


def identity(clip: Clip) -> str:
    """Return a SHA-256 over everything that decides the features of a model: its base and its adapter."""
    layers = lora_layers(clip.model)
    trained = nn.ParameterList(p for layer in layers.values() for p in own_parameters(layer).values())
    kinds = {name: [type(layer).__name__, layer.scaling * layer.strength] for name, layer in layers.items()}
    parts = (clip.fingerprint, weights_fingerprint(trained), json.dumps(kinds))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def write_part(file: Path, rows: pa.Table, features: dict[str, Tensor]) -> None:
    """Write some rows (columns of SCHEMA) and their features, model -> (rows, D), atomically."""
    for model, matrix in features.items():
        column = pa.FixedSizeListArray.from_arrays(matrix.flatten().numpy(), matrix.shape[1])
        rows = rows.append_column(FEATURE + model, column)
    temporary = file.with_suffix(".tmp")
    # hardly any float occurs twice, so a dictionary would cost time and save nothing
    pq.write_table(rows, temporary, use_dictionary=False, write_page_checksum=True)
    os.replace(temporary, file)


def read_part(file: Path, columns: list[str]) -> pa.Table:
    """Return columns of a part; raise UserError if it is damaged."""
    try:
        return pq.ParquetFile(file, page_checksum_verification=True).read(columns).select(columns)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{file} is damaged ({error}). Delete it and add its images again.") from error


class Index:
    """The index in `folder`, created if it does not exist, with features of `models` (name -> Clip of one base).

    Raises UserError if the folder holds other files, if the index was built with other weights, or if it is damaged.
    """

    def __init__(self, folder: Path, models: dict[str, Clip]) -> None:
        self.folder, self.models = folder, models
        identities = {name: identity(clip) for name, clip in models.items()}
        stored = read_json(folder / "index.json").get("models")
        if stored is None:
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"{folder} holds files but no index. Choose another --index.")
            make_folder(folder, "--index")
            write_text(folder / "index.json", json.dumps({"models": identities}, indent=2) + "\n")
        elif stored != identities:
            raise UserError(
                f"The index in {folder} was built with other weights ({', '.join(stored)}), so its features cannot be "
                "compared with those of this model. Search with the model that built it, or choose another --index."
            )
        self.load()

    def __len__(self) -> int:
        return len(self.table)

    def load(self) -> None:
        """Read what is in the folder now."""
        if any(self.folder.glob("part-*.arrow")):
            raise UserError(f"An earlier version built the index in {self.folder}. Delete it and add the images again.")
        self.parts = sorted(self.folder.glob("part-*.parquet"))
        tables = [read_part(part, [*TEXTS, *(FEATURE + model for model in self.models)]) for part in self.parts]
        every = pa.concat_tables(t.select(TEXTS) for t in tables) if tables else SCHEMA.empty_table()
        self.ends = np.cumsum([len(table) for table in tables])  # of each part: the row after its last one
        # The first of each image: processes that add at the same time do not see what the others store.
        self.rows = np.sort(np.unique(every["hash"].to_numpy(), return_index=True)[1])
        self.table = every.take(self.rows)
        columns = {m: [t[FEATURE + m].combine_chunks().flatten() for t in tables] for m in self.models if tables}
        matrix = (len(every), -1)
        self.features = {m: torch.from_numpy(np.concatenate(c).reshape(matrix)[self.rows]) for m, c in columns.items()}

    def add(self, items: Iterable[Item], progress: Callable[[int], Any] = lambda _: None, process: int = 0) -> Added:
        """Add the images that the index does not have yet. progress: called with the number of images processed.

        process: number of this process, where several add their shares at the same time.
        """
        items, names = list(items), set(zip(*(self.table[c].to_pylist() for c in ("source", "name")), strict=True))
        unknown = list({(i.source, i.name): i for i in items if (i.source, i.name) not in names}.values())
        progress(len(items) - len(unknown))
        hashes = set(self.table["hash"].to_pylist())
        number = 1 + int(self.parts[-1].stem.split("-")[1]) if self.parts else 0
        new, duplicates, unreadable = 0, 0, []
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for start in range(0, len(unknown), PART):
                    chunk, rows = unknown[start : start + PART], []
                    for row in pool.map(self._read, chunk):
                        if "error" in row:
                            unreadable.append(row["error"])
                        elif row["hash"] in hashes:
                            duplicates += 1
                        else:
                            hashes.add(row["hash"])
                            rows.append(row)
                    if rows:
                        features = self._encode(torch.from_numpy(np.stack([row["pixels"] for row in rows])))
                        part = self.folder / f"part-{number:05d}-{process}.parquet"
                        write_part(part, pa.Table.from_pylist(rows, SCHEMA), features)
                        number, new = number + 1, new + len(rows)
                    progress(len(chunk))
        finally:
            self.load()
        return Added(new, len(items) - len(unknown), duplicates, unreadable)

    def _read(self, item: Item) -> dict[str, Any]:
        """Return the columns of an item and its "pixels" (3, S, S) uint8, or {"error"} if it cannot be read."""
        try:
            image = item.open()
        except UserError as error:
            return {"error": str(error)}
        pixels = np.ascontiguousarray(next(iter(self.models.values())).processor.pixels(image))
        small, jpeg = image.copy(), io.BytesIO()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(jpeg, "JPEG", quality=85)
        columns = {"hash": hashlib.sha256(pixels.data).hexdigest(), "thumbnail": jpeg.getvalue(), "pixels": pixels}
        return item._asdict() | columns | {"labels": json.dumps(dict(item.labels))}

    @torch.no_grad()
    def _encode(self, pixels: Tensor, batch_size: int = 64) -> dict[str, Tensor]:
        batches = pixels.split(batch_size)
        return {m: torch.cat([clip.image_features(b).cpu() for b in batches]) for m, clip in self.models.items()}

    def search(self, model: str, query: Tensor, k: int = 5) -> list[Found]:
        """Return the k images nearest to `query` (D,), a unit-length feature of that model, best first."""
        if not len(self):
            raise UserError(f"The index in {self.folder} is empty. Add images with --add.")
        best = (self.features[model] @ query).topk(min(k, len(self)))
        found = []
        for row, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            name, caption, labels = (self.table[column][row].as_py() for column in ("name", "caption", "labels"))
            found.append(Found(row, score, name, caption, json.loads(labels)))
        return found

    def thumbnail(self, row: int) -> Image.Image:
        """Return the thumbnail of a row, read from its part."""
        row = int(self.rows[row])
        part = int(np.searchsorted(self.ends, row, side="right"))
        column = read_part(self.parts[part], ["thumbnail"])["thumbnail"]
        return Image.open(io.BytesIO(column[row - int(self.ends[part])].as_py()))  # counted from the end
