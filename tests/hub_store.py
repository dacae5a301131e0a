"""Repositories as the Hub of the tests keeps them: branches, commits, and files by their hashes."""

import hashlib
import json
from dataclasses import dataclass, field

LARGE = (".safetensors", ".gguf", ".bin", ".pt", ".model")  # stored by their sha256, as by the Hub
WRITER, READER = "hf_" + "w" * 34, "hf_" + "r" * 34
OWNERS = ("me", "my-lab", "your-name")  # where the writer may write
Files = dict[str, bytes]


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def git_sha1(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


@dataclass
class Repository:
    """commits: oid -> (parent's oid, files, message)"""

    private: bool = False
    gated: str | None = None  # "api" or "files": where access is refused
    commits: dict[str, tuple[str | None, Files, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files, message: str = "") -> str:
        """A new commit, which ``branch`` then points to -> its oid."""
        parent = self.branches.get(branch)
        told = json.dumps([branch, parent, len(self.commits), sorted(files)])
        oid = hashlib.sha1(told.encode()).hexdigest()
        self.commits[oid] = (parent, dict(files), message)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None

    def files(self, revision: str = "main") -> Files:
        oid = self.find(revision)
        assert oid is not None
        return self.commits[oid][1]

    def log(self, branch: str = "main") -> list[str]:
        """The messages of a branch's commits, newest first."""
        found, at = [], self.branches.get(branch)
        while at is not None:
            parent, _, message = self.commits[at]
            found.append(message)
            at = parent
        return found

    def last_change(self, revision: str, path: str) -> str | None:
        """The commit that gave a file its content, None for one that is not there."""
        at = self.find(revision)
        raw, found = self.files(revision).get(path), None
        while at is not None and raw is not None and self.commits[at][1].get(path) == raw:
            found, at = at, self.commits[at][0]
        return found
