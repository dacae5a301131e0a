"""What transformers 5 calls rope_parameters is also written as earlier readers know it."""

import json

import pytest
import tiny
from transformers import AutoConfig

from quantkit.formats.older_names import with_older_names
from quantkit.workflows.convert import convert
from quantkit.workflows.quantize import quantize

SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("config", "older"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        (
            {"rope_parameters": SCALED},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            },
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4}},
            {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
        ),
        (
            {
                "model_type": "gpt_neox",
                "rope_parameters": {"rope_theta": 2e4, "partial_rotary_factor": 1.0},
            },
            {"rotary_emb_base": 2e4, "rotary_pct": 1.0},
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 1e4,
            },
        ),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 7.0}),
        ({"rotary_pct": 1.0}, {"rotary_pct": 1.0}),
        ({"rope_parameters": None}, {}),
    ],
)
def test_the_older_names_say_the_same(config, older):
    kept = {key: value for key, value in config.items() if key != "rope_scaling"}
    assert with_older_names(config) == {**older, **kept}


@pytest.mark.parametrize("architecture", sorted(tiny.ARCHITECTURES))
def test_transformers_reads_the_same_configuration(architecture, tmp_path):
    folder = tiny.build(architecture, tmp_path / "model")
    before = AutoConfig.from_pretrained(folder).to_dict()
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(with_older_names(config)), "utf-8")
    after = AutoConfig.from_pretrained(folder).to_dict()
    assert after.get("rope_parameters") == before.get("rope_parameters")


def test_what_is_quantized_and_converted_says_both(tmp_path):
    source = tiny.build(
        "llama",
        tmp_path / "source",
        tokenizer=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    quantize(
        str(source),
        tmp_path / "gptq",
        group=32,
        fast=True,
        calib_rows=1,
        calib_seqlen=32,
        check=False,
    )
    convert(str(tmp_path / "gptq"), "mlx", tmp_path / "mlx")
    for name in ("gptq", "mlx"):
        config = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
