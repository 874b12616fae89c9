"""A local Hugging Face Hub for tests with the real clients: huggingface_hub, transformers and datasets.

    with StandInHub() as hub:
        hub.add("models", "openai/clip-vit-base-patch32", clip_folder(tmp_path / "clip"))
        hub.add("datasets", "eltorio/ROCOv2-radiology", roco_folder(tmp_path / "roco"))
        subprocess.run([sys.executable, "train.py", "roco", ...], env=hub.environment(tmp_path / "home"))

It serves folders under the URLs of huggingface.co, and implements the part of its protocol that downloads use:
repository descriptions, file lists, and files with ETag by HEAD and GET, with ranges. `requests` logs what was
requested; `drop` and `refuse` simulate failures.
"""

import hashlib
import io
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class StandInHub:
    """The server, as a context manager that runs it in a thread. All its repositories are public."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, Path]] = {}  # (kind, id) -> revision -> folder
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.drop: dict[str, list[int]] = {}  # end of a path -> after how many bytes the next responses break off
        self.refuse: dict[str, int] = {}  # end of a path -> HTTP status of all responses
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, folder: Path, revision: str = "main") -> str:
        """Serve `folder` as the "models" or "datasets" repository `name`; return its commit."""
        revisions = self.repositories.setdefault((kind, name), {})
        commit = hashlib.sha1("".join(blob(path) for path in files_of(folder)).encode()).hexdigest()
        revisions[revision] = revisions[commit] = folder
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that uses this Hub, without a token, and stores its downloads in `home`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return inherited | hub | {"HF_HUB_DISABLE_XET": "1", "XDG_CACHE_HOME": str(home / "cache"), "TQDM_DISABLE": "1"}

    def ranges(self, ending: str) -> list[tuple[int, int]]:
        """First and last byte of each range requested by GET from paths with this ending."""
        logged = [range_ for method, path, range_ in self.requests if method == "GET" and path.endswith(ending)]
        bounds = [re.fullmatch(r"bytes=(\d+)-(\d+)", range_) for range_ in logged]
        return [(int(match[1]), int(match[2])) if match else (0, 2**62) for match in bounds]


class Handler(BaseHTTPRequestHandler):
    """Answer one request. A new endpoint is a branch of `answer`."""

    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        status = next((code for ending, code in self.hub.refuse.items() if path.endswith(ending)), None)
        if status:
            return self.send(status, b"refused by the test")
        if match := RESOLVE.fullmatch(path):
            dataset, name, revision, file = match.groups()
            folder = self.folder("datasets" if dataset else "models", name, revision)
            return self.file(folder, file) if folder else None
        if match := API.fullmatch(path):
            kind, name, verb, revision, prefix = match.groups()
            folder = self.folder(kind, name, revision or "main")
            return self.describe(folder, name, verb, prefix or "", body, parse_qs(url.query)) if folder else None
        self.send(404, b"no such address")

    do_GET = do_HEAD = do_POST = answer

    def folder(self, kind: str, name: str, revision: str) -> Path | None:
        revisions = self.hub.repositories.get((kind, name), {})
        if revision not in revisions:
            error = "RevisionNotFound" if revisions else "RepoNotFound"
            self.send(404, b"{}", {"X-Error-Code": error, "X-Error-Message": error})
        return revisions.get(revision)

    def describe(
        self, folder: Path, name: str, verb: str | None, prefix: str, body: bytes, query: dict[str, list[str]]
    ) -> None:
        """Send information about a repository: about paths (paths-info), a list of files (tree), or all of it."""
        files = [file_entry(folder, path) for path in files_of(folder)]
        if verb == "paths-info":
            form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            folders = [folder_entry(path) for path in form["paths"] if (folder / path).is_dir()]
            return self.json([file for file in files if file["path"] in form["paths"]] + folders)
        if verb == "tree":
            inside = [file for file in files if not prefix or file["path"].startswith(prefix + "/")]
            if query.get("recursive", ["false"])[0].lower() == "true":
                return self.json(inside)
            direct = [file for file in inside if "/" not in file["path"].removeprefix(prefix).lstrip("/")]
            deeper = {f["path"].removeprefix(prefix).lstrip("/").split("/")[0] for f in inside if f not in direct}
            return self.json(direct + [folder_entry("/".join(filter(None, (prefix, d)))) for d in sorted(deeper)])
        siblings = [{"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]} for file in files]
        self.json({"_id": "0" * 24, "id": name, "sha": self.commit(folder), "private": False, "gated": False,
                   "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
                   "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z"})  # fmt: skip

    def commit(self, folder: Path) -> str:
        return next(c for r in self.hub.repositories.values() for c, f in r.items() if f == folder and len(c) == 40)

    def file(self, folder: Path, path: str) -> None:
        if not (folder / path).is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "EntryNotFound"})
        data = (folder / path).read_bytes()
        size = len(data)
        headers = {
            "ETag": f'"{blob(folder / path)}"',
            "X-Repo-Commit": self.commit(folder),
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(size),
            "Content-Disposition": f'inline; filename="{Path(path).name}";',
        }
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or size), size - 1)
            status, data = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.send(status, data, headers, self.next_drop(path))

    def next_drop(self, path: str) -> int | None:
        """After how many bytes of the body the connection is to break off, or None."""
        drops = next((drops for ending, drops in self.hub.drop.items() if path.endswith(ending) and drops), None)
        return drops.pop(0) if drops and self.command == "GET" else None

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


def file_entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    return {"type": "file", "oid": blob(path), "size": path.stat().st_size, "path": name}


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


# ---- repositories to serve


def clip_folder(folder: Path, bin_file: bool = True) -> Path:
    """Write a small CLIP with random weights and the files of openai/clip-vit-base-patch32.

    The tokenizer has the layout and the special tokens of the original; its vocabulary is bytes and a few merges.
    bin_file: weights in pytorch_model.bin, as in that repository, instead of model.safetensors.
    """
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokens = write_tokenizer(folder)
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    special = dict(bos_token_id=tokens - 2, eos_token_id=tokens - 1, pad_token_id=tokens - 1)
    text = dict(vocab_size=tokens, max_position_embeddings=77, **special, **small)
    torch.manual_seed(0)
    vision = dict(image_size=224, patch_size=32, **small)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    if bin_file:
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> int:
    """Write the four files of a CLIP tokenizer; return the size of its vocabulary."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's encoding of 256 bytes as characters
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges = [("t", "h"), ("th", "e</w>"), ("c", "t</w>"), ("c", "h"), ("e", "s"), ("ch", "es"), ("ches", "t</w>")]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": CLIPTokenizer.__name__}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


MODALITIES = {"C0040405": "CT", "C1306645": "X-ray", "C0041618": "ultrasound", "C0024485": "MRI"}


def roco_folder(
    folder: Path, train: int = 60, validation: int = 20, shards: int = 3, rows_per_group: int = 5, size: int = 40
) -> Path:
    """Write a small eltorio/ROCOv2-radiology: the same columns, several shards per split, grey and colour PNG.

    Of the training rows, row 1 has the cui ["nan"], row 2 a caption far above 77 tokens, row 4 the image and row 5 the
    caption of row 3. All other captions end in the row number, and every tenth image has colours.
    """
    import datasets

    rng = np.random.default_rng(0)
    text = datasets.Value("string")
    schema = datasets.Features(
        {"image": datasets.Image(), "image_id": text, "caption": text, "cui": datasets.List(text)}
    )
    for split, count in {"train": train, "validation": validation, "test": validation}.items():
        rows = []
        for i in range(count):
            cui = [list(MODALITIES)[i % 4]] + (["C0817096", "C1999039"] if i % 4 == 1 else [])
            shape = (size + i % 7, size + 10 + i % 5) + ((3,) if i % 10 == 9 else ())
            rows.append({"image": {"bytes": png(rng.integers(0, 256, shape, dtype=np.uint8)), "path": None},
                         "caption": f"{MODALITIES[cui[0]]} of the chest, {split} number {i}", "cui": cui,
                         "image_id": f"ROCOv2_2023_{split}_{i:06}"})  # fmt: skip
        if split == "train":
            rows[1]["cui"] = ["nan"]
            rows[2]["caption"] = "a long caption " * 60
            rows[4]["image"], rows[5]["caption"] = rows[3]["image"], rows[3]["caption"]
        for shard in range(shards):
            part = datasets.Dataset.from_list(rows[shard * count // shards : (shard + 1) * count // shards], schema)
            path = folder / "data" / f"{split}-{shard:05}-of-{shards:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.to_parquet(path, batch_size=rows_per_group)
    card = [f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "validation", "test")]
    header = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    (folder / "README.md").write_text(header + "".join(card) + "---\n")
    return folder


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
