"""The stand-in Hub with what an upload needs beside: making a repository, large files (LFS), and commits.

Whoever uploads must be logged in with the token that `environment` gives.
"""

import base64
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from tests.stand_in_hub import Handler, StandInHub

TOKEN = "hf_of_the_stand_in"
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class UploadHub(StandInHub):
    """Keeps the repositories that are made in it in folders of `root`."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.visibility: dict[str, str] = {}  # of the repositories that were made here
        self.large: dict[str, bytes] = {}  # SHA-256 -> content
        self.server.RequestHandlerClass = type("Bound", (UploadHandler,), {"hub": self})

    def environment(self, home: Path) -> dict[str, str]:
        return super().environment(home) | {"HF_TOKEN": TOKEN}


class UploadHandler(Handler):
    hub: UploadHub

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        upload, batch = UPLOAD.fullmatch(path), BATCH.fullmatch(path)
        if not (upload or batch or path in ("/api/repos/create", "/api/validate-yaml") or self.command == "PUT"):
            return super().answer()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, ""))
        if self.command == "PUT":  # storage has addresses that need no login
            self.hub.large[path.rpartition("/")[2]] = body
            return self.send(200, b"")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, b'{"error": "Invalid username or password."}')
        if upload and upload[2] == "commit":
            return self.commit_files(upload[1], [json.loads(line) for line in body.splitlines()])
        asked = json.loads(body)
        if upload:
            modes = {f["path"]: "lfs" if f["path"].endswith((".safetensors", ".onnx")) else "regular"
                     for f in asked["files"]}  # fmt: skip
            return self.json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        if batch:
            where = {o["oid"]: {"upload": {"href": f"{self.hub.url}/storage/{o['oid']}"}} for o in asked["objects"]}
            objects = [o | {"actions": where[o["oid"]]} for o in asked["objects"]]
            return self.json({"transfer": "basic", "objects": objects})
        if path == "/api/validate-yaml":
            yaml.safe_load(asked["content"].split("---")[1])  # a bad one breaks the connection
            return self.json({"errors": [], "warnings": []})
        return self.make(f"{asked['organization']}/{asked['name']}", asked.get("visibility", "public"))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def make(self, name: str, visibility: str) -> None:
        address = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.visibility:
            return self.send(409, json.dumps(address).encode())
        self.hub.visibility[name] = visibility
        (self.hub.root / name).mkdir(parents=True)
        self.hub.add("models", name, self.hub.root / name)
        self.json(address)

    def commit_files(self, name: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] in ("file", "lfsFile"):
                file = self.hub.root / name / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                large = line["key"] == "lfsFile"
                file.write_bytes(self.hub.large[value["oid"]] if large else base64.b64decode(value["content"]))
        del self.hub.repositories["models", name]
        commit = self.hub.add("models", name, self.hub.root / name)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
