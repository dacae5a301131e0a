"""How texts are cut into words before byte-level BPE merges: steps of tokenizer.json, and the names
that llama.cpp has for them (src/llama-vocab.cpp)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from quantkit.errors import QuantkitError

Json = Mapping[str, Any]


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
READ = PRE_TOKENIZERS | {
    alike: PRE_TOKENIZERS[name] for name, others in _ALIKE.items() for alike in others
}


def _steps(pre_tokenizer: Json | None) -> tuple[Step, ...] | None:
    """The steps of a pre-tokenizer of tokenizer.json; None for one with a step that has no name
    here."""
    if not isinstance(pre_tokenizer, Mapping):
        return None
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        parts = [_steps(part) for part in listed(pre_tokenizer, "pretokenizers")]
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


def pre_tokenizer(cut: Cut) -> dict[str, Any]:
    """What tokenizer.json has for it: the inverse of :func:`_steps`."""
    parts: list[dict[str, Any]] = []
    for kind, argument in cut.steps:
        if kind == "bytes":
            parts.append({"type": "ByteLevel", **PLAIN, "use_regex": argument == "regex"})
        elif kind == "digits":
            parts.append({"type": "Digits", "individual_digits": True})
        else:
            pattern = {"Regex": argument}
            parts.append(
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            )
    return {"type": "Sequence", "pretokenizers": parts}


PLAIN = {"add_prefix_space": False, "trim_offsets": True}


def is_known(pre: str) -> bool:
    """Whether quantkit reads files that cut texts in the way of this name."""
    return pre in READ


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


def listed(step: Json, of: str) -> list[Any]:
    """The steps that a step consists of."""
    found = step.get(of)
    return found if isinstance(found, list) else []
