"""Tokenizers: tokenizer.json and its neighbours as the keys ``tokenizer.*`` of GGUF, which
gguf_tokenizer_read.py makes tokenizers of again.

llama.cpp has its own tokenizers and reads only lists. Two kinds are converted:

    gpt2    byte-level BPE: every byte is a printable character, merges have ranks, and a text is
            first cut into words by regular expressions. Those are not in the file: it names one of
            llama.cpp's own sets in ``tokenizer.ggml.pre``
    llama   SentencePiece's BPE: spaces are "▁", unknown characters become tokens <0x00> ... <0xFF>,
            and of all pairs the one whose token has the highest score is merged first

                        gpt2                              llama
    tokenizer.json      merges  [["t","h"], ["i","n"]]    merges  [["t","h"], ["th","e"]]
    GGUF                merges  ["t h", "i n"]            scores  of "th" 0.0, of "the" -1.0

A wrong guess here makes a model that seems to work and is worse, so what is not recognised is
refused, and runtime/gguf_roundtrip.py compares the result with the original. What llama.cpp does
not have is Unicode normalization (NFC): texts that are not composed get other tokens there.

The facts are those of llama.cpp's src/llama-vocab.cpp and of gguf-py/gguf/vocab.py.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from quantkit.core.gguf_values import Value, array, boolean, string, u32
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats.gguf_words import PRE_TOKENIZERS, Json, listed, pre_tokenizer_name

# enum llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# what transformers calls a special token -> its key in GGUF (the spelling is theirs)
SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
SPACE = "▁"
_MOST = 1 << 22  # tokens: far more than any model has
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")  # of a pre-tokenizer
_LOWEST = -1e9  # for tokens that no merge makes


@dataclass(frozen=True)
class Files:
    """What a folder says of its tokenizer.

    tokenizer  tokenizer.json
    config     tokenizer_config.json
    special    special_tokens_map.json
    model      config.json
    template   chat_template.jinja
    """

    tokenizer: Json
    config: Json = field(default_factory=dict)
    special: Json = field(default_factory=dict)
    model: Json = field(default_factory=dict)
    template: str | None = None


def metadata(files: Files, pre: str | None = None) -> dict[str, Value]:
    """The keys of a file for this tokenizer. ``pre`` is the name of the pre-tokenizer, decided here
    when it is None. Raises QuantkitError for tokenizers that llama.cpp does not have."""
    model = files.tokenizer.get("model")
    kind = model.get("type", "BPE") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or kind != "BPE":
        raise QuantkitError(
            f"a tokenizer of the kind {kind or 'unknown'!s:.40} is not converted to GGUF",
            "byte-level BPE and SentencePiece's BPE are, from a tokenizer.json",
        )
    _check(files.tokenizer)
    found = _pieces(files, pre) if model.get("byte_fallback") else _words(files, pre)
    return {**found, **_special(files), **_templates(files)}


def _check(tokenizer: Json) -> None:
    """Raise QuantkitError where tokens, ids or merges are something else."""
    vocabulary, merges = tokenizer["model"].get("vocab"), tokenizer["model"].get("merges")
    added = tokenizer.get("added_tokens") or []
    if not (isinstance(vocabulary, Mapping) and isinstance(merges, list) and vocabulary):
        raise QuantkitError("tokenizer.json has no vocabulary or no merges")
    if not isinstance(added, list) or not all(
        isinstance(token, Mapping) and isinstance(token.get("content"), str) for token in added
    ):
        raise QuantkitError("tokenizer.json has added tokens that are none")
    for number in (*vocabulary.values(), *(token.get("id") for token in added)):
        if type(number) is not int or not 0 <= number < _MOST:
            raise QuantkitError(f"tokenizer.json has a token with the number {number!r:.40}")


def _words(files: Files, pre: str | None) -> dict[str, Value]:
    """Byte-level BPE."""
    _refuse_normalizer(files.tokenizer, allowed=("NFC",))
    if pre is not None and not _NAME.fullmatch(pre):
        raise UsageError(
            f"{pre!r:.40} is no name of a pre-tokenizer",
            f"llama.cpp's look like {', '.join(list(PRE_TOKENIZERS)[:5])}",
        )
    pre = pre or pre_tokenizer_name(files.tokenizer)
    tokens, types = _tokens(files)
    merges = [" ".join(pair) for pair in _merges(files.tokenizer)]
    return {
        f"{PREFIX}model": string("gpt2"),
        f"{PREFIX}pre": string(pre),
        f"{PREFIX}tokens": array("str", tokens),
        f"{PREFIX}token_type": array("i32", types),
        f"{PREFIX}merges": array("str", merges),
    }


def _pieces(files: Files, pre: str | None) -> dict[str, Value]:
    """SentencePiece's BPE."""
    tokens, types = _tokens(files)
    unknown = files.tokenizer["model"].get("unk_token")
    for number, token in enumerate(tokens):
        if token == unknown:
            types[number] = UNKNOWN
        elif types[number] == NORMAL and _is_byte(token):
            types[number] = BYTE
        elif types[number] == USER_DEFINED:  # these are looked for before spaces are replaced
            tokens[number] = token.replace(SPACE, " ")
    if types.count(BYTE) != 256:
        raise QuantkitError(f"the tokenizer has {types.count(BYTE)} of the 256 tokens for bytes")
    return {
        f"{PREFIX}model": string("llama"),
        f"{PREFIX}pre": string(pre or "default"),
        f"{PREFIX}tokens": array("str", tokens),
        f"{PREFIX}scores": array("f32", _scores(files.tokenizer, tokens, types)),
        f"{PREFIX}token_type": array("i32", types),
        f"{PREFIX}add_space_prefix": boolean(_puts_space_first(files.tokenizer)),
    }


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _tokens(files: Files) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens, as many as the model has embeddings."""
    held: dict[int, tuple[str, int]] = {}
    for token, number in files.tokenizer["model"]["vocab"].items():
        held[number] = (token, NORMAL)
    for added in files.tokenizer.get("added_tokens") or []:
        held[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    count = files.model.get("vocab_size", max(held) + 1)
    if type(count) is not int or count >= _MOST:
        raise QuantkitError(f"config.json has vocab_size = {count!r:.40}")
    if max(held) >= count:
        raise QuantkitError(
            f"the tokenizer has {max(held) + 1} tokens, and the model embeddings for {count}",
            "the tokenizer and the model do not belong together",
        )
    texts = {text for text, _ in held.values()}
    for number in range(count):
        if number not in held:
            text = f"[PAD{number}]"
            while text in texts:  # llama.cpp ends when two tokens have one text
                text = f"[{text}]"
            held[number] = (text, UNUSED)
    if len({text for text, _ in held.values()}) < count:
        raise QuantkitError("the tokenizer has two tokens with the same text")
    return [held[n][0] for n in range(count)], [held[n][1] for n in range(count)]


def _merges(tokenizer: Json) -> list[tuple[str, str]]:
    """Pairs; older files have them as one string."""
    pairs = []
    for merge in tokenizer["model"]["merges"]:
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [str(left), str(right)] if " " not in left + right:
                pairs.append((left, right))
            case _:
                raise QuantkitError(f"the tokenizer has the merge {merge!r:.60}, which is no pair")
    return pairs


def _scores(tokenizer: Json, tokens: list[str], types: list[int]) -> list[float]:
    """Scores in the order of the merges: SentencePiece's own are not in tokenizer.json, but only
    their order counts. Raises QuantkitError where merges are not by the tokens that they make, as
    SentencePiece's are: all ways to make a token, one after the other."""
    merges = _merges(tokenizer)
    scores: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token != last and token in scores:
            raise _no_pieces(token)
        scores.setdefault(token, -float(rank))
        last = token
    known = set(merges)
    for left, right in ways({t for t, type in zip(tokens, types) if type == NORMAL}):
        if (left, right) not in known:
            raise _no_pieces(left + right)
    return [scores.get(token, _LOWEST) for token in tokens]


def ways(tokens: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens that is a token when joined."""
    for token in tokens:
        for cut in range(1, len(token)):
            if token[:cut] in tokens and token[cut:] in tokens:
                yield token[:cut], token[cut:]


def _no_pieces(token: str) -> QuantkitError:
    return QuantkitError(
        f"the tokenizer makes the token {token!r:.60} in ways that SentencePiece does not, and "
        "llama.cpp would cut texts otherwise"
    )


def _puts_space_first(tokenizer: Json) -> bool:
    """Whether a text begins with a "▁" of its own. Raises QuantkitError for normalizers that are
    not SentencePiece's usual one."""
    steps = tokenizer.get("normalizer")
    parts = _parts(steps, "normalizers")
    cut = tokenizer.get("pre_tokenizer")
    replaces = [p for p in parts if p.get("type") == "Replace" and p.get("content") == SPACE]
    prepends = [p for p in parts if p.get("type") == "Prepend" and p.get("prepend") == SPACE]
    if len(replaces) + len(prepends) == len(parts) and len(replaces) == 1:
        return bool(prepends)
    if not parts and isinstance(cut, Mapping) and cut.get("type") == "Metaspace":
        spaces = (cut.get("replacement"), cut.get("split"))
        if spaces == (SPACE, False):
            return str(cut.get("prepend_scheme", "always")) != "never"
    raise QuantkitError(
        "the tokenizer normalizes texts in a way that llama.cpp's SentencePiece does not"
    )


def _parts(step: Json | None, of: str) -> list[Json]:
    if not isinstance(step, Mapping):
        return []
    if step.get("type") == "Sequence":
        return [part for inner in listed(step, of) for part in _parts(inner, of)]
    return [step]


def _refuse_normalizer(tokenizer: Json, allowed: tuple[str, ...]) -> None:
    for part in _parts(tokenizer.get("normalizer"), "normalizers"):
        if part.get("type") not in allowed:
            raise QuantkitError(
                f"the tokenizer normalizes texts with {part.get('type')}, which llama.cpp does not"
            )


def _special(files: Files) -> dict[str, Value]:
    """Ids of special tokens, and which of them go around a text."""
    ids = {role: number for role in SPECIAL if (number := _id_of(files, role)) is not None}
    found = {f"{PREFIX}{SPECIAL[role]}": u32(number) for role, number in ids.items()}
    for role, adds in zip(("bos", "eos"), _around(files, ids)):
        found[f"{PREFIX}add_{role}_token"] = boolean(adds)
    return found


def _id_of(files: Files, role: str) -> int | None:
    for source in (files.config, files.special):
        token = source.get(f"{role}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            return _number_of(files.tokenizer, text)
    number = files.model.get(f"{role}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if type(number) is int and 0 <= number < _MOST else None


def _number_of(tokenizer: Json, text: str) -> int | None:
    for added in tokenizer.get("added_tokens") or []:
        if added["content"] == text:
            return int(added["id"])
    number = tokenizer["model"]["vocab"].get(text)
    return None if number is None else int(number)


def _around(files: Files, ids: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts the first (bos) and the last (eos) token around a text."""
    flags = [files.config.get(f"add_{role}_token") for role in ("bos", "eos")]
    if any(flag is not None for flag in flags):  # transformers lets them win over the template
        return bool(flags[0]) and "bos" in ids, bool(flags[1]) and "eos" in ids
    found = {"bos": False, "eos": False}
    for part in _parts(files.tokenizer.get("post_processor"), "processors"):
        if part.get("type") == "ByteLevel":
            continue
        if part.get("type") != "TemplateProcessing":
            raise QuantkitError(
                f"the tokenizer adds tokens by {part.get('type')}, which is not converted to GGUF"
            )
        role = "bos"
        for item in listed(part, "single"):
            match item:
                case {"Sequence": _}:
                    role = "eos"
                case {"SpecialToken": {"id": str(token)}} if not found[role] and _number_of(
                    files.tokenizer, token
                ) == ids.get(role, -1):
                    found[role] = True
                case _:
                    raise QuantkitError(
                        f"the tokenizer puts {item!r:.80} around texts, and llama.cpp only the "
                        "first and the last token of the model (bos, eos)"
                    )
    return found["bos"], found["eos"]


def _templates(files: Files) -> dict[str, Value]:
    """The chat template, and further ones by their names."""
    template = files.config.get("chat_template", files.template)
    if isinstance(template, str):
        return {TEMPLATE: string(template)}
    found: dict[str, Value] = {}
    for entry in template if isinstance(template, list) else []:
        match entry:
            case {"name": str(name), "template": str(text)}:
                found[TEMPLATE if name == "default" else f"{TEMPLATE}.{name}"] = string(text)
            case _:
                raise QuantkitError("tokenizer_config.json has a chat template that is none")
    return found
