"""A searchable index of pictures, on disk in parts, each of which is whole or not there.

index.json               the models whose features these are, by fingerprint: those of another model are refused
part-00000.parquet       rows: name, source, caption, labels (JSON), hash of the pixels, a thumbnail (JPEG)
part-00000.safetensors   of each model the features (rows, D), unit length; written last, and no part without it counts

Adding goes on where it was interrupted: what is in a part is not read again. The same picture is kept once, under
whatever names it comes.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.provenance import weights_fingerprint
from clip_medical.runs import make_folder, read_json, write_text
from lora.inject import lora_layers

PART = 512  # pictures a part: what an interruption can cost
THUMBNAIL = 160  # pixels of its longest side
COLUMNS = ("name", "source", "caption", "labels", "hash")


class Item(NamedTuple):
    """A picture to add."""

    name: str  # unique in its source
    source: str
    caption: str  # "" where there is none
    labels: Mapping[str, str]
    open: Callable[[], Image.Image]  # UserError where it cannot be read


class Added(NamedTuple):
    """How many of the pictures that were offered to an index are of which kind."""

    new: int
    known: int  # names that the index has already: not read again
    duplicates: int  # pictures that it has under another name
    unreadable: list[str]  # what was wrong with each


class Found(NamedTuple):
    """A picture that was searched for."""

    row: int
    score: float  # cosine
    name: str
    caption: str
    labels: dict[str, str]


def fingerprints(clip: Clip) -> dict[str, str]:
    """Which weights made the features: {"base": name, "model": hash of the base, "adapter": of A and B, "" if none}."""
    layers = lora_layers(clip.model)
    matrices = nn.ParameterList(matrix for layer in layers.values() for matrix in (layer.lora_A, layer.lora_B))
    scales = json.dumps({name: layer.scaling * layer.strength for name, layer in layers.items()})
    adapter = hashlib.sha256((weights_fingerprint(matrices) + scales).encode()).hexdigest() if layers else ""
    return {"base": clip.name, "model": clip.fingerprint, "adapter": adapter}


class Index:
    """The index in `folder`, made when there is none, of pictures as `models` (name -> Clip of one base) see them.

    Raises UserError if what is there was built with other weights, or is damaged.
    """

    def __init__(self, folder: Path, models: dict[str, Clip]) -> None:
        self.folder, self.models = folder, models
        mine = {name: fingerprints(clip) for name, clip in models.items()}
        stored = read_json(folder / "index.json").get("models")
        if stored is None and folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} holds files but no index: choose another --index.")
        identity = ("model", "adapter")  # a base may be called by another path
        if stored is not None and {n: [f.get(i) for i in identity] for n, f in stored.items()} != {
            n: [f[i] for i in identity] for n, f in mine.items()
        }:
            built = ", ".join(
                f"{n} {f.get('base')} {(f.get('adapter') or f.get('model', ''))[:12]}" for n, f in stored.items()
            )
            raise UserError(
                f"the index in {folder} was built with other weights ({built}), whose features cannot be compared "
                "with those of this model: search it with the model that built it, or choose another --index."
            )
        if stored is None:
            make_folder(folder, "--index")
            write_text(folder / "index.json", json.dumps({"models": mine}, indent=2) + "\n")
        self._load()

    def __len__(self) -> int:
        return len(self.rows)

    def _load(self) -> None:
        self.parts = sorted(self.folder.glob("part-*.safetensors"))
        tables, features = [], []
        for part in self.parts:
            try:
                tables.append(pq.read_table(part.with_suffix(".parquet"), columns=list(COLUMNS)))
                features.append(load_file(part))
                sizes = {len(tables[-1]), *(len(of_model) for of_model in features[-1].values())}
                if len(sizes) > 1 or features[-1].keys() != self.models.keys():
                    raise ValueError("its rows and its features do not belong together")
            except (OSError, ValueError, SafetensorError, pa.ArrowException) as error:
                names = f"{part.name} and {part.with_suffix('.parquet').name}"
                raise UserError(f"{part} is damaged ({error}): delete {names}, and add the pictures again.") from error
        self.starts = np.cumsum([0, *map(len, tables)])
        self.rows: list[dict[str, str]] = pa.concat_tables(tables).to_pylist() if tables else []
        self.features = {name: torch.cat([of[name] for of in features]) for name in self.models} if features else {}

    def add(self, items: Iterable[Item], told: Callable[[int], Any] = lambda count: None) -> Added:
        """Add what is not there yet. told: is called with the number of pictures that each part has dealt with."""
        names = {(row["source"], row["name"]) for row in self.rows}
        hashes = {row["hash"] for row in self.rows}
        number = 1 + max((int(part.stem.removeprefix("part-")) for part in self.parts), default=-1)
        before, known, duplicates, unreadable = len(self), 0, 0, []

        def unknown() -> Iterator[Item]:
            nonlocal known
            for item in items:
                if (item.source, item.name) in names:
                    known += 1
                    told(1)
                else:
                    names.add((item.source, item.name))
                    yield item

        waiting = unknown()
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                while chunk := list(islice(waiting, PART)):
                    rows, pixels = [], []
                    for row, seen in pool.map(self._read, chunk):
                        if seen is None:
                            unreadable.append(row["error"])
                        elif row["hash"] in hashes:
                            duplicates += 1
                        else:
                            hashes.add(row["hash"])
                            rows.append(row)
                            pixels.append(seen)
                    if rows:
                        self._write(self.folder / f"part-{number:05d}", rows, torch.from_numpy(np.stack(pixels)))
                        number += 1
                    told(len(chunk))
        finally:
            self._load()
        return Added(len(self) - before, known, duplicates, unreadable)

    def _read(self, item: Item) -> tuple[dict[str, Any], np.ndarray | None]:
        """The row of an item and its pixels (3, S, S) uint8; without pixels, why it cannot be read."""
        try:
            image = item.open()
        except UserError as error:
            return {"error": str(error)}, None
        pixels = np.ascontiguousarray(next(iter(self.models.values())).picture(image))
        small, file = image.copy(), io.BytesIO()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(file, "JPEG", quality=85)
        row = {
            "name": item.name,
            "source": item.source,
            "caption": item.caption,
            "labels": json.dumps(dict(item.labels)),
        }
        return row | {"hash": hashlib.sha256(pixels.data).hexdigest(), "thumbnail": file.getvalue()}, pixels

    @torch.no_grad()
    def _write(self, part: Path, rows: list[dict[str, Any]], pixels: Tensor, batch_size: int = 64) -> None:
        """Rows first, features last, each under another name until it is whole."""
        features = {
            name: torch.cat([clip.image_features(batch).cpu() for batch in pixels.split(batch_size)])
            for name, clip in self.models.items()
        }
        table, beside = part.with_suffix(".parquet"), part.with_suffix(".beside")
        pq.write_table(pa.Table.from_pylist(rows), beside)
        os.replace(beside, table)
        save_file(features, beside)
        os.replace(beside, part.with_suffix(".safetensors"))

    def search(self, model: str, query: Tensor, k: int = 5) -> list[Found]:
        """The k pictures nearest to `query` (D,), a unit-length feature of that model, best first."""
        if not len(self):
            raise UserError(f"the index in {self.folder} is empty: add pictures with --add.")
        best = (self.features[model] @ query).topk(min(k, len(self)))
        found = []
        for row, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            about = self.rows[row]
            found.append(Found(row, score, about["name"], about["caption"], json.loads(about["labels"])))
        return found

    def thumbnail(self, row: int) -> Image.Image:
        """The small picture of a row."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        column = pq.read_table(self.parts[part].with_suffix(".parquet"), columns=["thumbnail"])["thumbnail"]
        return Image.open(io.BytesIO(column[row - int(self.starts[part])].as_py()))
