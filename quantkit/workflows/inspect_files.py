"""What can be wrong with the files of a checkpoint: names, headers, what they give away."""

import re
from collections.abc import Iterator
from typing import Any

from quantkit.core.checkpoint import INDEX
from quantkit.core.weight_file import read_header
from quantkit.workflows.inspect_look import (
    BESIDE,
    CONFIG,
    GENERATION,
    TOKENIZER,
    Finding,
    Look,
    some,
)
from quantkit.workflows.repair import Change, Drop, Header, Put, Rename

_STANDARD = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

_PATH = re.compile(r"(file:/|~?/[^/\s]+/|[A-Za-z]:[\\/]|\\\\)\S")
# tokens are text of a model's, whatever they look like
_TOKENS = re.compile(r"token|template|vocab")
_NESTED = 20  # levels of a configuration that are looked through
_TEXT_LENGTH = 200  # a name of a data set is shorter, a calibration text longer


def standard_files(look: Look) -> bool:
    """Whether transformers finds the weights by their names."""
    return all(_STANDARD.fullmatch(file) for file in look.opened.tensors.files)


def weight_files(look: Look) -> Iterator[Finding]:
    """Names that readers do not look for, and shards without an index."""
    files, tensors = look.opened.tensors.files, look.opened.tensors
    if not standard_files(look):
        single = len(files) == 1 and files[0].endswith(".safetensors")
        named = [f for f in BESIDE if (look.opened.source.read_json(f) or {}).get(_BASENAME)]
        changes: tuple[Change, ...] = (Rename(files[0], "model.safetensors"),)
        changes += tuple(Put(file, (_BASENAME,), "model") for file in named)
        text = f"transformers and mlx do not find {some(files)}; it should be model.safetensors"
        yield Finding("warning", "file-name", text, changes if single else ())
    elif all(_SHARD.fullmatch(f) for f in files) and not look.opened.source.read_json(INDEX):
        where = {name: tensors.file_of(name) for name in sorted(tensors)}
        content = {"metadata": {"total_size": tensors.nbytes}, "weight_map": where}
        text = f"there is no {INDEX}, without which transformers finds no shards"
        yield Finding("error", "no-index", text, (Put(INDEX, (), content),))


_BASENAME = "model_file_base_name"


def headers(look: Look) -> Iterator[Finding]:
    """transformers 4 (modeling_utils.py, load_state_dict) refuses files that do not say whose they
    are; 5 does not look."""
    bare = [
        file
        for file in look.opened.tensors.files
        if file.endswith(".safetensors")
        and (read_header(look.opened.source.folder / file).get("__metadata__") or {}).get("format")
        not in ("pt", "tf", "flax", "mlx")
    ]
    if bare:
        text = f"the header of {some(bare)} does not say 'pt', and transformers 4 refuses the file"
        yield Finding("warning", "header", text, tuple(Header(file) for file in bare))


def leaks(look: Look) -> Iterator[Finding]:
    """Paths of the machine that made the model, and texts that it was calibrated with."""
    for file in (CONFIG, *BESIDE, GENERATION, TOKENIZER):
        for path, what in _private(look.opened.source.read_json(file) or {}):
            text = f"{file} holds {what}: {'.'.join(path)}"
            yield Finding("warning", "leak", text, (Drop(file, path),))


def _private(
    content: dict[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in content.items() if len(above) < _NESTED else ():
        path = (*above, key)
        # optimum/gptq/quantizer.py writes its calibration texts under this name
        if key == "dataset" and (isinstance(value, list) or len(str(value)) > _TEXT_LENGTH):
            yield path, "calibration texts"
        elif key == "auto_map" or _TOKENS.search(key):
            if key == "tokenizer_file" and isinstance(value, str) and _PATH.match(value):
                yield path, "a path of another machine"
        elif isinstance(value, dict):
            yield from _private(value, path)
        elif isinstance(value, str) and _PATH.match(value):
            yield path, "a path of another machine"


def generation(look: Look) -> Iterator[Finding]:
    """Tokens that begin and end a text, or pad it."""
    settings = {**look.config, **(look.opened.source.read_json(GENERATION) or {})}
    vocabulary = look.config.get("vocab_size")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [value]
        if isinstance(vocabulary, int) and any(isinstance(i, int) and i >= vocabulary for i in ids):
            text = f"{key} is {value}, and the vocabulary has {vocabulary} tokens"
            yield Finding("error", "generation", text)
    if look.config and settings.get("eos_token_id") is None:
        text = "no eos_token_id in config.json or generation_config.json: generation does not end"
        yield Finding("warning", "generation", text)
    if look.config and settings.get("pad_token_id") is None:
        yield Finding("note", "generation", "no pad_token_id: batches of prompts need one")


def has_tokenizer(look: Look) -> bool:
    """Whether there is one, of any kind."""
    folder = look.opened.source.folder
    return any((folder / name).exists() for name in _TOKENIZERS) or any(folder.glob("*.tiktoken"))


def has_chat_template(look: Look) -> bool:
    """Whether there is one, in a file of its own or not."""
    folder = look.opened.source.folder
    files = ("chat_template.jinja", "chat_template.json")
    inside = (look.opened.source.read_json(TOKENIZER) or {}).get("chat_template")
    return bool(inside) or any((folder / name).exists() for name in files)


def tokenizer(look: Look) -> Iterator[Finding]:
    """None at all."""
    if not has_tokenizer(look):
        yield Finding("warning", "tokenizer", "there is no tokenizer")
