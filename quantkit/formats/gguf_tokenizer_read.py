"""Tokenizers out of GGUF files, as tokenizer.json would have them (gguf_tokenizer.py is the way
there, and says what is converted)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    PREFIX,
    SPACE,
    SPECIAL,
    TEMPLATE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ways,
)
from quantkit.formats.gguf_words import PLAIN, READ, pre_tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer out of a GGUF file: what tokenizer.json would be, the special tokens' texts by
    their role (bos, eos, ...), and the chat template."""

    json: dict[str, Any]
    special: dict[str, str]
    template: str | None


def read(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the plain metadata of a file. Raises QuantkitError when there is none, or
    one of another kind."""
    kind = _get(metadata, "model", str)
    if kind not in ("gpt2", "llama"):
        raise QuantkitError(f"GGUF tokenizers of the kind {kind!r:.40} are not read")
    tokens = _texts(metadata, "tokens")
    types = metadata.get(f"{PREFIX}token_type") or [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise QuantkitError(f"the GGUF file does not have a {PREFIX}token_type for each token")
    special = {
        role: tokens[number]
        for role, key in SPECIAL.items()
        if isinstance(number := metadata.get(PREFIX + key), int)
        and 0 <= number < len(tokens)
        and types[number] != UNUSED
    }
    build = _read_words if kind == "gpt2" else _read_pieces
    body = build(metadata, tokens, types, special)
    body["added_tokens"] = [
        _added(number, tokens[number], type in (CONTROL, UNKNOWN))
        for number, type in enumerate(types)
        if type in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    # llama.cpp's defaults where the file says nothing: SentencePiece and Llama 3 have a first token
    first = kind == "llama" or READ.get(metadata.get(f"{PREFIX}pre", "")) == READ["llama-bpe"]
    adds = {"bos": first, "eos": False}
    for role in adds:
        adds[role] = bool(metadata.get(f"{PREFIX}add_{role}_token", adds[role]))
    body["post_processor"] = _template_of(tokens, special, adds)
    template = metadata.get(TEMPLATE)
    return Tokenizer(body, special, template if isinstance(template, str) else None)


def _get(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    value = metadata.get(PREFIX + key)
    if not isinstance(value, kind):
        raise QuantkitError(f"the GGUF file has no usable {PREFIX}{key}")
    return value


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    found = _get(metadata, key, list)
    if not found or not isinstance(found[0], str):
        raise QuantkitError(f"the {PREFIX}{key} of the GGUF file is no list of texts")
    if key == "tokens" and len(set(found)) < len(found):
        raise QuantkitError("two tokens of the GGUF file have the same text")
    return list(found)


def _added(number: int, text: str, special: bool) -> dict[str, Any]:
    sides = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **sides, "special": special}


def _read_words(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], special: Mapping[str, str]
) -> dict[str, Any]:
    name = _get(metadata, "pre", str)
    if name not in READ:
        raise QuantkitError(
            f"the GGUF file cuts texts by {name!r:.40}, which quantkit does not know",
            f"quantkit knows {', '.join(sorted(READ))}",
        )
    merges = []
    for merge in _texts(metadata, "merges"):
        left, _, right = merge.partition(" ")
        merges.append([left, right])
    vocabulary = {t: n for n, (t, type) in enumerate(zip(tokens, types)) if type != UNUSED}
    _refuse_loose(merges, vocabulary)
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(READ[name]),
        "decoder": {"type": "ByteLevel", **PLAIN, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": merges,
            "ignore_merges": READ[name].whole,
        },
    }


def _refuse_loose(merges: list[list[str]], vocabulary: Mapping[str, int]) -> None:
    for left, right in merges:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise QuantkitError(
                f"the GGUF file merges {left!r:.40} and {right!r:.40}, which are not both tokens"
            )


def _read_pieces(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], special: Mapping[str, str]
) -> dict[str, Any]:
    scores = _get(metadata, "scores", list)
    if len(scores) != len(tokens) or not all(isinstance(s, float | int) for s in scores):
        raise QuantkitError(f"the GGUF file does not have one of {PREFIX}scores for each token")
    first = bool(metadata.get(f"{PREFIX}add_space_prefix", True))
    vocabulary = {t: n for n, (t, type) in enumerate(zip(tokens, types)) if type != UNUSED}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if first else []
    ends: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if first:
        ends.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [*steps, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": ends},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": _merges_of(tokens, types, scores),
            "unk_token": special.get("unk"),
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges_of(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to make a token of two others, the highest score first."""
    score = {t: s for t, s, type in zip(tokens, scores, types) if type == NORMAL}
    pairs = sorted(ways(score), key=lambda pair: (-score[pair[0] + pair[1]], pair[0] + pair[1]))
    return [list(pair) for pair in pairs]


def _template_of(
    tokens: list[str], special: Mapping[str, str], adds: Mapping[str, bool]
) -> dict[str, Any] | None:
    used = [role for role in ("bos", "eos") if adds[role] and role in special]
    if not used:
        return None

    def sequence(letter: str, type_id: int) -> list[dict[str, Any]]:
        middle: dict[str, Any] = {"Sequence": {"id": letter, "type_id": type_id}}
        items = {r: {"SpecialToken": {"id": special[r], "type_id": type_id}} for r in used}
        return [*([items["bos"]] if "bos" in used else []), middle] + (
            [items["eos"]] if "eos" in used else []
        )

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {
            special[r]: {
                "id": special[r],
                "ids": [tokens.index(special[r])],
                "tokens": [special[r]],
            }
            for r in used
        },
    }
