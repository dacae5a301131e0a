"""A second name for the weights, as programs of AutoGPTQ's time open them."""

import pytest
from checkpoints import weights
from tools import QUICK, command, quantized, read_json, sentence

from quantkit import convert, generate, inspect, quantize
from quantkit.errors import UsageError

NAME = "gptq_model-4bit-128g"


def opens(folder) -> None:
    """quantize_config.json says the name, and it opens the same weights."""
    config = read_json(folder / "quantize_config.json")
    assert config["model_file_base_name"] == NAME
    assert {"bits", "group_size", "desc_act", "sym"} <= config.keys()
    alias = folder / f"{NAME}.safetensors"
    assert alias.read_bytes() == (folder / "model.safetensors").read_bytes()
    texts = {
        generate(str(folder), "Once", max_new_tokens=4, temperature=0, model_basename=name).text
        for name in (None, NAME)
    }
    assert len(texts) == 1
    assert not [f for f in inspect(str(folder)).findings if f.level == "error"]


def test_quantize_and_convert_give_it(tmp_path):
    made = quantize("demo", tmp_path / "made", legacy_name=NAME, **QUICK).folder
    opens(made)
    again = convert(str(made), "gptq", tmp_path / "again", legacy_name=NAME).folder
    opens(again)
    found, expected = weights(again), weights(made)
    assert found.keys() == expected.keys()
    assert all(found[name].identical(q) for name, q in expected.items())


def test_where_it_makes_no_sense(tmp_path, capsys):
    assert command("gptq", "demo", "--legacy-name", "../x", "-o", tmp_path / "o") == 2
    assert "is no legacy name" in sentence(capsys.readouterr().err)[0]
    with pytest.raises(UsageError, match="not awq"):
        convert(str(quantized()), "awq", tmp_path / "o", legacy_name=NAME)
    many = {"legacy_name": NAME, "max_shard_size": "2MB"}
    with pytest.raises(UsageError, match="several files"):
        convert(str(quantized()), "gptq", tmp_path / "o", **many)
    with pytest.raises(UsageError, match="several files"):
        quantize("demo", tmp_path / "o", **QUICK, **many)
    assert not list(tmp_path.iterdir())
