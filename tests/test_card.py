"""Model cards of every kind: read by the Hub's own classes, and as a user reads them."""

from functools import cache
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from tools import QUICK, quantized, read_json

from quantkit import convert, quantize_awq, quantize_bnb, quantize_gguf, quantize_rtn

MAKERS = {
    "gptq": (None, {}),
    "awq": (
        quantize_awq,
        {key: QUICK[key] for key in ("calib", "calib_seqlen", "check")} | {"refine": "none"},
    ),
    "rtn": (quantize_rtn, {}),
    "bnb": (quantize_bnb, {}),
    "gguf": (quantize_gguf, {"type": "q8_0"}),
}
TITLES = {
    "gptq": "demo, GPTQ 4-bit",
    "awq": "demo, AWQ 4-bit",
    "rtn": "demo, rounded to nearest, 4-bit in gptq",
    "bnb": "demo, bitsandbytes NF4",
    "gguf": "demo, GGUF Q8_0, rounded to nearest",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a method's result, each made once."""

    @cache
    def make(kind: str) -> Path:
        maker, settings = MAKERS[kind]
        if maker is None:
            return quantized()
        return maker("demo", tmp_path_factory.mktemp("cards") / kind, **settings).folder

    return make


@pytest.mark.parametrize("kind", MAKERS)
def test_a_card_of_every_method(made, kind):
    text = (made(kind) / "README.md").read_text("utf-8")
    card = ModelCard(text)
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert data["license"] == "apache-2.0" and data["language"] == ["en", "ja"]
    assert data["library_name"] == ("gguf" if kind == "gguf" else "transformers")
    assert data["pipeline_tag"] == "text-generation"
    assert {"quantkit", "rtn" if kind == "gguf" else kind} <= set(data["tags"])
    lines = card.content.splitlines()
    assert lines.count(f"# {TITLES[kind]}") == 1
    assert sum(line.startswith("# ") for line in lines) == 1
    sizes = next(line for line in lines if line.startswith("| weights on disk |"))
    assert "| 10.5 MB |" in sizes
    assert not {"None", "{}", "[]", "nan"} & {cell.strip() for cell in text.split("|")}
    assert text.count("```") % 2 == 0


def test_a_card_of_a_conversion(made, tmp_path):
    out = convert(str(made("gptq")), "gguf:q4_0", tmp_path / "out").folder
    card = ModelCard((out / "README.md").read_text("utf-8"))
    assert "# demo, GPTQ 4-bit in GGUF Q4_0" in card.content
    assert "converted to gguf:q4_0 without changing a number" in card.content
    assert read_json(out / "quantkit.json")["file"] in card.content
