"""Which files of a repository are needed: what runs or quantizes the model in one format, and none
of the copies that repositories hold beside it."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from quantkit.core import pickled
from quantkit.errors import QuantkitError

SUFFIX = ".index.json"  # of an index of shards
# configuration, tokenizer, and what the model card says of licence and languages
_BESIDE = (
    "*.json",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
_OF_GGUF = ("LICENSE*", "NOTICE*", "README.md")  # such a file holds all the rest
# What weights may be called, the kind to be preferred first: suffixes, and the usual basename.
KINDS = (((".safetensors",), "model"), (pickled.SUFFIXES, "pytorch_model"))
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")


def weight_sets(names: Iterable[str], suffixes: Iterable[str]) -> dict[str, list[str]]:
    """Names of weight files by the set's name: files that differ in ``-00001-of-00002`` alone are
    one set, whose name is what comes before. An index makes a set on its own: its shards may be
    missing, which will have to be told."""
    names = sorted(names)
    sets: dict[str, list[str]] = {}
    for suffix in suffixes:
        for name in names:
            if name.endswith(suffix):
                stem = name.removesuffix(suffix)
                shard = SHARD.fullmatch(stem)
                sets.setdefault(shard[1] if shard else stem, []).append(name)
            elif name.endswith(suffix + SUFFIX):
                sets.setdefault(name.removesuffix(suffix + SUFFIX), [])
    return sets


def needed(repository: str, names: Iterable[str], basename: str | None) -> list[str]:
    """Of the files ``names`` those that are needed; the last one is the GGUF file if it is one.
    ``basename``: the weights' name, without its ending. Raises QuantkitError when there are no
    weights, or no single choice."""
    top = [name for name in names if "/" not in name]
    gguf = [name for name in top if name.endswith(".gguf")]
    named = [name for name in gguf if name.removesuffix(".gguf") == basename]
    if named:
        return [*_like(top, _OF_GGUF), *named]
    for suffixes, usual in KINDS:
        sets = weight_sets(top, suffixes)
        name = basename or (usual if len(sets) != 1 else next(iter(sets)))
        if name in sets:
            everything = [file for files in sets.values() for file in files]
            indices = [f"{name}{suffix}{SUFFIX}" for suffix in suffixes]
            beside = [n for n in _like(top, _BESIDE) if not n.endswith(SUFFIX) or n in indices]
            # an index may name shards that are called anything
            return [*beside, *(sets[name] or everything)]
        if sets and not basename:
            raise _several(repository, [file for files in sets.values() for file in files])
    if not _weights(top):
        raise QuantkitError(
            f"{repository} has no weights (.safetensors, .bin or .gguf)", "is this a model?"
        )
    if basename:
        raise QuantkitError(
            f"{repository} has no weights with the model_basename {basename!r}, only "
            f"{_some(_weights(top))}",
            "give one of these without its ending",
        )
    if len(gguf) > 1:
        raise _several(repository, gguf)
    return [*_like(top, _OF_GGUF), *gguf]


def beside_file(names: Iterable[str], file: str) -> list[str]:
    """What is needed with the one weight file that was named."""
    folder = PurePosixPath(file).parent
    near = [name for name in names if PurePosixPath(name).parent == folder]
    wanted = _OF_GGUF if file.endswith(".gguf") else _BESIDE
    return [*(name for name in near if _like([PurePosixPath(name).name], wanted)), file]


def _like(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = tuple(patterns)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _weights(names: Iterable[str]) -> list[str]:
    return [n for n in names if n.endswith((".gguf", *(s for kind, _ in KINDS for s in kind)))]


def _several(repository: str, files: list[str]) -> QuantkitError:
    return QuantkitError(
        f"{repository} holds several sets of weights: {_some(files)}",
        f"say which with --model-basename, or as {repository}/{sorted(files)[0]}",
    )


def _some(files: list[str]) -> str:
    shown = ", ".join(sorted(files)[:8])
    return f"{shown} and {len(files) - 8} more" if len(files) > 8 else shown
