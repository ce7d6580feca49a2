"""A hub on 127.0.0.1 that speaks as much of the Hugging Face protocol as uploading and downloading a model takes."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopback"


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class LoopbackHub(ThreadingHTTPServer):
    """Serves until the `with` block ends; `repositories` and `requests` say what has happened."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.requests: list[tuple[str, str]] = []

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        method = "GET" if self.command == "HEAD" else self.command
        self.server.requests.append((self.command, path))
        is_storage = path.startswith("/storage/")
        if not is_storage and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials"}, 401, {"X-Error-Code": "RepoNotFound"})
        for pattern, handle in ROUTES[method].items():
            if match := re.fullmatch(pattern, path):
                return handle(self, body, *match.groups())
        return self._json({"error": f"no route for {self.command} {path}"}, 404)

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _bytes(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif repository.sha(revision) is None:
            self._json({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository, repository.sha(revision)
        return None

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repositories:
            return self._json({"error": "You already created this model repo", **answer}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repository = self.server.repositories[repo_id] = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._json(answer)

    def branch(self, body: bytes, repo_id: str, branch: str) -> None:
        if found := self._repository(repo_id, "main"):
            repository, sha = found
            if branch in repository.branches:
                return self._json({"error": "Reference already exists"}, 409)
            repository.branches[branch] = sha
            self._json({})
        return None

    def validate_card(self, body: bytes) -> None:
        front_matter = json.loads(body)["content"].split("---\n")[1]
        wrong = not isinstance(yaml.safe_load(front_matter), dict)
        self._json({"errors": [{"message": "no mapping"}] if wrong else [], "warnings": []}, 400 if wrong else 200)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if self._repository(repo_id, revision):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})

    def large_batch(self, body: bytes, repo_id: str) -> None:
        objects = [
            {
                **item,
                "actions": {
                    "upload": {"href": f"{self.server.url}/storage/{item['oid']}"},
                    "verify": {"href": f"{self.server.url}/{repo_id}.git/info/lfs/verify"},
                },
            }
            for item in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def large_upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large_files[oid] = body
        self._bytes(b"")

    def large_verify(self, body: bytes, repo_id: str) -> None:
        asked = json.loads(body)
        assert len(self.server.large_files[asked["oid"]]) == asked["size"]
        self.server.verified.add(asked["oid"])
        self._json({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        found = self._repository(repo_id, revision)
        if found is None:
            return
        repository, sha = found
        files, message = dict(repository.commits[sha]), ""
        for line in body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                assert value["oid"] in self.server.verified
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(revision, files, message)
        self._json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        if found := self._repository(repo_id, revision or "main"):
            repository, sha = found
            siblings = [{"rfilename": path} for path in repository.commits[sha]]
            self._json({"id": repo_id, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self._repository(repo_id, revision):
            repository, sha = found
            entries = []
            for path, content in repository.commits[sha].items():
                git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid}
                if path.endswith(".safetensors"):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
                entries.append(entry)
            self._json(entries)

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        if found := self._repository(repo_id, revision):
            repository, sha = found
            content = repository.commits[sha].get(path)
            if content is None:
                return self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            etag = hashlib.sha256(content).hexdigest()
            self._bytes(content, headers={"X-Repo-Commit": sha, "ETag": f'"{etag}"'})
        return None


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "GET": {
        f"/api/models/{REPO}": Handler.info,
        f"/api/models/{REPO}/revision/([^/]+)": Handler.info,
        f"/api/models/{REPO}/tree/([^/]+)": Handler.tree,
        f"/{REPO}/resolve/([^/]+)/(.+)": Handler.resolve,
    },
    "POST": {
        "/api/repos/create": Handler.create,
        "/api/validate-yaml": Handler.validate_card,
        f"/api/models/{REPO}/branch/([^/]+)": Handler.branch,
        f"/api/models/{REPO}/preupload/([^/]+)": Handler.preupload,
        f"/{REPO}.git/info/lfs/objects/batch": Handler.large_batch,
        f"/{REPO}.git/info/lfs/verify": Handler.large_verify,
        f"/api/models/{REPO}/commit/([^/]+)": Handler.commit,
    },
    "PUT": {"/storage/([0-9a-f]{64})": Handler.large_upload},
}
