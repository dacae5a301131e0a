"""Tokenizers: tokenizer.json and its neighbours to and from the keys ``tokenizer.*`` of GGUF.

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
from typing import Any, NamedTuple

from quantkit.core.gguf_values import Value, array, boolean, string, u32
from quantkit.errors import QuantkitError, UsageError

Json = Mapping[str, Any]

# enum llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# what transformers calls a special token -> its key in GGUF (the spelling is theirs)
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
_SPACE = "▁"
_MOST = 1 << 22  # tokens: far more than any model has
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


# how a text is cut into words


class Step(NamedTuple):
    """A step of a pre-tokenizer: ``bytes`` (to printable characters; with the argument "regex" it
    cuts as GPT-2 does first), ``split`` (at every match of the argument), ``digits`` (each one)."""

    kind: str
    argument: str = ""


class Cut(NamedTuple):
    """Steps, and whether a word that is a token is taken as it is, without merges."""

    steps: tuple[Step, ...]
    whole: bool = False


_BYTES = Step("bytes")
_GPT2 = Step("bytes", "regex")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Names are llama.cpp's. Of those that cut alike, one is written and all are read.
PRE_TOKENIZERS = {
    "gpt-2": Cut((_GPT2,)),
    "starcoder": Cut((Step("digits"), _GPT2)),
    "llama-bpe": Cut((Step("split", _WORDS % "{1,3}"), _BYTES), whole=True),
    "smaug-bpe": Cut((Step("split", _WORDS % "{1,3}"), _BYTES)),
    "qwen2": Cut((Step("split", _WORDS % ""), _BYTES)),
    "gpt-4o": Cut((Step("split", _CASED % (_ENDINGS, _ENDINGS, "{1,3}")), _BYTES)),
    "tekken": Cut((Step("split", _CASED % ("", "", "")), _BYTES), whole=True),
    "deepseek-coder": Cut(
        (
            Step("split", r"[\r\n]"),
            Step("split", r"\s?\p{L}+"),
            Step("split", r"\s?\p{P}+"),
            Step("split", "[一-龥ࠀ-一가-퟿]+"),
            Step("digits"),
            _BYTES,
        )
    ),
    "deepseek-v3": Cut(
        (
            Step("split", r"\p{N}{1,3}"),
            Step("split", "[一-龥぀-ゟ゠-ヿ]+"),
            Step(
                "split",
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
                r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            _BYTES,
        )
    ),
}
_ALIKE = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "gigachat", "exaone4", "mellum", "modern-bert"),
    "starcoder": ("refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "glm4"),
    "smaug-bpe": ("dbrx", "chatglm-bpe"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"),
    "gpt-4o": ("llama4",),
}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_READ = PRE_TOKENIZERS | {
    alike: PRE_TOKENIZERS[name] for name, others in _ALIKE.items() for alike in others
}


def _steps(pre_tokenizer: Json | None) -> tuple[Step, ...] | None:
    """The steps of a pre-tokenizer of tokenizer.json; None for one with a step that has no name
    here."""
    if not isinstance(pre_tokenizer, Mapping):
        return None
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        parts = [_steps(part) for part in _list(pre_tokenizer, "pretokenizers")]
        return None if None in parts else tuple(step for part in parts for step in part or ())
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return (_GPT2 if pre_tokenizer.get("use_regex", True) else _BYTES,)
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return (Step("digits"),)
    if kind == "Split" and not pre_tokenizer.get("invert"):
        pattern = pre_tokenizer.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        if isinstance(regex, str) and pre_tokenizer.get("behavior") == "Isolated":
            # some files have line ends as such, others escape them for the regular expression
            return (Step("split", regex.replace("\r", r"\r").replace("\n", r"\n")),)
    return None


def _pre_tokenizer(cut: Cut) -> dict[str, Any]:
    """The inverse of :func:`_steps`."""
    parts: list[dict[str, Any]] = []
    for kind, argument in cut.steps:
        if kind == "bytes":
            parts.append({"type": "ByteLevel", **_PLAIN, "use_regex": argument == "regex"})
        elif kind == "digits":
            parts.append({"type": "Digits", "individual_digits": True})
        else:
            pattern = {"Regex": argument}
            parts.append(
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            )
    return {"type": "Sequence", "pretokenizers": parts}


_PLAIN = {"add_prefix_space": False, "trim_offsets": True}


def is_known(pre: str) -> bool:
    """Whether quantkit reads files that cut texts in the way of this name."""
    return pre in _READ


def pre_tokenizer_name(tokenizer: Json) -> str:
    """llama.cpp's name for how a tokenizer.json cuts texts. Raises QuantkitError where none is
    known to do the same."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    whole = bool(tokenizer["model"].get("ignore_merges"))
    for name, cut in PRE_TOKENIZERS.items():
        if cut == (steps, whole):
            return name
    raise QuantkitError(
        "the tokenizer cuts texts in a way for which quantkit knows no name of llama.cpp's",
        "give it with --pre-tokenizer NAME (tokenizer.ggml.pre of a GGUF file of the same model)",
    )


# writing


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
        f"{_PREFIX}model": string("gpt2"),
        f"{_PREFIX}pre": string(pre),
        f"{_PREFIX}tokens": array("str", tokens),
        f"{_PREFIX}token_type": array("i32", types),
        f"{_PREFIX}merges": array("str", merges),
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
            tokens[number] = token.replace(_SPACE, " ")
    if types.count(BYTE) != 256:
        raise QuantkitError(f"the tokenizer has {types.count(BYTE)} of the 256 tokens for bytes")
    return {
        f"{_PREFIX}model": string("llama"),
        f"{_PREFIX}pre": string(pre or "default"),
        f"{_PREFIX}tokens": array("str", tokens),
        f"{_PREFIX}scores": array("f32", _scores(files.tokenizer, tokens, types)),
        f"{_PREFIX}token_type": array("i32", types),
        f"{_PREFIX}add_space_prefix": boolean(_puts_space_first(files.tokenizer)),
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
    for left, right in _ways({t for t, type in zip(tokens, types) if type == NORMAL}):
        if (left, right) not in known:
            raise _no_pieces(left + right)
    return [scores.get(token, _LOWEST) for token in tokens]


def _ways(tokens: Collection[str]) -> Iterator[tuple[str, str]]:
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
    replaces = [p for p in parts if p.get("type") == "Replace" and p.get("content") == _SPACE]
    prepends = [p for p in parts if p.get("type") == "Prepend" and p.get("prepend") == _SPACE]
    if len(replaces) + len(prepends) == len(parts) and len(replaces) == 1:
        return bool(prepends)
    if not parts and isinstance(cut, Mapping) and cut.get("type") == "Metaspace":
        spaces = (cut.get("replacement"), cut.get("split"))
        if spaces == (_SPACE, False):
            return str(cut.get("prepend_scheme", "always")) != "never"
    raise QuantkitError(
        "the tokenizer normalizes texts in a way that llama.cpp's SentencePiece does not"
    )


def _parts(step: Json | None, of: str) -> list[Json]:
    if not isinstance(step, Mapping):
        return []
    if step.get("type") == "Sequence":
        return [part for inner in _list(step, of) for part in _parts(inner, of)]
    return [step]


def _list(step: Json, of: str) -> list[Any]:
    found = step.get(of)
    return found if isinstance(found, list) else []


def _refuse_normalizer(tokenizer: Json, allowed: tuple[str, ...]) -> None:
    for part in _parts(tokenizer.get("normalizer"), "normalizers"):
        if part.get("type") not in allowed:
            raise QuantkitError(
                f"the tokenizer normalizes texts with {part.get('type')}, which llama.cpp does not"
            )


def _special(files: Files) -> dict[str, Value]:
    """Ids of special tokens, and which of them go around a text."""
    ids = {role: number for role in _SPECIAL if (number := _id_of(files, role)) is not None}
    found = {f"{_PREFIX}{_SPECIAL[role]}": u32(number) for role, number in ids.items()}
    for role, adds in zip(("bos", "eos"), _around(files, ids)):
        found[f"{_PREFIX}add_{role}_token"] = boolean(adds)
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
        for item in _list(part, "single"):
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
        return {_TEMPLATE: string(template)}
    found: dict[str, Value] = {}
    for entry in template if isinstance(template, list) else []:
        match entry:
            case {"name": str(name), "template": str(text)}:
                found[_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}"] = string(text)
            case _:
                raise QuantkitError("tokenizer_config.json has a chat template that is none")
    return found


# reading


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
    types = metadata.get(f"{_PREFIX}token_type") or [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise QuantkitError(f"the GGUF file does not have a {_PREFIX}token_type for each token")
    special = {
        role: tokens[number]
        for role, key in _SPECIAL.items()
        if isinstance(number := metadata.get(_PREFIX + key), int)
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
    first = kind == "llama" or _READ.get(metadata.get(f"{_PREFIX}pre", "")) == _READ["llama-bpe"]
    adds = {"bos": first, "eos": False}
    for role in adds:
        adds[role] = bool(metadata.get(f"{_PREFIX}add_{role}_token", adds[role]))
    body["post_processor"] = _template_of(tokens, special, adds)
    template = metadata.get(_TEMPLATE)
    return Tokenizer(body, special, template if isinstance(template, str) else None)


def _get(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    value = metadata.get(_PREFIX + key)
    if not isinstance(value, kind):
        raise QuantkitError(f"the GGUF file has no usable {_PREFIX}{key}")
    return value


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    found = _get(metadata, key, list)
    if not found or not isinstance(found[0], str):
        raise QuantkitError(f"the {_PREFIX}{key} of the GGUF file is no list of texts")
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
    if name not in _READ:
        raise QuantkitError(
            f"the GGUF file cuts texts by {name!r:.40}, which quantkit does not know",
            f"quantkit knows {', '.join(sorted(_READ))}",
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
        "pre_tokenizer": _pre_tokenizer(_READ[name]),
        "decoder": {"type": "ByteLevel", **_PLAIN, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": merges,
            "ignore_merges": _READ[name].whole,
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
        raise QuantkitError(f"the GGUF file does not have one of {_PREFIX}scores for each token")
    first = bool(metadata.get(f"{_PREFIX}add_space_prefix", True))
    vocabulary = {t: n for n, (t, type) in enumerate(zip(tokens, types)) if type != UNUSED}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if first else []
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
    pairs = sorted(_ways(score), key=lambda pair: (-score[pair[0] + pair[1]], pair[0] + pair[1]))
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
