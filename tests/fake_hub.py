"""Serve the part of the Hugging Face Hub's HTTP that a push needs, on loopback, as huggingface_hub speaks it.

Large files go by Git LFS (basic transfer), small ones inside the commit; both as the client asks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_token-of-a-test"
_LARGE = (".parquet", ".safetensors", ".jsonl")


@dataclass
class Repository:
    """A repository: visibility, files by path, and how many commits it has."""

    visibility: str
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class FakeHub:
    """The state of the server.

    Attributes:
        repositories: by "datasets/OWNER/NAME" or "models/OWNER/NAME".
        requests: method and path of every request.
        refuse: status that every request gets; 0: none.
        spoil: large files arrive changed.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    refuse: int = 0
    spoil: bool = False
    url: str = ""

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate, methods=["POST"]),
            Route("/api/{kind}/{owner}/{name}/preupload/{revision}", self.preupload, methods=["POST"]),
            Route("/api/{kind}/{owner}/{name}/commit/{revision}", self.commit, methods=["POST"]),
            Route("/api/{kind}/{owner}/{name}/paths-info/{revision}", self.paths, methods=["POST"]),
            Route("/api/{kind}/{owner}/{name}/revision/{revision}", self.info, methods=["GET"]),
            Route("/{kind}/{owner}/{name}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route("/{owner}/{name}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route("/lfs/{oid}", self.upload, methods=["PUT"]),
        ]
        return Starlette(routes=routes)

    def _refusal(self, request: Request) -> Response | None:
        self.requests.append((request.method, request.url.path))
        if self.refuse:
            return JSONResponse({"error": "refused on purpose"}, self.refuse)
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "Invalid username or password."}, 401)
        return None

    def _repository(self, request: Request) -> Repository:
        parts = request.path_params
        return self.repositories[f"{parts['kind']}/{parts['owner']}/{parts['name']}"]

    async def create(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        name = f"{body.get('type', 'model')}s/{body['organization']}/{body['name']}"
        url = f"{self.url}/{name.removeprefix('models/')}"
        if name in self.repositories:
            return JSONResponse({"error": "You already created this repo", "url": url}, 409)
        private = "private" if body.get("private") else "public"
        self.repositories[name] = Repository(body.get("visibility", private))
        return JSONResponse({"url": url, "name": name.split("/", 1)[1]})

    async def validate(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        files = self._repository(request).files
        asked = (await request.json())["files"]
        return JSONResponse(
            {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(_LARGE) else "regular",
                        "shouldIgnore": False,
                        **({"oid": _known_by(each["path"], files)} if each["path"] in files else {}),
                    }
                    for each in asked
                ]
            }
        )

    async def batch(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        objects = []
        for each in (await request.json())["objects"]:
            upload = (
                {} if each["oid"] in self.objects else {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}
            )
            objects.append({**each, **({"actions": upload} if upload else {})})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def upload(self, request: Request) -> Response:
        content = await request.body()
        self.requests.append((request.method, request.url.path))
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            return Response(status_code=400)
        self.objects[request.path_params["oid"]] = content[:-1] if self.spoil else content
        return Response()

    async def commit(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        repository = self._repository(request)
        for line in (await request.body()).splitlines():
            entry: dict[str, Any] = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]
        repository.commits += 1
        oid = f"{repository.commits:040x}"
        parts = request.path_params
        page = f"{parts['kind']}/{parts['owner']}/{parts['name']}".removeprefix("models/")
        url = f"{self.url}/{page}/commit/{oid}"
        return JSONResponse({"commitUrl": url, "commitOid": oid, "success": True})

    async def info(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        repository, parts = self._repository(request), request.path_params
        name = f"{parts['owner']}/{parts['name']}"
        return JSONResponse({"id": name, "sha": f"{repository.commits:040x}", "siblings": [], "tags": []})

    async def paths(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        files = self._repository(request).files
        asked = parse_qs((await request.body()).decode())["paths"]
        return JSONResponse(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(files[path]),
                    "oid": _oid(path, files[path]),
                    **({"lfs": _lfs(files[path])} if path.endswith(_LARGE) else {}),
                }
                for path in asked
                if path in files
            ]
        )


def _known_by(path: str, files: dict[str, bytes]) -> str:
    """Return what the client compares a file with: the SHA-256 of a large one, the git id of a small one."""
    if path.endswith(_LARGE):
        return hashlib.sha256(files[path]).hexdigest()
    return _oid(path, files[path])


def _oid(path: str, content: bytes) -> str:
    """Return the git id of a file, or of the LFS pointer to it."""
    if path.endswith(_LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        content = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        )
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _lfs(content: bytes) -> dict[str, Any]:
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}


@contextmanager
def running() -> Iterator[FakeHub]:
    """Serve a fake Hub during the block."""
    hub = FakeHub()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(hub.app(), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join()
