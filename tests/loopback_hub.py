"""A Hub on 127.0.0.1 for tests: the real huggingface_hub client talks to it, and it misbehaves where told to.

    with serve() as hub:
        token = hub.token("alice")
        hub.create("alice/net", {"config.json": b"{}"})
        hub.fail("GET", "/resolve/", status(429, retry_after=1))
        subprocess.run(command, env=client_env(hub, tmp_path, token))
        assert [request.status for request in hub.requests] == [200, 429, 200]

It answers what models need over plain HTTP and git LFS; an endpoint it does not know fails the test that asked for it.
Left out: Xet, other kinds of repositories, tags, folders and pages in listings, uploads in parts, the CDN's own host.
"""

import json
import os
import re
import socket
import sys
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from functools import cached_property
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from subprocess import Popen
from threading import Event, Lock, Thread
from time import monotonic
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".bin", ".onnx", ".pkl", ".pt", ".pth", ".safetensors")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
READS_BY_POST = re.compile(r"/api/validate-yaml|/api/models/.+/(paths-info|preupload)/.+")


def _git_hash(content: bytes) -> str:
    return sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class File:
    """Bytes at a path of a commit, in git itself or in its large file storage."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def blob(self) -> str:
        return _git_hash(self.pointer if self.lfs else self.data)

    def sizes(self, digest: str) -> dict:
        """As the API shows them, which calls the digest `oid` in one place and `sha256` in another."""
        lfs = {digest: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {"size": len(self.data), **({"lfs": lfs} if self.lfs else {})}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: Mapping[str, File]

    def entry(self, path: str) -> dict:
        return {"type": "file", "path": path, "oid": self.files[path].blob, **self.files[path].sizes("oid")}


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        self.commit({".gitattributes": GITATTRIBUTES}, "initial commit")

    def at(self, revision: str = "main") -> Commit:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.at(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.at(commits[-1].parent))
        return commits

    def commit(self, changes: Mapping[str, bytes | None], title="Update", ref="main", parent: str | None = None) -> str:
        """Put changed files (None deletes) on top of a parent, by default the head of the ref; return the commit."""
        parent = parent or self.refs.get(ref)
        data = {**(self.files(parent) if parent else {}), **changes}
        data = {path: content for path, content in sorted(data.items()) if content is not None}
        files = {
            path: File(content, lfs=bool(content) and path.endswith(LFS_SUFFIXES)) for path, content in data.items()
        }
        self.objects |= {file.sha256: file.data for file in files.values() if file.lfs}
        oid = _git_hash(json.dumps([parent, title, {path: file.blob for path, file in files.items()}]).encode())
        self.commits[oid] = Commit(oid, parent, title, files)
        self.refs[ref] = oid
        return oid


@dataclass(frozen=True)
class User:
    """Whom a token stands for; `role` is the token's, `roles` the user's own in each namespace."""

    name: str
    role: str
    roles: Mapping[str, str]

    def sees(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in self.roles

    def writes(self, repo_id: str) -> bool:
        return self.role == "write" and self.roles.get(repo_id.partition("/")[0]) in {"admin", "write"}


@dataclass
class Request:
    """One line of the log; `status` stays None for a request that got no answer."""

    method: str
    path: str
    query: dict[str, list[str]] = field(repr=False)
    headers: Message = field(repr=False)
    body: bytes = field(default=b"", repr=False)
    status: int | None = None

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    @property
    def writes(self) -> bool:
        return self.method not in {"GET", "HEAD"} and not READS_BY_POST.fullmatch(self.path)


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: int | None = None  # bytes of the body before the connection is closed


def _json(value: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class Refused(Exception):  # noqa: N818  (an answer rather than an error)
    def __init__(self, status: int, message: str, code: str = "", **more: str):
        coded = {"X-Error-Code": code} if code else {}
        self.answer = _json({"error": message, **more}, status, **{"X-Error-Message": message, **coded})


class Exchange(BaseHTTPRequestHandler):
    """One request of a client and what comes back."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Hub"

    def exchange(self) -> None:
        url = urlsplit(self.path)
        self.asked = Request(self.command, url.path, parse_qs(url.query), self.headers)
        action = self.server.log(self.asked) or Exchange.process
        answer = action(self)
        self.close_connection = answer is None or answer.sent is not None
        if answer is not None:
            self.reply(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = exchange  # noqa: N815

    def receive(self, share: float = 1) -> None:
        """Read a share of what the client sends."""
        size = int(int(self.headers.get("Content-Length", 0)) * share)
        self.asked.body = self.rfile.read(size)
        if len(self.asked.body) < size:
            raise ConnectionError("The client is gone.")

    def process(self) -> Answer:
        self.receive()
        return self.server.answer(self.asked)

    def reply(self, answer: Answer) -> None:
        self.asked.status = answer.status
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.sent])

    def log_message(self, *args: object) -> None:
        pass


# Faults: what happens to a request instead of `Exchange.process`; None closes the connection without an answer.

Action = Callable[[Exchange], Answer | None]


def status(code: int, **headers: object) -> Action:
    """Process nothing and answer with a status alone; `retry_after=1` becomes the header Retry-After."""
    answer = Answer(code, headers={name.replace("_", "-"): str(value) for name, value in headers.items()})
    return lambda exchange: exchange.receive() or answer


def cut_upload(share: float = 0.5) -> Action:
    """Read a share of what the client sends and close the connection."""
    return lambda exchange: exchange.receive(share)


def lose() -> Action:
    """Process the request, but lose the answer."""
    return lambda exchange: exchange.process() and None


def cut(share: float = 0.5) -> Action:
    """Promise the whole body, send a share of it, close the connection."""
    return lambda exchange: replace(answer := exchange.process(), sent=int(len(answer.body) * share))


def truncate(share: float = 0.5) -> Action:
    """Send a share of the body as if it were all."""
    return lambda exchange: replace(answer := exchange.process(), body=answer.body[: int(len(answer.body) * share)])


def flip(share: float = 0.5) -> Action:
    """Send the body with one bit flipped, at this share of its length."""

    def act(exchange: Exchange) -> Answer:
        answer = exchange.process()
        body = bytearray(answer.body)
        body[int(len(body) * share)] ^= 1
        return replace(answer, body=bytes(body))

    return act


def delay(seconds: float) -> Action:
    """Process the request late."""
    return lambda exchange: None if exchange.server.stopping.wait(seconds) else exchange.process()


class Hold:
    """Keep the answer back until `release`, or for ever, before or after the request is processed."""

    def __init__(self, *, processed: bool = False):
        self.processed = processed
        self.reached = Event()
        self.released = Event()
        self.release = self.released.set

    def __call__(self, exchange: Exchange) -> Answer | None:
        answer = exchange.process() if self.processed else None
        self.reached.set()
        while not self.released.wait(0.05):
            if exchange.server.stopping.is_set():
                return None
        return answer or exchange.process()

    def reached_by(self, client: Popen, timeout: float = 60) -> bool:
        """Wait until the client is held here (True) or has ended without coming so far (False)."""
        deadline = monotonic() + timeout
        while not self.reached.wait(0.02) and client.poll() is None:
            if monotonic() > deadline:
                raise TimeoutError(f"Neither held nor ended after {timeout} s: {client.args}")
        return self.reached.is_set()


@dataclass
class Fault:
    method: str
    path: str
    action: Action
    times: int | None
    after: int
    fired: int = 0

    def meets(self, request: Request) -> bool:
        if not (re.fullmatch(self.method, request.method) and re.search(self.path, request.path)):
            return False
        self.after -= 1
        due = self.after < 0 and (self.times is None or self.fired < self.times)
        self.fired += due
        return due


ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = []


def route(method: str, pattern: str) -> Callable:
    """Let a method of the Hub answer here; `{repo}` reaches it as a Repo that the token may see."""
    pattern = pattern.format(repo="(?P<repo>[^/]+/[^/]+)", rev="(?P<rev>[^/]+)", path="(?P<path>.+)", oid="(?P<oid>.+)")

    def add(endpoint: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return add


class Hub(ThreadingTCPServer):
    """The storage, the log, the faults and the endpoints."""

    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Exchange)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.users: dict[str | None, User] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []
        self.connections: list[socket.socket] = []
        self.stopping = Event()
        self.lock = Lock()

    def token(self, name: str, role: str = "write", orgs: Mapping[str, str] | None = None) -> str:
        """A token of this user, to write or to read; `orgs` maps organisations to the role admin, write or read."""
        token = f"hf_{role}{len(self.users)}{sha256(name.encode()).hexdigest()[:24]}"
        self.users[token] = User(name, role, {name: "admin", **(orgs or {})})
        return token

    def create(self, repo_id: str, files: Mapping[str, bytes] | None = None, *, private=False, gated=False) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        if files:
            repo.commit(files)
        return repo

    def fail(self, method: str, path: str, action: Action, *, times: int | None = 1, after: int = 0) -> Fault:
        """Meet matching requests (two regular expressions), `times` of them or all (None), after letting some pass.

        `hub.faults.clear()` heals everything."""
        self.faults.append(fault := Fault(method, path, action, times, after))
        return fault

    def hold(self, k: int, *, processed: bool = False) -> Hold:
        """Hold the k-th request from now on, counted from one, so that its client can be killed there."""
        hold = Hold(processed=processed)
        self.fail(".*", "", hold, after=k - 1)
        return hold

    @property
    def writes(self) -> list[Request]:
        """The requests that ask for a change."""
        return [request for request in self.requests if request.writes]

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # a client may go at any time
            self.errors.append(error)

    def log(self, request: Request) -> Action | None:
        with self.lock:
            self.requests.append(request)
            return next((fault.action for fault in self.faults if fault.meets(request)), None)

    def answer(self, request: Request) -> Answer:
        method = request.method.replace("HEAD", "GET")
        for routed, pattern, endpoint in ROUTES:
            if routed == method and (match := pattern.fullmatch(request.path)):
                found = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                with self.lock:
                    try:
                        if "repo" in found:
                            found["repo"] = self._visible(request, found["repo"])
                        return endpoint(self, request, **found)
                    except Refused as refused:
                        return refused.answer
        self.errors.append(NotImplementedError(f"This Hub has no {request.method} {request.path}"))
        return _json({"error": "Not implemented"}, 501)

    def _user(self, request: Request) -> User | None:
        if request.token and request.token not in self.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.users.get(request.token)

    def _logged_in(self, request: Request) -> User:
        if user := self._user(request):
            return user
        # The client takes such a 401 for a missing repository: over https by the address, over http by the code alone.
        about_repo = re.match(r"/api/models/|/.+/resolve/", request.path)
        raise Refused(401, "Invalid username or password.", "RepoNotFound" if about_repo else "")

    def _visible(self, request: Request, repo_id: str) -> Repo:
        repo, user = self.repos.get(repo_id), self._user(request)
        if repo and (not repo.private or (user and user.sees(repo_id))):
            return repo
        self._logged_in(request)
        raise Refused(404, "Repository not found", "RepoNotFound")

    def _pass_gate(self, request: Request, repo: Repo) -> None:
        user = self._user(request)
        if not repo.gated or (user and user.sees(repo.id)):
            return
        advice = ". You must have access to it and be authenticated to access it. Please log in."
        if user:
            advice = f" and you are not in the authorized list. Visit {self.url}/{repo.id} to ask for access."
        raise Refused(403 if user else 401, f"Access to model {repo.id} is restricted{advice}", "GatedRepo")

    def _pass_writer(self, request: Request, repo: Repo) -> None:
        user = self._logged_in(request)
        if user.role != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if not user.writes(repo.id) and "create_pr" not in request.query:
            raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request.")

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        user = self._logged_in(request)
        orgs = [
            {"type": "org", "name": name, "roleInOrg": user.roles[name]} for name in user.roles if name != user.name
        ]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        return _json({"type": "user", "id": user.name, "name": user.name, "orgs": orgs, "auth": auth})

    @route("GET", "/api/agent-harnesses")  # asked once a day for the user agent, where telemetry is on
    def agent_harnesses(self, request: Request) -> Answer:
        return _json({"standardEnvVars": [], "harnesses": {}})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        user, wanted = self._logged_in(request), json.loads(request.body)
        namespace = wanted["organization"] or user.name
        repo_id = f"{namespace}/{wanted['name']}"
        if not user.writes(repo_id):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if repo_id in self.repos:
            raise Refused(409, f"You already created this model repo: {repo_id}", url=f"{self.url}/{repo_id}")
        self.create(repo_id, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        return _json({"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Answer:
        found = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(request.body)["content"], re.DOTALL)
        if not found:
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            yaml.safe_load(found[1])
        except yaml.YAMLError as error:
            return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, request: Request, repo: Repo, rev: str) -> Answer:
        self._pass_writer(request, repo)
        present = {path: file.sha256 if file.lfs else file.blob for path, file in repo.at(rev).files.items()}
        files = json.loads(request.body)["files"]
        for file in files:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            file |= {"uploadMode": mode, "shouldIgnore": False, "oid": present.get(file["path"])}
        return _json({"files": files})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo: Repo) -> Answer:
        self._pass_writer(request, repo)
        objects = json.loads(request.body)["objects"]
        for item in objects:
            if item["oid"] not in repo.objects:
                verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/objects/verify"}
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{repo.id}/{item['oid']}"}, "verify": verify}
        return _json({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<repo_id>.+)/{oid}")  # no token, as with a signed link
    def lfs_upload(self, request: Request, repo_id: str, oid: str) -> Answer:
        if sha256(request.body).hexdigest() != oid:
            raise Refused(400, "The bytes are not those of the object id.")
        self.repos[repo_id].objects[oid] = request.body
        return Answer()

    @route("POST", r"/{repo}\.git/info/lfs/objects/verify")
    def lfs_verify(self, request: Request, repo: Repo) -> Answer:
        self._pass_writer(request, repo)
        wanted = json.loads(request.body)
        if len(repo.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "The object is not on the server.")
        return Answer()

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def commit(self, request: Request, repo: Repo, rev: str) -> Answer:
        self._pass_writer(request, repo)
        (_, header), *operations = [json.loads(line).values() for line in request.body.splitlines()]
        pull = "create_pr" in request.query and 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        parent = repo.at(header.get("parentCommit", rev))
        if not pull and rev not in repo.refs:
            raise Refused(400, f"{rev} is not a branch.")
        if not pull and parent != repo.at(rev):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, bytes | None] = {}
        for kind, value in operations:
            changes |= self._change(repo, parent, kind, value)
        oid = repo.commit(changes, header["summary"], f"refs/pr/{pull}" if pull else rev, parent.oid)
        urls = {"commitUrl": f"{self.url}/{repo.id}/commit/{oid}"}
        if pull:
            urls["pullRequestUrl"] = f"{self.url}/{repo.id}/discussions/{pull}"
        return _json({"success": True, "commitOid": oid, "hookOutput": "", **urls})

    @staticmethod
    def _change(repo: Repo, parent: Commit, kind: str, value: dict) -> dict[str, bytes | None]:
        path = value["path"]
        if kind == "file":
            return {path: b64decode(value["content"])}
        if kind == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refused(400, "An LFS pointer pointed to a file that does not exist.")
            return {path: repo.objects[value["oid"]]}
        gone = [name for name in parent.files if name == path or (kind == "deletedFolder" and name.startswith(path))]
        if not gone:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        return dict.fromkeys(gone)

    @route("GET", "/api/models/{repo}(?:/revision/{rev})?")
    def model_info(self, request: Request, repo: Repo, rev: str = "main") -> Answer:
        commit = repo.at(rev)
        siblings = [{"rfilename": path} for path in commit.files]
        if "blobs" in request.query:
            siblings = [{"rfilename": path, "blobId": f.blob, **f.sizes("sha256")} for path, f in commit.files.items()]
        access = {"private": repo.private, "gated": "auto" if repo.gated else False}
        return _json({"id": repo.id, "modelId": repo.id, "sha": commit.oid, **access, "siblings": siblings})

    @route("GET", "/api/models/{repo}/auth-check(?P<write>/write)?")
    def auth_check(self, request: Request, repo: Repo, write: str = "") -> Answer:
        (self._pass_writer if write else self._pass_gate)(request, repo)
        return Answer()

    @route("GET", "/api/models/{repo}/tree/{rev}")
    def tree(self, request: Request, repo: Repo, rev: str) -> Answer:
        commit, recursive = repo.at(rev), request.query.get("recursive") == ["true"]
        return _json([commit.entry(path) for path in commit.files if recursive or "/" not in path])

    @route("POST", "/api/models/{repo}/paths-info/{rev}")
    def paths_info(self, request: Request, repo: Repo, rev: str) -> Answer:
        commit, paths = repo.at(rev), parse_qs(request.body.decode())["paths"]
        return _json([commit.entry(path) for path in paths if path in commit.files])

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, request: Request, repo: Repo) -> Answer:
        listed: dict[str, list] = {"branches": [], "pullRequests": [], "tags": [], "converts": []}
        for name, oid in repo.refs.items():
            pull = name.startswith("refs/pr/")
            entry = {"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": oid}
            listed["pullRequests" if pull else "branches"].append(entry)
        return _json(listed)

    @route("GET", "/api/models/{repo}/discussions")
    def discussions(self, request: Request, repo: Repo) -> Answer:
        """The pull requests, all of them open; a page each, so that the client has to turn pages."""
        pulls = [(ref, oid) for ref, oid in repo.refs.items() if ref.startswith("refs/pr/")]
        start = int(request.query["p"][0])
        listed = [
            {
                "title": repo.commits[oid].title,
                "num": int(ref.removeprefix("refs/pr/")),
                "author": {"name": repo.id.partition("/")[0]},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo.id, "type": "model"},
                "isPullRequest": True,
            }
            for ref, oid in pulls[start : start + 1]
        ]
        return _json({"discussions": listed, "count": len(pulls), "start": start})

    @route("POST", "/api/models/{repo}/branch/{rev}")
    def create_branch(self, request: Request, repo: Repo, rev: str) -> Answer:
        self._pass_writer(request, repo)
        if rev in repo.refs:
            raise Refused(409, f"Reference already exists: {rev}")
        repo.refs[rev] = repo.at(json.loads(request.body).get("startingPoint", "main")).oid
        return Answer()

    @route("GET", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, request: Request, repo: Repo, rev: str, path: str) -> Answer:
        self._pass_gate(request, repo)
        commit = repo.at(rev)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            missing = Refused(404, "Entry not found", "EntryNotFound").answer
            return replace(missing, headers={**missing.headers, **headers})
        file = commit.files[path]
        size = len(file.data)
        headers["ETag"] = f'"{file.blob}"'
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not asked:
            return Answer(200, file.data, headers)
        start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if start >= stop:
            return Answer(416, headers={"Content-Range": f"bytes */{size}"})
        return Answer(206, file.data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub until the end of the context, which raises what went wrong in the Hub itself."""
    with Hub() as hub:  # leaving it waits for every thread
        loop = Thread(target=hub.serve_forever, args=(0.01,))
        loop.start()
        try:
            yield hub
        finally:
            hub.stopping.set()
            hub.shutdown()
            loop.join()
            for connection in hub.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
    if hub.errors:
        raise hub.errors[0]


def client_env(hub: Hub, home: str | Path, token: str | None = None, **extra: str) -> dict[str, str]:
    """The environment of a fresh process whose Hub client knows this Hub alone; `home` holds its cache.

    A fresh process, because the client reads its environment when it is imported."""
    foreign = re.compile(r"(HF|HUGGING\w*FACE|TRANSFORMERS)_.*|.*_PROXY", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "*"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return env | ({"HF_TOKEN": token} if token else {}) | extra
