"""How to run a model, for the card: only with programs that load it (workflows/targets.py)."""

from typing import Any

PLACE = "OWNER/NAME"  # of the repository that the card will be in
_CONTEXT = 2048  # tokens, for the memory that is told


def format_of(content: dict[str, Any]) -> str:
    """The format as the user writes it: ``gptq``, ``gguf:q4_0``."""
    done = content.get("conversion") or {}
    settings = content.get("settings") or {}
    found = done.get("to") or settings.get("format") or content.get("method") or "quantized"
    return str(found).replace("_", "-") if found == "compressed_tensors" else str(found)


def memory(size: dict[str, Any]) -> str:
    """Weights, and keys and values of a context."""
    cache = size.get("kv_bytes_per_token")
    shown = in_memory(size)
    return f"{shown} with {_CONTEXT:,} tokens of context" if cache else shown


def in_memory(size: dict[str, Any]) -> str:
    total = size["bytes"] + _CONTEXT * (size.get("kv_bytes_per_token") or 0)
    return f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"


def kv_bytes(config: dict[str, Any]) -> int | None:
    """Bytes of 16-bit keys and values for one token, by config.json."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return None
    width = config.get("head_dim") or hidden // max(1, heads)
    return 2 * 2 * layers * (config.get("num_key_value_heads") or heads) * int(width)


def run(content: dict[str, Any]) -> str:
    """One block for quantkit, and one for every other program that loads the model."""
    parts = ["## Use", f"`{PLACE}` stands for the name of this repository.", _quantkit()]
    for reader in content.get("readers") or []:
        snippet = _SNIPPETS.get(reader["program"])
        if snippet:
            parts.append(f"**{reader['program']}**{_where(reader)}\n\n{snippet(content)}")
    return "\n\n".join(parts)


def _where(reader: dict[str, Any]) -> str:
    needs = [f"`pip install {reader['needs'].replace(',', '')}`"] if reader["needs"] else []
    told = "; ".join([*needs, *reader["hardware"]])
    return f" ({told})" if told else ""


def _quantkit() -> str:
    return (
        "```python\n"
        "import quantkit\n\n"
        f'model, tokenizer = quantkit.load("{PLACE}")  # a transformers model; use it as one\n'
        "```\n\n"
        f'```console\n$ quantkit generate {PLACE} "Once upon a time"\n```'
    )


def _transformers(content: dict[str, Any]) -> str:
    file = f', gguf_file="{content["file"]}"' if content.get("file") else ""
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{PLACE}"{file}, device_map="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}"{file})\n'
        "```"
    )


def _vllm(content: dict[str, Any]) -> str:
    if file := content.get("file"):  # it takes such a file by its path
        return f"```console\n$ hf download {PLACE} {file} --local-dir .\n$ vllm serve ./{file}\n```"
    return f"```console\n$ vllm serve {PLACE}\n```"


def _llamacpp(content: dict[str, Any]) -> str:
    file = content.get("file", "model.gguf")
    return (
        f"```console\n$ hf download {PLACE} {file} --local-dir .\n"
        f'$ llama-cli -m {file} -p "Once upon a time"\n```'
    )


def _mlx(content: dict[str, Any]) -> str:
    return f'```console\n$ mlx_lm.generate --model {PLACE} --prompt "Once upon a time"\n```'


_SNIPPETS = {
    "transformers": _transformers,
    "vLLM": _vllm,
    "llama.cpp": _llamacpp,
    "mlx": _mlx,
}
