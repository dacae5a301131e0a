"""The model card: what the artifact is, how it was made, how good it measured, how to use it."""

from math import nan
from typing import Any

from quantkit.core.metrics import shown
from quantkit.workflows import budget as budgeting

FILE = "README.md"
HELD_OUT = "bundled held-out sets"
_SET_NAMES = {"en": "English", "ja": "Japanese", "code": "code", "chat": "chat"}


def model_card(content: dict[str, Any]) -> str:
    """README.md from the content of quantkit.json."""
    source, settings, size = content["source"], content["settings"], content["size"]
    title = (
        f"{source['name'].rpartition('/')[2]}, {content['method'].upper()} {settings['bits']}-bit"
    )
    parts = [
        _front_matter(source["name"], content["method"], settings),
        f"# {title}",
        f"`{source['name']}`{_at(source)} quantized with quantkit "
        f"{content['versions']['quantkit']}. {size['linears']} linear layers hold "
        f"{settings['bits']}-bit codes; all other tensors are kept in 16 bits.",
        _size_table(source, size),
        _quality(content.get("verified") or content["measured"]),
        _chosen(content["budget"]),
        _settings_table(settings, content["calibration"]),
        _fallbacks(content["fallbacks"]),
        _use(settings["format"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_ours(text: str, content: dict[str, Any]) -> bool:
    """Whether ``text`` is the card of ``content``, as nobody has changed it."""
    return _made_by_quantize(content) and text == model_card(content)


def _made_by_quantize(content: dict[str, Any]) -> bool:
    """A conversion's record has less, and its folder no card."""
    parts = ("source", "settings", "size", "calibration", "versions", "fallbacks", "measured")
    return all(part in content for part in parts) and "conversion" not in content


def _at(source: dict[str, Any]) -> str:
    return f" (revision `{source['revision'][:12]}`)" if source["revision"] else ""


def _front_matter(name: str, method: str, settings: dict[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if "/" in name:
        lines += [f"base_model: {name}", "base_model_relation: quantized"]
    lines += ["tags:", "- quantkit", f"- {method}", f"- {settings['bits']}-bit", "---"]
    return "\n".join(lines)


def _size_table(source: dict[str, Any], size: dict[str, Any]) -> str:
    before, after = source["bytes"], size["bytes"]
    return (
        "| | original | quantized |\n|---|---|---|\n"
        f"| weights on disk | {before / 1e6:,.1f} MB | {after / 1e6:,.1f} MB |\n"
        f"| bits per quantized weight | | {size['bits_per_weight']:.2f} |"
    )


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


def _settings_table(settings: dict[str, Any], calibration: dict[str, Any]) -> str:
    labels = ", ".join(f"{k} {v:,}" for k, v in calibration["tokens_by_label"].items())
    rows = [f"| {key} | {value} |" for key, value in settings.items()]
    rows.append(
        f"| calibration | {', '.join(calibration['sources'])}: {calibration['rows']} rows, "
        f"{calibration['tokens']:,} tokens ({labels}) |"
    )
    return "## Settings\n\n| | |\n|---|---|\n" + "\n".join(rows)


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


def _use(format: str) -> str:
    needed = "compressed-tensors" if format == "compressed-tensors" else "GPTQModel"
    return (
        "## Use\n\n"
        "```python\n"
        "import quantkit\n\n"
        'model, tokenizer = quantkit.load("this-folder-or-repository")\n'
        "```\n\n"
        f"It also loads with `transformers.AutoModelForCausalLM.from_pretrained` (with {needed} "
        "installed). Per-layer errors, hashes and versions are in `quantkit.json`."
    )
