"""A local Hub that also accepts uploads: it creates repositories, stores large files (LFS), and applies commits.

Only the token that `environment` sets is accepted; without it, an upload gets status 401.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from tests.stand_in_hub import Handler, StandInHub

TOKEN = "hf_test_token"
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class UploadHub(StandInHub):
    """Store created repositories as folders below `root`."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.visibility: dict[str, str] = {}  # repository -> "private" or "public"
        self.large_files: dict[str, bytes] = {}  # SHA-256 -> content
        self.server.RequestHandlerClass = type("Bound", (UploadHandler,), {"hub": self})

    def environment(self, home: Path) -> dict[str, str]:
        return super().environment(home) | {"HF_TOKEN": TOKEN}


class UploadHandler(Handler):
    """Answer the requests of an upload, and leave all others to Handler."""

    hub: UploadHub

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        upload, batch = UPLOAD.fullmatch(path), BATCH.fullmatch(path)
        if not (upload or batch or path in ("/api/repos/create", "/api/validate-yaml") or self.command == "PUT"):
            return super().answer()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, ""))
        if self.command == "PUT":  # storage URLs are pre-signed, so they need no token
            self.hub.large_files[path.rpartition("/")[2]] = body
            return self.send(200, b"")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, b'{"error": "Invalid username or password."}')
        if upload and upload[2] == "commit":
            return self.commit_files(upload[1], [json.loads(line) for line in body.splitlines()])
        request = json.loads(body)
        if upload:
            return self.json({"files": [upload_mode(file["path"]) for file in request["files"]]})
        if batch:
            return self.json({"transfer": "basic", "objects": [self.storage(o) for o in request["objects"]]})
        if path == "/api/validate-yaml":
            yaml.safe_load(request["content"].split("---")[1])  # invalid YAML closes the connection
            return self.json({"errors": [], "warnings": []})
        return self.create(f"{request['organization']}/{request['name']}", request.get("visibility", "public"))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def storage(self, lfs_object: dict[str, Any]) -> dict[str, Any]:
        """Return the LFS object with the URL that its content is to be sent to."""
        return lfs_object | {"actions": {"upload": {"href": f"{self.hub.url}/storage/{lfs_object['oid']}"}}}

    def create(self, name: str, visibility: str) -> None:
        address = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.visibility:
            return self.send(409, json.dumps(address).encode())
        self.hub.visibility[name] = visibility
        (self.hub.root / name).mkdir(parents=True)
        self.hub.add("models", name, self.hub.root / name)
        self.json(address)

    def commit_files(self, name: str, lines: list[dict[str, Any]]) -> None:
        folder = self.hub.root / name
        for line in lines:
            if line["key"] not in ("file", "lfsFile"):
                continue
            value, file = line["value"], folder / line["value"]["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            is_large = line["key"] == "lfsFile"
            file.write_bytes(self.hub.large_files[value["oid"]] if is_large else base64.b64decode(value["content"]))
        del self.hub.repositories["models", name]
        commit = self.hub.add("models", name, folder)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})


def upload_mode(path: str) -> dict[str, Any]:
    """Say whether a file is uploaded through LFS or as part of the commit."""
    is_large = path.endswith((".safetensors", ".onnx"))
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
