"""A Hub in memory, for the real huggingface_hub client: repositories, commits, branches, tags, LFS, and faults.

The client needs ``HF_ENDPOINT`` set to :attr:`Hub.url` and ``HF_HUB_DISABLE_XET=1``, both before it is imported.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, USER = "hf_local", "user"
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_ID = r"(?P<id>[^/]+/[^/]+?)"


class Hub(ThreadingHTTPServer):
    """Serves on a free port of this machine from the moment it is made.

    Attributes:
        repos: By ``user/name``.
        received: Method, path and body of every request; headers are not kept.
        objects: LFS files by SHA-256.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.received: list[tuple[str, str, bytes]] = []
        self.objects: dict[str, bytes] = {}
        self._faults: list[list] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fail(self, path: str, times: int, how: int | str) -> None:
        """Answer the next requests whose ``METHOD path`` matches with a status, or ``'close'`` the connection."""
        self._faults.append([re.compile(path), times, how])

    def heal(self) -> None:
        """Forget the faults that are left."""
        self._faults.clear()

    def fault(self, request: str) -> int | str | None:
        for fault in self._faults:
            pattern, times, how = fault
            if times > 0 and pattern.search(request):
                fault[1] -= 1
                return how
        return None

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no fault of the server."""


class Repo:
    """Files by commit, and commits by branch and tag."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, dict]] = {}
        self.titles: dict[str, str] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", {".gitattributes": _file(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "init")

    def commit(self, branch: str, files: dict[str, dict], title: str) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = files, title, sha
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if sha in self.commits else None

    def names(self, revision: str = "main") -> set[str]:
        """Paths of the files of a revision."""
        return set(self.commits[self.find(revision)])


def _file(data: bytes) -> dict:
    return {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), "size": len(data), "data": data}


def _lfs_file(data: bytes) -> dict:
    return {**_file(data), "sha256": hashlib.sha256(data).hexdigest()}


class _Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, code: int, data=b"", **headers: str):
        self.code, self.headers = code, headers
        self.data = data if isinstance(data, bytes) else json.dumps(data).encode()


def _refused(code: int, name: str, **headers: str) -> _Answer:
    # The client makes its exceptions from these headers.
    return _Answer(code, {"error": name}, **{"X-Error-Code": name, "X-Error-Message": name, **headers})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets
    server: Hub

    def log_message(self, *args) -> None:
        """Nothing: the tests look at ``Hub.received``."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        address = urlsplit(self.path)
        self.query, body = parse_qs(address.query), self._body()
        with self.server.lock:
            self.server.received.append((self.command, self.path, body))
            fault = self.server.fault(f"{self.command} {address.path}")
            if fault == "close":
                self.close_connection = True
                self.connection.close()
                return
            try:
                self._dispatch(address.path, body, fault)
            except _Answer as answer:
                self._send(answer)

    def _dispatch(self, path: str, body: bytes, fault: int | None) -> None:
        if fault is not None:
            raise _refused(fault, "Fault")
        for methods, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                handler(self, body, **{key: unquote(value or "") for key, value in match.groupdict().items()})
        raise _refused(404, f"UnknownRoute {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.code)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.data)), **answer.headers}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.data)

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, id: str, revision: str = "main", writes: bool = False) -> tuple[Repo, str]:
        if writes and not self._authorized():
            raise _refused(401, "Unauthorized")
        repo = self.server.repos.get(id)
        if repo is None or (repo.private and not self._authorized()):
            raise _refused(404 if self._authorized() else 401, "RepoNotFound")
        sha = repo.find(revision)
        if sha is None:
            raise _refused(404, "RevisionNotFound")
        return repo, sha

    # ---- repositories, branches, tags

    def whoami(self, body: bytes) -> None:
        if not self._authorized():
            raise _refused(401, "Unauthorized")
        access = {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}
        raise _Answer(200, {"type": "user", "id": "1", "name": USER, "fullname": USER, "orgs": [], "auth": access})

    def validate(self, body: bytes) -> None:
        raise _Answer(200, {"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        if not self._authorized():
            raise _refused(401, "Unauthorized")
        wanted = json.loads(body)
        id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{id}", "name": id, "id": id}
        if id in self.server.repos:
            raise _Answer(409, answer, **{"X-Error-Message": "You already created this model repo"})
        self.server.repos[id] = Repo(bool(wanted.get("private")) or wanted.get("visibility") == "private")
        raise _Answer(200, answer)

    def info(self, body: bytes, id: str, revision: str = "main") -> None:
        repo, sha = self._repo(id, revision)
        files = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        raise _Answer(
            200, {"id": id, "modelId": id, "sha": sha, "private": repo.private, "tags": [], "siblings": files}
        )

    def refs(self, body: bytes, id: str) -> None:
        repo, _ = self._repo(id)
        named = {
            key: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]
            for key, kind, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        raise _Answer(200, {**named, "converts": []})

    def branch(self, body: bytes, id: str, name: str) -> None:
        repo, sha = self._repo(id, json.loads(body or b"{}").get("startingPoint", "main"), writes=True)
        if name in repo.branches:
            raise _refused(409, "Conflict")
        repo.branches[name] = sha
        raise _Answer(200, {})

    def tag(self, body: bytes, id: str, revision: str) -> None:
        repo, sha = self._repo(id, revision, writes=True)
        name = json.loads(body)["tag"]
        if name in repo.tags:
            raise _refused(409, "Conflict")
        repo.tags[name] = sha
        raise _Answer(200, {})

    def delete_tag(self, body: bytes, id: str, name: str) -> None:
        repo, _ = self._repo(id, writes=True)
        if repo.tags.pop(name, None) is None:
            raise _refused(404, "RevisionNotFound")
        raise _Answer(200, {})

    def tree(self, body: bytes, id: str, revision: str, folder: str) -> None:
        repo, sha = self._repo(id, revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        deep = self.query.get("recursive", [""])[0].lower() == "true"
        entries, folders = [], set()
        for path, file in sorted(repo.commits[sha].items()):
            if not path.startswith(prefix):
                continue
            *parents, _ = path.removeprefix(prefix).split("/")
            folders |= {
                prefix + "/".join(parents[: n + 1]) for n in range(len(parents) if deep else min(1, len(parents)))
            }
            if deep or not parents:
                lfs = (
                    {"lfs": {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}}
                    if "sha256" in file
                    else {}
                )
                entries.append({"type": "file", "path": path, "size": file["size"], "oid": file["oid"], **lfs})
        if prefix and not entries and not folders:
            raise _refused(404, "EntryNotFound", **{"X-Repo-Commit": sha})
        raise _Answer(200, [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in folders] + entries)

    # ---- upload

    def preupload(self, body: bytes, id: str, revision: str) -> None:
        repo, sha = self._repo(id, revision, writes=True)
        answers = []
        for file in json.loads(body)["files"]:
            old = repo.commits[sha].get(file["path"], {})
            mode = "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular"
            oid = old.get("sha256") or old.get("oid")
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise _Answer(200, {"files": answers})

    def lfs_batch(self, body: bytes, id: str) -> None:
        self._repo(id, writes=True)
        answers = []
        for file in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}", "header": {}}}}
            answers.append({**file, **(upload if file["oid"] not in self.server.objects else {})})
        raise _Answer(
            200, {"transfer": "basic", "objects": answers}, **{"Content-Type": "application/vnd.git-lfs+json"}
        )

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _refused(400, "BadOid")
        self.server.objects[oid] = body
        raise _Answer(200)

    def commit(self, body: bytes, id: str, revision: str) -> None:
        repo, sha = self._repo(id, revision, writes=True)
        if revision not in repo.branches:
            raise _refused(404, "RevisionNotFound")
        files, title = dict(repo.commits[sha]), ""
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = _file(base64.b64decode(value["content"]))
                case "lfsFile":
                    files[value["path"]] = _lfs_file(self.server.objects[value["oid"]])
                case "deletedFile":
                    del files[value["path"]]
        new = repo.commit(revision, files, title)
        raise _Answer(200, {"success": True, "commitOid": new, "commitUrl": f"{self.server.url}/{id}/commit/{new}"})

    # ---- download

    def resolve(self, body: bytes, id: str, revision: str, path: str) -> None:
        repo, sha = self._repo(id, revision)
        file = repo.commits[sha].get(path)
        if file is None:
            raise _refused(404, "EntryNotFound", **{"X-Repo-Commit": sha})
        tag = file.get("sha256") or file["oid"]
        raise _Answer(
            200, file["data"],
            **{"X-Repo-Commit": sha, "ETag": f'"{tag}"', "X-Linked-Size": str(file["size"]), "Accept-Ranges": "bytes"},
        )  # fmt: skip


_API, _REVISION = f"/api/models/{_ID}", "(?P<revision>[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"{_API}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"{_API}/commit/{_REVISION}", _Handler.commit),
    ("POST", f"{_API}/branch/(?P<name>[^/]+)", _Handler.branch),
    ("POST", f"{_API}/tag/{_REVISION}", _Handler.tag),
    ("DELETE", f"{_API}/tag/(?P<name>[^/]+)", _Handler.delete_tag),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("GET", f"{_API}/tree/{_REVISION}(?P<folder>/.*)?", _Handler.tree),
    ("GET", f"{_API}/revision/{_REVISION}", _Handler.info),
    ("GET", _API, _Handler.info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", f"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
