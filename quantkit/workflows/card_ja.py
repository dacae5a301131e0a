"""The Japanese section of the model card: the same facts, shorter."""

from math import nan
from typing import Any

from quantkit.core.metrics import shown
from quantkit.workflows import card_use

_SETS = {"en": "英語", "ja": "日本語", "code": "コード", "chat": "対話"}


def section(content: dict[str, Any], kind: str, measured: dict[str, Any] | None) -> str:
    """What the model is, how good, how to run it."""
    name = (content.get("source") or {}).get("name", "")
    size = content["size"]
    parts = [
        "## 日本語",
        f"`{name}` を quantkit で量子化したモデルです（{kind}）。重みは "
        f"{size['bytes'] / 1e6:,.1f} MB、実行に必要なメモリはおよそ "
        f"{card_use.in_memory(size)} です。",
        _quality(measured),
        f"実行するには（`{card_use.PLACE}` はこのリポジトリの名前に置き換えてください）:\n\n"
        f'```console\n$ quantkit generate {card_use.PLACE} "昔々あるところに"\n```'
        + _others(content),
        "元のモデルのライセンスと注意事項は、このモデルにもそのまま当てはまります。"
        "測定に使った文章は限られているので、実際の用途で確かめてからお使いください。",
    ]
    return "\n\n".join(part for part in parts if part)


def _quality(measured: dict[str, Any] | None) -> str:
    if not measured:
        return "品質はまだ測定されていません。`quantkit verify` で測定できます。"
    rows = [
        f"| {_SETS.get(label, label)} | {_number(m['reference_perplexity']):.2f} "
        f"| {_number(m['perplexity']):.2f} | {shown(_number(m['kl']), m['kl_error'])} "
        f"| {_number(m['top1']):.1%} |"
        for label, m in measured["sets"].items()
    ]
    return (
        "元のモデルとの比較です。KL は次のトークンの確率分布の差（0 なら同一）、一致率は両者が"
        "同じトークンを最有力とした割合を表します。\n\n"
        "| 文章 | perplexity（元） | perplexity（量子化後） | KL | 一致率 |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows)
    )


def _others(content: dict[str, Any]) -> str:
    names = [reader["program"] for reader in content.get("readers") or []]
    if not names:
        return ""
    return (
        f"\n\nほかに {'、'.join(names)} でも読み込めます（形式: {card_use.format_of(content)}）。"
    )


def _number(value: float | None) -> float:
    return nan if value is None else value
