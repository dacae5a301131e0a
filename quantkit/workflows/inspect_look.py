"""A checkpoint as it is looked at, and what is found."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from quantkit import __version__, formats
from quantkit.runtime.opened import Folder
from quantkit.workflows.inspect_facts import Linears, Structure
from quantkit.workflows.repair import Change

Level = Literal["error", "warning", "note"]
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
BESIDE = ("quantize_config.json", "quant_config.json")
_SECTIONS = ("quantization_config", "quantization")

# GPT-NeoX calls its head embed_out in files; transformers 5 calls it lm_head in memory, and some
# writers put that name into files (GPTQModel with its disk offload off), where older transformers
# and vLLM do not look (vllm/model_executor/models/gpt_neox.py)
HEADS = {"gpt_neox": ("embed_out.weight", "lm_head.weight")}


@dataclass(frozen=True)
class Finding:
    """``code`` names the kind of finding, for programs."""

    level: Level
    code: str
    text: str
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Look:
    """A folder and everything that was found out about it."""

    opened: Folder
    config: dict[str, Any]
    linears: Linears
    structure: Structure

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @cached_property
    def declarations(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """(file, key...) -> what is said there of the quantization."""
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for section in _SECTIONS:
            if isinstance(self.config.get(section), dict):
                found[CONFIG, section] = self.config[section]
        for file in BESIDE:
            content = self.opened.source.read_json(file)
            if content:
                found[file,] = content
        return found

    @cached_property
    def wanted(self) -> dict[str, Any] | None:
        """The keys of config.json that the tensors call for, as the format's own writer has them;
        None where the linears are of several kinds or could not be read."""
        scheme = self.linears.scheme
        if scheme is None or self.linears.unreadable or len(self.linears.bits) > 1:
            return None
        name = "gptq_v2" if self.linears.convention == "v2" else self.opened.format
        dense = list(self.structure.dense)
        lm_head = self.structure.head == "quantized"
        if self.model_type in HEADS and not lm_head:
            dense.append(HEADS[self.model_type][0].removesuffix(".weight"))
        if self.opened.format == "gptq":
            dense = self.structure.dense  # its rules are for linears inside the blocks
        found = formats.by_name(name).configuration(
            scheme, dense, f"quantkit:{__version__}", lm_head=lm_head
        )
        if self.opened.format == "gptq":
            found["quantization_config"]["desc_act"] = bool(self.linears.ordered)
        return found


def some(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
