"""A stand-in for the Hugging Face Hub on 127.0.0.1: the HTTP API that huggingface_hub 2.4 and datasets 5.2 use.

Repositories and their commits are kept in memory. Large files go the way of Git LFS to a second server, the storage,
which is another origin, as the Hub's is. What a client uploads by Xet goes into a folder, if one is given, by the
scheme `local://` that hf_xet has for its own tests; from there it does not come back.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

# Of the `.gitattributes` that the Hub puts into new repositories, what this project writes.
LARGE_FILES = ("*.safetensors", "*.parquet", "*.bin", "*.npz", "*.onnx", "*.arrow")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES)
DATE = "2026-01-02T03:04:05.000Z"
INVALID_TOKEN = "Invalid credentials in Authorization header"


# --- what is stored --------------------------------------------------------------------------------------------------


def blob_id(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool = False  # then git holds a pointer, and the storage the content

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.content)}",
        )
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def oid(self) -> str:
        return blob_id(self.pointer if self.large else self.content)

    @property
    def etag(self) -> str:
        """What uploads compare with, too."""
        return self.sha256 if self.large else self.oid

    def entry(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        return entry | ({"lfs": lfs} if self.large else {})


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    title: str
    parent: "Commit | None" = None

    @cached_property
    def oid(self) -> str:
        """Of the files and of all that came before, as in git."""
        tree = {path: file.oid for path, file in sorted(self.files.items())}
        text = json.dumps([self.parent and self.parent.oid, self.title, tree])
        return hashlib.sha1(text.encode()).hexdigest()

    def history(self) -> Iterable["Commit"]:
        commit = self
        while commit:
            yield commit
            commit = commit.parent

    @property
    def card(self) -> dict:
        """The metadata at the top of the README."""
        return front_matter(self.files["README.md"].content.decode()) if "README.md" in self.files else {}


def front_matter(text: str) -> dict:
    parts = text.split("---\n", 2)
    return (yaml.safe_load(parts[1]) or {}) if len(parts) == 3 and not parts[0].strip() else {}


class Repository:
    def __init__(self, kind: str, name: str, private: bool = False):
        self.kind, self.name, self.private, self.gated = kind, name, private, False
        first = Commit({".gitattributes": File(GITATTRIBUTES.encode())}, "initial commit")
        self.commits = {first.oid: first}
        self.refs: dict[str, dict[str, Commit]] = {"branches": {"main": first}, "tags": {}}

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    @property
    def path(self) -> str:
        """Of its page; models have no prefix."""
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    @property
    def files(self) -> dict[str, bytes]:
        """What is in the main branch, for tests."""
        return {path: file.content for path, file in self.refs["branches"]["main"].files.items()}

    def find(self, revision: str) -> Commit:
        named = self.refs["branches"].get(revision) or self.refs["tags"].get(revision)
        found = named or self.commits.get(revision)
        if found is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def add(self, branch: str, files: dict[str, File], title: str) -> Commit:
        commit = Commit(files, title, self.refs["branches"][branch])
        self.commits[commit.oid] = self.refs["branches"][branch] = commit
        return commit


def folder_entries(files: dict[str, File], folder: str, recursive: bool) -> list[dict]:
    """Files and folders within a folder, the root being the empty one, as the tree endpoint lists them."""
    inside = {path: file for path, file in files.items() if path.startswith(f"{folder}/" if folder else "")}
    if folder and not inside:
        raise RefusalError(404, f"{folder} does not exist", "EntryNotFound")
    parents = {str(parent) for path in inside for parent in PurePosixPath(path).parents} - {"."}
    folders = {path for path in parents if path.startswith(f"{folder}/" if folder else "")}
    entries = [file.entry(path) for path, file in inside.items()]
    entries += [{"type": "directory", "path": path, "size": 0, "oid": blob_id(path.encode())} for path in folders]
    if not recursive:
        entries = [entry for entry in entries if str(PurePosixPath(entry["path"]).parent) == (folder or ".")]
    return sorted(entries, key=lambda entry: entry["path"])


# --- requests and answers --------------------------------------------------------------------------------------------


class RefusalError(Exception):
    """An answer that is an error, with the header by which clients tell which one."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.reply = Reply(status, {"error": message}, {"X-Error-Message": message, "X-Error-Code": code})


@dataclass
class Reply:
    status: int = 200
    content: bytes | dict | list = b""
    headers: dict[str, str] = field(default_factory=dict)

    def encoded(self) -> tuple[bytes, dict[str, str]]:
        is_json = not isinstance(self.content, bytes)
        content = json.dumps(self.content).encode() if is_json else self.content
        kind = "application/json" if is_json else "application/octet-stream"
        given = {name: text for name, text in self.headers.items() if text}
        return content, {"Content-Type": kind, "Content-Length": str(len(content))} | given


@dataclass(frozen=True)
class Account:
    """Whom a token stands for; `role` is read or write."""

    name: str
    role: str = "write"


Route = tuple[str, re.Pattern, Callable]
Trouble = Callable[["_Handler"], None]


def status(code: int, message: str = "") -> Trouble:
    def trouble(request: "_Handler") -> None:
        raise RefusalError(code, message)

    return trouble


def hang_up(request: "_Handler") -> None:
    """A connection that ends without an answer."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: "HubServer", routes: list[Route]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.routes = hub, routes
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class HubServer:
    """Holds `repositories` by (kind, name) and answers the holders of `tokens`.

    `troubles[endpoint]` are what its next requests meet instead of an answer. An endpoint has the name of its
    function; in `asked`, one that is missing here is "unknown".
    """

    def __init__(self):
        self.tokens = {
            "hf_writes": Account("NEOAI"),
            "hf_reads": Account("NEOAI", "read"),
            "hf_stranger": Account("someone"),
        }
        self.reset()
        self.api, self.storage = _Server(self, API), _Server(self, STORAGE)

    def reset(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # of the storage, by their SHA-256
        self.parts: dict[str, bytes] = {}  # of objects that are uploaded in parts, by their SHA-256 and number
        self.troubles: dict[str, deque[Trouble]] = defaultdict(deque)
        self.asked: list[tuple[str, str]] = []
        self.xet_folder: Path | None = None
        self.largest_part = 5 * 2**30
        self.page_size = 1000
        self.lock = threading.Lock()

    def close(self) -> None:
        for server in (self.api, self.storage):
            server.shutdown()
            server.server_close()

    def count(self, endpoint: str) -> int:
        """Requests that an endpoint has met."""
        return sum(name == endpoint for name, _ in self.asked)

    def environment(self, home: Path, token: str | None = "hf_writes") -> dict[str, str]:
        """Of a process that takes this for the Hub, and is logged in if a token is given."""
        own = ("HF_", "HUGGING", "TRANSFORMERS_")
        inherited = {name: text for name, text in os.environ.items() if not name.startswith(own)}
        ours = {"HF_ENDPOINT": self.api.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        return {**inherited, **ours, **quiet, **({"HF_TOKEN": token} if token else {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self) -> None:
        """Reads the whole request, also one that is refused: the connection is used again."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with self.hub.lock:
                reply = self.dispatch()
        except RefusalError as refusal:
            reply = refusal.reply
        if reply is None:
            self.close_connection = True
            return
        content, headers = reply.encoded()
        self.send_response(reply.status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 (as the base class looks them up)

    def dispatch(self) -> Reply | None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, endpoint in self.server.routes:
            found = pattern.fullmatch(urlsplit(self.path).path)
            if wanted == method and found:
                self.hub.asked.append((endpoint.__name__, self.path))
                if self.hub.troubles[endpoint.__name__]:
                    return self.hub.troubles[endpoint.__name__].popleft()(self)
                return endpoint(self, **{name: text and unquote(text) for name, text in found.groupdict().items()})
        self.hub.asked.append(("unknown", f"{self.command} {self.path}"))
        raise RefusalError(404, "no such endpoint")

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def account(self) -> Account | None:
        """Whose token was sent; an unknown one is refused whatever is asked."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise RefusalError(401, INVALID_TOKEN)
        return self.hub.tokens.get(token)

    def repository(self, kind: str | None, name: str, write: bool = False) -> Repository:
        """The one that is asked for. For others than its owner a private one does not exist."""
        account, found = self.account, self.hub.repositories.get((kind or "models", name))
        hidden = found is None or (found.private and (account is None or account.name != found.owner))
        if (hidden or write) and account is None:
            raise RefusalError(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(found.owner, "You don't have write access to this repo.")
        return found

    def check_write(self, owner: str, message: str) -> None:
        if self.account is None:
            raise RefusalError(401, "Invalid username or password.")
        if self.account.name != owner or self.account.role == "read":
            raise RefusalError(403, message)

    def check_gate(self, repository: Repository) -> None:
        if repository.gated and (self.account is None or self.account.name != repository.owner):
            message = f"Access to {repository.path} is restricted."
            raise RefusalError(401 if self.account is None else 403, message, "GatedRepo")


API: list[Route] = []
STORAGE: list[Route] = []
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"


def route(method: str, pattern: str, server: list[Route] = API) -> Callable:
    def register(endpoint: Callable) -> Callable:
        server.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


# --- accounts and repositories ---------------------------------------------------------------------------------------


@route("GET", "/api/whoami-v2")
def whoami(request: _Handler) -> Reply:
    account = request.account
    if account is None:
        raise RefusalError(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
    return Reply(content={"type": "user", "name": account.name, "orgs": [], "auth": auth})


@route("POST", "/api/repos/create")
def create_repository(request: _Handler) -> Reply:
    given = request.json
    owner = given["organization"] or getattr(request.account, "name", None)
    kind = given.get("type", "model")
    request.check_write(owner, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
    key = (f"{kind}s", f"{owner}/{given['name']}")
    made = Repository(*key, private=given.get("visibility") == "private")
    url = f"{request.hub.api.url}/{made.path}"
    if key in request.hub.repositories:
        return Reply(409, {"error": "You already created this repo", "url": url})
    request.hub.repositories[key] = made
    return Reply(content={"url": url, "name": made.name})


@route("DELETE", "/api/repos/delete")
def delete_repository(request: _Handler) -> Reply:
    given = request.json
    found = request.repository(f"{given.get('type', 'model')}s", f"{given['organization']}/{given['name']}", True)
    del request.hub.repositories[found.kind, found.name]
    return Reply()


@route("PUT", REPO + "/settings")
def change_settings(request: _Handler, kind: str, name: str) -> Reply:
    repository = request.repository(kind, name, write=True)
    repository.private = request.json.get("visibility", "private" if repository.private else "public") == "private"
    repository.gated = request.json.get("gated", repository.gated)
    return Reply(content={"private": repository.private, "gated": repository.gated})


@route("GET", REPO + "/auth-check(?P<write>/write)?")
def check_access(request: _Handler, kind: str, name: str, write: str | None) -> Reply:
    request.check_gate(request.repository(kind, name, write=bool(write)))
    return Reply()


# --- what is in a repository -----------------------------------------------------------------------------------------


@route("GET", REPO + f"(?:/revision{REVISION})?")
def describe(request: _Handler, kind: str, name: str, revision: str | None) -> Reply:
    repository = request.repository(kind, name)
    commit = repository.find(revision or "main")
    settings = {"private": repository.private, "gated": repository.gated, "disabled": False}
    numbers = {"downloads": 0, "likes": 0, "lastModified": DATE, "createdAt": DATE}
    card = {"cardData": commit.card} | {key: commit.card.get(key) for key in ("tags", "pipeline_tag", "library_name")}
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    named = {"id": name, "author": repository.owner, "sha": commit.oid, "siblings": siblings}
    return Reply(content={**named, **settings, **numbers, **card})


@route("GET", REPO + f"/tree{REVISION}(?:/(?P<folder>.+))?")
def list_tree(request: _Handler, kind: str, name: str, revision: str, folder: str | None) -> Reply:
    repository = request.repository(kind, name)
    commit = repository.find(revision)
    recursive = request.query.get("recursive", "").lower() == "true"
    entries = folder_entries(commit.files, folder or "", recursive)
    start = int(request.query.get("cursor", 0))
    stop = start + request.hub.page_size
    path = f"{urlsplit(request.path).path}?recursive={recursive}&cursor={stop}"
    more = {"Link": f'<{request.hub.api.url}{path}>; rel="next"'} if stop < len(entries) else {}
    return Reply(content=entries[start:stop], headers=more)


@route("POST", REPO + f"/paths-info{REVISION}")
def describe_paths(request: _Handler, kind: str, name: str, revision: str) -> Reply:
    files = request.repository(kind, name).find(revision).files
    paths = parse_qs(request.body.decode())["paths"]
    return Reply(content=[entry for entry in folder_entries(files, "", recursive=True) if entry["path"] in paths])


@route("GET", REPO + f"/commits{REVISION}")
def list_commits(request: _Handler, kind: str, name: str, revision: str) -> Reply:
    commits = request.repository(kind, name).find(revision).history()
    common = {"message": "", "authors": [], "date": DATE}
    return Reply(content=[{"id": commit.oid, "title": commit.title, **common} for commit in commits])


@route("GET", PAGE + f"/resolve{REVISION}/(?P<path>.+)")
def resolve(request: _Handler, kind: str | None, name: str, revision: str, path: str) -> Reply:
    """A file of a public repository is elsewhere: a small one under its commit, a large one in the storage."""
    repository, commit, file = find_file(request, kind, name, revision, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
    linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
    if file.large:
        location = f"{request.hub.storage.url}/{file.sha256}"
        return Reply(302, b"", {"X-Repo-Commit": commit.oid, **linked, "Location": location})
    if repository.private:
        return portion(request, file.content, headers)
    cached = f"/api/resolve-cache/{repository.kind}/{name}/{commit.oid}/{quote(path)}"
    return Reply(307, b"", {"X-Repo-Commit": commit.oid, **linked, "Location": f"{cached}?etag={quote(file.etag)}"})


@route("GET", r"/api/resolve-cache/(?P<kind>\w+)/(?P<name>[^/]+/[^/]+)" + REVISION + "/(?P<path>.+)")
def resolve_cached(request: _Handler, kind: str, name: str, revision: str, path: str) -> Reply:
    _, commit, file = find_file(request, kind, name, revision, path)
    return portion(request, file.content, {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'})


def find_file(
    request: _Handler, kind: str | None, name: str, revision: str, path: str
) -> tuple[Repository, Commit, File]:
    repository = request.repository(kind, name)
    request.check_gate(repository)
    commit = repository.find(revision)
    if path not in commit.files:
        refusal = RefusalError(404, "Entry not found", "EntryNotFound")
        refusal.reply.headers["X-Repo-Commit"] = commit.oid  # by which clients remember that there is none
        raise refusal
    return repository, commit, commit.files[path]


def portion(request: _Handler, content: bytes, headers: dict[str, str]) -> Reply:
    """A content, or the bytes `first-last` of it that the request's Range names."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if wanted is None:
        return Reply(200, content, headers)
    first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    if first > last:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Reply(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})


# --- branches and tags -----------------------------------------------------------------------------------------------


@route("GET", REPO + "/refs")
def list_refs(request: _Handler, kind: str, name: str) -> Reply:
    folders = {"branches": "heads", "tags": "tags"}
    refs = {
        which: [
            {"name": ref, "ref": f"refs/{folders[which]}/{ref}", "targetCommit": commit.oid}
            for ref, commit in named.items()
        ]
        for which, named in request.repository(kind, name).refs.items()
    }
    return Reply(content={**refs, "converts": [], "pullRequests": []})


@route("POST", REPO + "/branch/(?P<branch>[^/]+)")
def create_branch(request: _Handler, kind: str, name: str, branch: str) -> Reply:
    return add_ref(request.repository(kind, name, True), "branches", branch, request.json.get("startingPoint", "main"))


@route("POST", REPO + f"/tag{REVISION}")
def create_tag(request: _Handler, kind: str, name: str, revision: str) -> Reply:
    return add_ref(request.repository(kind, name, True), "tags", request.json["tag"], revision)


def add_ref(repository: Repository, which: str, ref: str, revision: str) -> Reply:
    if ref in repository.refs[which]:
        raise RefusalError(409, f"Reference already exists: {ref}")
    repository.refs[which][ref] = repository.find(revision)
    return Reply(201, {})


@route("DELETE", REPO + "/(?P<which>branch|tag)/(?P<ref>[^/]+)")
def delete_ref(request: _Handler, kind: str, name: str, which: str, ref: str) -> Reply:
    refs = request.repository(kind, name, True).refs[{"branch": "branches", "tag": "tags"}[which]]
    if refs.pop(ref, None) is None:
        raise RefusalError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    return Reply()


# --- uploads ---------------------------------------------------------------------------------------------------------


@route("POST", "/api/validate-yaml")
def validate_card(request: _Handler) -> Reply:
    try:
        front_matter(request.json["content"])
    except yaml.YAMLError as error:
        return Reply(400, {"errors": [{"message": str(error)}], "warnings": []})
    return Reply(content={"errors": [], "warnings": []})


@route("POST", REPO + f"/preupload{REVISION}")
def preupload(request: _Handler, kind: str, name: str, revision: str) -> Reply:
    """Says which files go to the storage, and what is there under their names."""
    there = request.repository(kind, name, write=True).find(revision).files
    files = []
    for path in (file["path"] for file in request.json["files"]):
        mode = "lfs" if any(fnmatch(path, pattern) for pattern in LARGE_FILES) else "regular"
        known = {"oid": there[path].etag} if path in there else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return Reply(content={"files": files})


@route("POST", PAGE + r"\.git/info/lfs/objects/batch")
def start_large_files(request: _Handler, kind: str | None, name: str) -> Reply:
    request.repository(kind, name, write=True)
    objects = [start_large_file(request.hub, **wanted) for wanted in request.json["objects"]]
    return Reply(content={"transfer": "basic", "objects": objects})


def start_large_file(hub: HubServer, oid: str, size: int) -> dict:
    """Where to put an object that the storage has not: at one address, or in parts at one address each."""
    if oid in hub.objects:
        return {"oid": oid, "size": size}
    upload = {"href": f"{hub.storage.url}/{oid}"}
    if size > hub.largest_part:
        parts = range(1, -(-size // hub.largest_part) + 1)
        urls = {f"{part:05d}": f"{hub.storage.url}/{oid}/{part}" for part in parts}
        upload = {"href": f"{hub.api.url}/lfs/{oid}/complete", "header": {"chunk_size": str(hub.largest_part), **urls}}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{hub.api.url}/lfs/verify"}}}


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/complete")
def complete_large_file(request: _Handler, oid: str) -> Reply:
    parts = [request.hub.parts.pop(f"{oid}/{part['partNumber']}") for part in request.json["parts"]]
    return store(request.hub, oid, b"".join(parts))


@route("POST", "/lfs/verify")
def verify_large_file(request: _Handler) -> Reply:
    if len(request.hub.objects.get(request.json["oid"], b"")) != request.json["size"]:
        raise RefusalError(404, f"no object {request.json['oid']} of {request.json['size']} bytes")
    return Reply()


@route("PUT", "/(?P<oid>[0-9a-f]{64})", STORAGE)
def put_object(request: _Handler, oid: str) -> Reply:
    check_signed(request)
    return store(request.hub, oid, request.body)


@route("PUT", "/(?P<part>[0-9a-f]{64}/[0-9]+)", STORAGE)
def put_part(request: _Handler, part: str) -> Reply:
    check_signed(request)
    request.hub.parts[part] = request.body
    return Reply(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@route("GET", "/(?P<oid>[0-9a-f]{64})", STORAGE)
def get_object(request: _Handler, oid: str) -> Reply:
    check_signed(request)
    return portion(request, request.hub.objects[oid], {"ETag": f'"{hashlib.md5(oid.encode()).hexdigest()}"'})


@route("GET", REPO + f"/xet-write-token{REVISION}")
def grant_xet(request: _Handler, kind: str, name: str, revision: str) -> Reply:
    request.repository(kind, name, write=True)
    if request.hub.xet_folder is None:
        raise RefusalError(404, "there is no Xet storage")
    cas = f"local://{request.hub.xet_folder}"
    return Reply(content={"accessToken": "granted", "exp": 2**32, "casUrl": cas})


def check_signed(request: _Handler) -> None:
    """As S3: an address that is signed goes without a token, which must not leave the Hub."""
    if "Authorization" in request.headers:
        raise RefusalError(400, "Only one auth mechanism allowed")


def store(hub: HubServer, oid: str, content: bytes) -> Reply:
    if hashlib.sha256(content).hexdigest() != oid:
        raise RefusalError(400, f"{len(content)} bytes are not those of {oid}")
    hub.objects[oid] = content
    return Reply()


@route("POST", REPO + f"/commit{REVISION}")
def commit(request: _Handler, kind: str, name: str, revision: str) -> Reply:
    """One operation a line, all of them or none."""
    repository = request.repository(kind, name, write=True)
    head = repository.find(revision)
    if revision not in repository.refs["branches"]:
        raise RefusalError(403, f"{revision} is no branch")
    header, *operations = (json.loads(line) for line in request.body.splitlines())
    if header["value"].get("parentCommit", head.oid) != head.oid:
        raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for operation in operations:
        OPERATIONS[operation["key"]](files, request.hub.objects, **operation["value"])
    made = repository.add(revision, files, header["value"]["summary"])
    url = f"{request.hub.api.url}/{repository.path}/commit/{made.oid}"
    return Reply(content={"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


def add_file(files: dict[str, File], objects: dict[str, bytes], path: str, content: str, encoding: str) -> None:
    files[path] = File(base64.b64decode(content))


def add_large_file(files: dict[str, File], objects: dict[str, bytes], path: str, oid: str, **_) -> None:
    if oid not in objects:
        raise RefusalError(422, f"{path} points to {oid}, which was not uploaded")
    files[path] = File(objects[oid], large=True)


def delete_file(files: dict[str, File], objects: dict[str, bytes], path: str) -> None:
    if path not in files:
        raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    del files[path]


def delete_folder(files: dict[str, File], objects: dict[str, bytes], path: str) -> None:
    for inside in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
        del files[inside]


OPERATIONS = {
    "file": add_file,
    "lfsFile": add_large_file,
    "deletedFile": delete_file,
    "deletedFolder": delete_folder,
}
