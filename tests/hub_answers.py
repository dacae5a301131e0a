"""What the Hub of the tests answers (see hub.py): ``Handler`` to the client's calls and for small
files, ``Storage`` for the contents of large ones."""

import base64
import json
import os
import socket
import struct
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_store import LARGE, OWNERS, Repository, git_sha1, sha256

if TYPE_CHECKING:
    from hub import Hub


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # headers and body are sent apart: the second would wait 40 ms until the first has arrived
    disable_nagle_algorithm = True
    hub: "Hub"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.path_ = unquote(urlsplit(self.path).path).strip("/")
        self.query = parse_qs(urlsplit(self.path).query)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        with self.hub.lock:
            self.hub.seen.append((self.command, self.path_, self.headers.get("Range")))
        if not self.hub.instead(self):
            self.answer()

    # the two kinds of server

    def answer(self) -> None:
        if self.path_.startswith("api/"):
            self.api(self.path_.removeprefix("api/"))
        elif self.path_.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch()
        elif self.path_.startswith("lfs/complete/"):
            self.complete(self.path_.rpartition("/")[2])
        elif self.path_.startswith("lfs/verify/"):
            stored = json.loads(self.body)["oid"] in self.hub.stored
            self.send(200 if stored else 404, b"{}")
        else:
            self.resolve()

    def api(self, path: str) -> None:
        if path == "whoami-v2":
            self.whoami()
        elif path == "validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif path == "repos/create":
            self.create()
        else:
            name, verb, rest = self.split(path.removeprefix("models/"))
            handlers = {"": self.info, "revision": self.info, "tree": self.tree}
            handlers |= {"preupload": self.preupload, "commit": self.commit, "refs": self.refs}
            handlers |= {"branch": self.create_branch, "paths-info": self.paths_info}
            handlers[verb](name, rest)

    @staticmethod
    def split(path: str) -> tuple[str, str, str]:
        """owner/name/verb/rest"""
        parts = [*path.split("/", 3), "", ""]
        return "/".join(parts[:2]), parts[2], parts[3]

    # who

    def role(self) -> str | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.tokens.get(given)

    def whoami(self) -> None:
        if self.role() is None:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        user = {"type": "user", "name": OWNERS[0], "orgs": [{"name": OWNERS[1]}]}
        access = {"type": "access_token", "accessToken": {"role": self.role()}}
        return self.send_json({**user, "auth": access})

    def may_write(self, name: str) -> bool:
        if self.role() is None:
            self.refuse(401, "", "Invalid username or password.")
        elif self.role() != "write" or name.split("/")[0] not in OWNERS:
            self.refuse(403, "", "You don't have the rights to write to this repository")
        else:
            return True
        return False

    def find(self, name: str, revision: str = "main", place: str = "api") -> str | None:
        """The commit, or an answer that says why not."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.role() is None):
            self.refuse(404 if self.role() else 401, "RepoNotFound", "Repository not found")
        elif repository.gated == place:
            self.refuse(403, "GatedRepo", "Access to this repository is restricted")
        elif (oid := repository.find(revision)) is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return oid
        return None

    # reading

    def info(self, name: str, revision: str) -> None:
        oid = self.find(name, revision or "main")
        if oid is None:
            return
        repository = self.hub.repositories[name]
        siblings = [{"rfilename": file} for file in repository.commits[oid][1]]
        found = {"_id": "0", "id": name, "modelId": name, "sha": oid, "tags": []}
        self.send_json({**found, "private": repository.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        if self.find(name, revision):
            self.send_json(self.listing(name, revision))

    def listing(self, name: str, revision: str) -> list[dict[str, Any]]:
        entries = []
        for path, raw in self.hub.repositories[name].files(revision).items():
            entry = {"type": "file", "path": path, "size": len(raw), "oid": git_sha1(raw)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(raw), "size": len(raw), "pointerSize": 134}
            entries.append(entry)
        return entries

    def paths_info(self, name: str, revision: str) -> None:
        """Some files, with the commit that changed each last."""
        if not self.find(name, revision):
            return
        asked = parse_qs(self.body.decode())["paths"]
        found = [entry for entry in self.listing(name, revision) if entry["path"] in asked]
        for entry in found:
            last = self.hub.repositories[name].last_change(revision, entry["path"])
            entry["lastCommit"] = {"id": last, "title": "", "date": "2026-01-01T00:00:00.000Z"}
        self.send_json(found)

    def refs(self, name: str, _: str) -> None:
        if self.find(name) is None:
            return
        branches = self.hub.repositories[name].branches.items()
        told = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in branches]
        self.send_json({"branches": told, "tags": [], "converts": []})

    def resolve(self) -> None:
        """A file. ``/resolve/`` of the first server leads to the second one for large files."""
        name, _, rest = self.split(self.path_)
        repository = self.hub.repositories.get(name, Repository())
        known = sorted([*repository.commits, *repository.branches], key=len, reverse=True)
        revision = next((r for r in known if rest.startswith(f"{r}/")), "unknown")
        oid = self.find(name, revision, "files")
        if oid is None:
            return
        path = rest.removeprefix(f"{revision}/")
        raw = repository.commits[oid][1].get(path)
        if raw is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        large = path.endswith(LARGE)
        etag = sha256(raw) if large else git_sha1(raw)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if large and self.headers["Host"] in self.hub.endpoint:
            headers |= {"X-Linked-Size": str(len(raw)), "X-Linked-ETag": f'"{etag}"'}
            return self.send(302, b"", headers | {"Location": self.hub.storage + self.path})
        return self.send_file(raw, headers)

    def send_file(self, raw: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.send(200, raw, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(raw), int(last) + 1 if last else len(raw))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(raw)}"
        return self.send(206, raw[start:stop], headers)

    # writing

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or OWNERS[0]}/{asked['name']}"
        if not self.may_write(name):
            return
        if name in self.hub.repositories:
            return self.refuse(409, "", "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = made = Repository(private)
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self.send_json({"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})

    def create_branch(self, name: str, branch: str) -> None:
        if not self.may_write(name) or self.find(name) is None:
            return
        repository = self.hub.repositories[name]
        if branch in repository.branches:
            return self.refuse(409, "", "Reference already exists")
        start = repository.find(json.loads(self.body or b"{}").get("startingPoint") or "main")
        assert start is not None
        repository.branches[branch] = start
        return self.send_json({})

    def preupload(self, name: str, revision: str) -> None:
        if not self.may_write(name) or (oid := self.find(name, revision)) is None:
            return
        here = self.hub.repositories[name].commits[oid][1]
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = path.endswith(LARGE)
            told = {"path": path, "uploadMode": "lfs" if large else "regular"}
            if path in here:
                told["oid"] = sha256(here[path]) if large else git_sha1(here[path])
            files.append({**told, "shouldIgnore": False})
        self.send_json({"files": files})

    def lfs_batch(self) -> None:
        if not self.may_write(self.path_.removesuffix(".git/info/lfs/objects/batch")):
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            verify = {"href": f"{self.hub.endpoint}/lfs/verify/{oid}"}
            upload = {"href": f"{self.hub.storage}/lfs/{oid}"}
            if size > self.hub.part_size:
                count = -(-size // self.hub.part_size)
                header = {str(n): f"{upload['href']}/{n}" for n in range(1, count + 1)}
                upload = {"href": f"{self.hub.endpoint}/lfs/complete/{oid}"}
                upload["header"] = {"chunk_size": str(self.hub.part_size), **header}
            actions = {} if oid in self.hub.stored else {"upload": upload, "verify": verify}
            objects.append({**asked, **({"actions": actions} if actions else {})})
        self.send_json({"transfer": "basic", "objects": objects})

    def complete(self, oid: str) -> None:
        parts = self.hub.parts[oid]
        raw = b"".join(parts[part["partNumber"]] for part in json.loads(self.body)["parts"])
        self.keep(oid, raw)

    def keep(self, oid: str, raw: bytes) -> None:
        if sha256(raw) != oid:
            return self.refuse(400, "", "the content does not have this sha256")
        self.hub.stored[oid] = raw
        return self.send_json({})

    def commit(self, name: str, branch: str) -> None:
        if not self.may_write(name) or self.find(name, branch) is None:
            return
        repository = self.hub.repositories[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = header.get("parentCommit")
        if parent not in (None, repository.branches[branch]):
            return self.refuse(412, "", "A commit has happened since. Please refresh and try again")
        files = dict(repository.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(branch, files, header["summary"])
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        return self.send_json({"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    # answers

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        named = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self.send(status, body, {**named, "X-Error-Message": message, **headers})

    def send_json(self, content: object) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_half(self, raw: bytes, length: int, reset: bool = False) -> None:
        """Promise ``length`` bytes, send ``raw``, and hang up, politely or not."""
        wanted = self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"{wanted.replace('=', ' ')}/*")
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()
        self.close_connection = True
        if reset:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the connection at once, and not politely."""
        option = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        os.close(self.connection.detach())
        self.close_connection = True


class Storage(Handler):
    """The second server. It must not see the token; its addresses are secrets themselves."""

    def role(self) -> str | None:
        return "read"

    def answer(self) -> None:
        if self.headers.get("Authorization"):
            return self.refuse(400, "", "the token went to another host")
        if self.command != "PUT":
            return self.resolve()
        oid, _, part = self.path_.removeprefix("lfs/").partition("/")
        if not part:
            return self.keep(oid, self.body)
        with self.hub.lock:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        return self.send(200, b"", {"ETag": quote(sha256(self.body))})
