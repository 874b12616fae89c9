"""A Hugging Face Hub of one's own, on loopback, for the real clients: huggingface_hub, transformers and datasets.

    with StandInHub() as hub:
        hub.add("models", "openai/clip-vit-base-patch32", clip_folder(tmp_path / "clip"))
        hub.add("datasets", "eltorio/ROCOv2-radiology", roco_folder(tmp_path / "roco"))
        subprocess.run([sys.executable, "train.py", "roco", ...], env=hub.environment(tmp_path / "home"))

It serves the files of a folder under the addresses of huggingface.co, and speaks as much of its protocol as reading
needs: the description of a repository, its list of files, and the files with their ETag, by HEAD and GET, with ranges.
`requests` keeps what was asked for; `drop`, `refuse` and `delay` make it a bad one.
"""

import hashlib
import io
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class StandInHub:
    """The server; a context manager that runs it in a thread. All its repositories are public."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, Path]] = {}  # (kind, id) -> revision -> folder
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.drop: dict[str, list[int]] = {}  # end of a path -> after how many bytes the next answers break off
        self.refuse: dict[str, int] = {}  # end of a path -> status of all answers
        self.delay = 0.0  # seconds before each answer
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, folder: Path, revision: str = "main") -> str:
        """Serve `folder` as the "models" or "datasets" repository `name`; returns the commit that it has."""
        revisions = self.repositories.setdefault((kind, name), {})
        commit = hashlib.sha1("".join(blob(p) for p in files_of(folder)).encode()).hexdigest()
        revisions[revision] = revisions[commit] = folder
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that knows no other Hub, has no token, and keeps what it fetches in `home`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        return inherited | ours | {"XDG_CACHE_HOME": str(home / "cache"), "TQDM_DISABLE": "1"}

    def fetched(self, ending: str) -> int:
        """How many GET requests asked for a path with this ending."""
        return sum(method == "GET" and path.endswith(ending) for method, path, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One request. To add an endpoint, add a branch to `answer`."""

    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        time.sleep(self.hub.delay)
        status = next((code for ending, code in self.hub.refuse.items() if path.endswith(ending)), None)
        if status:
            return self.send(status, b"refused on purpose")
        if found := RESOLVE.fullmatch(path):
            dataset, name, revision, file = found.groups()
            folder = self.folder("datasets" if dataset else "models", name, revision)
            return self.file(folder, name, file) if folder else None
        if found := API.fullmatch(path):
            kind, name, verb, revision, under = found.groups()
            folder = self.folder(kind, name, revision or "main")
            return self.describe(folder, name, verb, under or "", body, parse_qs(url.query)) if folder else None
        self.send(404, b"no such address")

    do_GET = do_HEAD = do_POST = answer

    def folder(self, kind: str, name: str, revision: str) -> Path | None:
        revisions = self.hub.repositories.get((kind, name), {})
        if revision not in revisions:
            what = "RevisionNotFound" if revisions else "RepoNotFound"
            self.send(404, b"{}", {"X-Error-Code": what, "X-Error-Message": what})
        return revisions.get(revision)

    def describe(self, folder: Path, name: str, verb: str | None, under: str, body: bytes, query: dict) -> None:
        entries = [entry(folder, path) for path in files_of(folder)]
        if verb == "paths-info":
            form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            folders = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0}
                       for p in form["paths"] if (folder / p).is_dir()]  # fmt: skip
            return self.json([e for e in entries if e["path"] in form["paths"]] + folders)
        if verb == "tree":
            inside = [e for e in entries if not under or e["path"].startswith(under + "/")]
            if query.get("recursive", ["false"])[0].lower() == "true":
                return self.json(inside)
            direct = [e for e in inside if "/" not in e["path"].removeprefix(under).lstrip("/")]
            deeper = {e["path"].removeprefix(under).lstrip("/").split("/")[0] for e in inside if e not in direct}
            return self.json(direct + [{"type": "directory", "path": "/".join(filter(None, (under, d))),
                                        "oid": "0" * 40, "size": 0} for d in sorted(deeper)])  # fmt: skip
        siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in entries]
        self.json({"_id": "0" * 24, "id": name, "sha": self.commit(folder), "private": False, "gated": False,
                   "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
                   "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z"})  # fmt: skip

    def commit(self, folder: Path) -> str:
        return next(c for r in self.hub.repositories.values() for c, f in r.items() if f == folder and len(c) == 40)

    def file(self, folder: Path, name: str, path: str) -> None:
        if not (folder / path).is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "EntryNotFound"})
        data = (folder / path).read_bytes()
        headers = {
            "ETag": f'"{blob(folder / path)}"',
            "X-Repo-Commit": self.commit(folder),
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(data)),
            "Content-Disposition": f'inline; filename="{Path(path).name}";',
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, whole = 200, len(data)
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or whole), whole - 1)
            status, data = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{whole}"
        self.send(status, data, headers, self.next_drop(path))

    def next_drop(self, path: str) -> int | None:
        """How many bytes of the body to send before the line goes dead, if this answer is to be a broken one."""
        waiting = next((w for ending, w in self.hub.drop.items() if path.endswith(ending) and w), None)
        return waiting.pop(0) if waiting and self.command == "GET" else None

    def json(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, drop: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:drop])
        self.close_connection = drop is not None

    def log_message(self, *_: object) -> None:
        pass


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def blob(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def entry(folder: Path, path: Path) -> dict[str, Any]:
    where = path.relative_to(folder).as_posix()
    return {"type": "file", "oid": blob(path), "size": path.stat().st_size, "path": where}


# ---- what it serves


def clip_folder(folder: Path, small: bool = True, bin_file: bool = True) -> Path:
    """openai/clip-vit-base-patch32 as it lies on the Hub, with random weights; `small`: fewer, narrower layers.

    The tokenizer has the layout and the special tokens of the real one, and knows bytes and a few common pairs.
    bin_file: weights as pytorch_model.bin, as that repository has them, instead of model.safetensors.
    """
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokens = write_tokenizer(folder)
    narrow = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2) if small else {}
    ends = dict(bos_token_id=tokens - 2, eos_token_id=tokens - 1, pad_token_id=tokens - 1)
    text = dict(vocab_size=tokens, max_position_embeddings=77, **ends, **narrow)
    config = CLIPConfig(text_config=text, vision_config=dict(image_size=224, patch_size=32, **narrow),
                        projection_dim=32 if small else 512)  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config)
    if bin_file:
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> int:
    """vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json; returns the size of the vocabulary."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's way of writing 256 bytes as letters
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges = [("t", "h"), ("th", "e</w>"), ("c", "t</w>"), ("c", "h"), ("e", "s"), ("ch", "es"), ("ches", "t</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": CLIPTokenizer.__name__}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(words)


MODALITIES = {"C0040405": "CT", "C1306645": "X-ray", "C0041618": "ultrasound", "C0024485": "MRI"}


def roco_folder(folder: Path, train: int = 60, held_out: int = 20, shards: int = 3, row_group: int = 5) -> Path:
    """eltorio/ROCOv2-radiology in small: the same columns, several shards a split, PNG in grey and in colour.

    Of the training rows, row 1 has the cui ["nan"], row 2 a caption far over 77 tokens, row 4 the image and row 5 the
    caption of row 3, and every tenth is coloured. Row i has the caption "... number i" where it is not one of these.
    """
    import datasets

    rng = np.random.default_rng(0)
    word = datasets.Value("string")
    columns = {"image": datasets.Image(), "image_id": word, "caption": word, "cui": datasets.List(word)}
    schema = datasets.Features(columns)
    for split, count in {"train": train, "validation": held_out, "test": held_out}.items():
        rows = []
        for i in range(count):
            cui = [list(MODALITIES)[i % 4]] + (["C0817096", "C1999039"] if i % 4 == 1 else [])
            words = f"{MODALITIES[cui[0]]} of the chest, {split} number {i}"
            shape = (40 + i % 7, 50 + i % 5) + ((3,) if i % 10 == 9 else ())
            rows.append({"image": png(rng.integers(0, 256, shape, dtype=np.uint8)), "caption": words, "cui": cui,
                         "image_id": f"ROCOv2_2023_{split}_{i:06}"})  # fmt: skip
        if split == "train":
            rows[1]["cui"] = ["nan"]
            rows[2]["caption"] = "a long caption " * 60
            rows[4]["image"], rows[5]["caption"] = rows[3]["image"], rows[3]["caption"]
        for shard in range(shards):
            part = datasets.Dataset.from_list(rows[shard * count // shards : (shard + 1) * count // shards], schema)
            path = folder / "data" / f"{split}-{shard:05}-of-{shards:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(path, batch_size=row_group)
    card = [f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "validation", "test")]
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(card) + "---\n"
    )
    return folder


def png(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
