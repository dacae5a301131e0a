"""The names that AutoGPTQ-era programs look for: ``gptq_model-4bit-128g.safetensors``, opened by
its ``model_basename``, with quantize_config.json beside it. The same file under a second name."""

import os
import re
import shutil
from pathlib import Path

from quantkit.core.checkpoint import read_json, write_json
from quantkit.errors import UsageError
from quantkit.formats.gptq import CONFIG_FILE

_NAME = re.compile(r"\w[\w.-]*")
_WEIGHTS = "model.safetensors"


def check(name: str | None, format: str) -> None:
    """Raises UsageError for a name that no file can have, or a format that is not GPTQ."""
    if name is None:
        return
    if format not in ("gptq", "gptq_v2"):
        raise UsageError(f"--legacy-name is for GPTQ, not {format}", "leave it out")
    if not _NAME.fullmatch(name) or name.endswith(".safetensors") or name == "model":
        raise UsageError(
            f"'{name}' is no legacy name", "give it without an ending: gptq_model-4bit-128g"
        )


def check_size(name: str | None, nbytes: int, shard: int) -> None:
    """Raises UsageError when the weights would be several files: those programs open one."""
    if name is not None and nbytes > shard:
        raise UsageError(
            "the weights would be several files, and programs that need a legacy name open one",
            f"use --max-shard-size {nbytes // 10**9 + 1}GB",
        )


def add(folder: Path, name: str | None) -> None:
    """The second name, in a folder whose weights are written."""
    if name is None:
        return
    alias = folder / f"{name}.safetensors"
    alias.unlink(missing_ok=True)
    try:
        os.link(folder / _WEIGHTS, alias)
    except OSError:  # a file system without hard links
        shutil.copyfile(folder / _WEIGHTS, alias)
    write_json(
        folder / CONFIG_FILE, {**read_json(folder / CONFIG_FILE), "model_file_base_name": name}
    )
