"""The model card: what the artifact is, how it was made, how good it measured, how to use it.

It is made from quantkit.json alone, so that verify can make it again with its verdict, and can see
whether somebody has edited it.
"""

from math import nan
from typing import Any

from quantkit.core import card_data
from quantkit.core.metrics import shown
from quantkit.workflows import budget as budgeting
from quantkit.workflows import card_ja, card_use

FILE = "README.md"
HELD_OUT = "bundled held-out sets"
_SET_NAMES = {"en": "English", "ja": "Japanese", "code": "code", "chat": "chat"}
_METHODS = {"bnb": "bitsandbytes", "rtn": "rounded to nearest,"}
_NOT_SAID: tuple[Any, ...] = (None, "", [], {})
_LIBRARIES = {"gguf": "gguf", "mlx": "mlx"}  # all others are transformers'


def model_card(content: dict[str, Any]) -> str:
    """README.md from the content of quantkit.json."""
    source = content.get("source") or {"name": "a model", "revision": None}
    name = source["name"].rpartition("/")[2]
    kind = described(content)
    measured = content.get("verified") or content.get("measured")
    parts = [
        _front_matter(content),
        f"# {name}, {kind}",
        f"This is `{source['name']}`{_at(source)}, {_made(content)}",
        _size_table(source, content["size"]),
        _quality(measured),
        card_use.run(content),
        _chosen(content.get("budget")),
        _settings_table(content),
        _fallbacks(content.get("fallbacks") or []),
        _limits(content, measured),
        card_ja.section(content, kind, measured),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_ours(text: str, content: dict[str, Any]) -> bool:
    """Whether ``text`` is the card of ``content``, as nobody has changed it."""
    return "versions" in content and "size" in content and text == model_card(content)


def described(content: dict[str, Any]) -> str:
    """``GPTQ 4-bit``, ``GPTQ 4-bit in GGUF Q4_0``, or ``GGUF Q8_0, rounded to nearest``."""
    settings, method = content.get("settings") or {}, content.get("method")
    form = card_use.format_of(content)
    if form.startswith("gguf:"):
        form = form.replace(":", " ").upper()
    if method is None:
        return form
    if method == "rtn" and "bits" not in settings:  # the format says how many
        return f"{form}, rounded to nearest"
    kind = f"{settings['bits']}-bit" if "bits" in settings else settings.get("type", "").upper()
    named = f"{_METHODS.get(method, method.upper())} {kind}".rstrip()
    return named if form.startswith(method) else f"{named} in {form}"


def _made(content: dict[str, Any]) -> str:
    by = f"with quantkit {content['versions']['quantkit']}"
    count = content["size"]["linears"]
    held = f" Of its layers, {count} linear ones are quantized." if count else ""
    done = "quantized " if content.get("method") else "as it was written "
    return f"{done}{by}{_converted(content)}.{held}"


def _converted(content: dict[str, Any]) -> str:
    done = content.get("conversion")
    if not done:
        return ""
    how = "without changing a number" if done["exact"] else "with rounding"
    return f", and converted to {done['to']} {how}"


def _at(source: dict[str, Any]) -> str:
    return f" (revision `{source['revision'][:12]}`)" if source["revision"] else ""


def _front_matter(content: dict[str, Any]) -> str:
    """The keys are those of the Hub's documentation of model cards."""
    name = (content.get("source") or {}).get("name", "")
    form = card_use.format_of(content).partition(":")[0]
    settings = content.get("settings") or {}
    tags = ["quantkit", content.get("method"), form]
    tags += [f"{settings['bits']}-bit"] if "bits" in settings else []
    base = {"base_model": name, "base_model_relation": "quantized"} if "/" in name else {}
    sources = (content.get("calibration") or {}).get("sources") or []
    datasets = [source.split(":")[1] for source in sources if source.startswith("hf:")]
    return card_data.front_matter(
        library_name=_LIBRARIES.get(form, "transformers"),
        pipeline_tag="text-generation",
        **base,
        **(content.get("card") or {}),
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=list(dict.fromkeys(tag for tag in tags if tag)),
    )


def _size_table(source: dict[str, Any], size: dict[str, Any]) -> str:
    before = f"{source['bytes'] / 1e6:,.1f} MB" if "bytes" in source else ""
    lines = ["| | original | quantized |", "|---|---|---|"]
    lines.append(f"| weights on disk | {before} | {size['bytes'] / 1e6:,.1f} MB |")
    if size.get("bits_per_weight"):
        lines.append(f"| bits per quantized weight | | {size['bits_per_weight']:.2f} |")
    lines.append(f"| memory to run it, about | | {card_use.memory(size)} |")
    return "\n".join(lines)


def _quality(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "Quality was not measured when this was made; run `quantkit verify` on it."
    rows = [
        f"| {_SET_NAMES.get(label, label)} | {_number(m['reference_perplexity']):.2f} "
        f"| {_number(m['perplexity']):.2f} | {shown(_number(m['kl']), m['kl_error'])} "
        f"| {_number(m['top1']):.1%} |"
        for label, m in measured["sets"].items()
    ]
    return (
        "## Measured quality\n\n"
        f"Against the original, on {_text(measured)}. KL is the mean "
        "KL divergence of the next-token distributions in nats (0 is identical); agreement is how "
        "often both predict the same next token.\n\n"
        "| text | perplexity, original | perplexity, quantized | KL | agreement |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
        f"| **mean** | | | **{shown(_number(measured['kl']), measured['kl_error'])}** "
        f"| **{_number(measured['top1']):.1%}** |" + _verdict(measured)
    )


def _text(measured: dict[str, Any]) -> str:
    """What can be said of the text; of a user's own, nothing is known."""
    own = measured.get("settings", {}).get("texts", [HELD_OUT]) != [HELD_OUT]
    return "text of one's own" if own else "held-out text that took no part in calibration"


def _verdict(measured: dict[str, Any]) -> str:
    """What only verify knows."""
    lines = []
    if "settings" in measured:
        settings = measured["settings"]
        lines.append(
            f"Measured by `quantkit verify` against `{measured['against']}` on {settings['rows']} "
            f"rows of {settings['seqlen']} tokens of each text ({', '.join(settings['texts'])})."
        )
        again = (
            f"quantkit verify OWNER/NAME --rows {settings['rows']} --seqlen {settings['seqlen']}"
        )
        lines.append(f"```console\n$ {again}\n```")
    else:
        lines.append("Measured while it was quantized; `quantkit verify OWNER/NAME` measures more.")
    if measured.get("nonfinite"):
        lines.append(f"**NaN or infinities in {', '.join(measured['nonfinite'][:5])}.**")
    if measured.get("gate"):
        lines.append(
            f"Limits that were set: **{'kept' if measured['gate']['passed'] else 'not kept'}**."
        )
    return "".join(f"\n\n{line}" for line in lines)


def _number(value: float | None) -> float:
    """JSON has null for what is no number."""
    return nan if value is None else value


def _settings_table(content: dict[str, Any]) -> str:
    settings, calibration = content.get("settings") or {}, content.get("calibration")
    said = {key: value for key, value in settings.items() if value not in _NOT_SAID}
    rows = [f"| {key} | {value} |" for key, value in said.items()]
    if calibration:
        labels = ", ".join(f"{k} {v:,}" for k, v in calibration["tokens_by_label"].items())
        rows.append(
            f"| calibration | {', '.join(calibration['sources'])}: {calibration['rows']} rows, "
            f"{calibration['tokens']:,} tokens ({labels}) |"
        )
    if not rows:
        return ""
    return (
        "## Settings\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        "Per-layer errors, hashes of the original's files and versions are in `quantkit.json`."
    )


def _chosen(budget: dict[str, Any] | None) -> str:
    if budget is None:
        return ""
    header, rows = budgeting.table(budget["parts"])
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return (
        "## Bits of every part\n\n"
        f"Chosen for a target of {budget['target']} so that the model loses the least: bits, and "
        "weights that share a scale.\n\n" + "\n".join(lines)
    )


def _fallbacks(fallbacks: list[str]) -> str:
    if not fallbacks:
        return ""
    return "## Done differently than asked\n\n" + "\n".join(f"- {text}" for text in fallbacks)


def _limits(content: dict[str, Any], measured: dict[str, Any] | None) -> str:
    """What the numbers above do not say."""
    lines = [
        "The errors, biases and risks of the original are those of this model, too, and the "
        "original's licence applies to it."
    ]
    if measured:
        names = ", ".join(_SET_NAMES.get(label, label) for label in measured["sets"])
        lines.append(
            f"It was measured on a few thousand tokens of text ({names}). Other languages, long "
            "contexts, arithmetic and reasoning may have lost more: try it on your own task."
        )
    if (content.get("calibration") or {}).get("tokens_by_label"):
        labels = content["calibration"]["tokens_by_label"]
        names = ", ".join(_SET_NAMES.get(label, label) for label in labels)
        lines.append(f"It was calibrated on text of these kinds: {names}.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
