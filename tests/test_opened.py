"""Any checkpoint is opened by what its tensors are, whatever its files are called and say."""

import itertools
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from checkpoints import (
    CONFIG,
    LEGACY,
    WEIGHTS,
    exactly,
    opened,
    random_weight,
    save,
    weights,
    write,
    write_json,
)
from safetensors.torch import load_file
from tools import command, model, read_json, sentence

import quantkit
from quantkit import formats
from quantkit.core.checkpoint import Checkpoint
from quantkit.core.qweight import Scheme
from quantkit.core.source import Source, resolve
from quantkit.errors import QuantkitError, QuantkitWarning
from quantkit.formats import awq, gptq
from quantkit.runtime.opened import in_block, open_checkpoint
from quantkit.runtime.unpacked import unpacked_skeleton
from quantkit.workflows.convert import convert

SECTION = "quantization_config"
UP = "model.layers.1.mlp.up_proj"
LINEARS = 21  # of the tiny Llama
OLD_NAME = "gptq_model-4bit-128g"


@torch.no_grad()
def logits(folder, **options):
    loaded, _ = quantkit.load(str(folder), dtype="float32", **options)
    ids = torch.randint(2, 8192, (2, 9), generator=torch.Generator().manual_seed(0))
    return loaded(input_ids=ids, use_cache=False).logits


def edit(folder, *keys, file=CONFIG, **values):
    """Change a JSON file, below ``keys``; None takes a key out."""
    content = at = read_json(folder / file)
    for key in keys:
        at = at[key]
    for key, value in values.items():
        at[key] = value
        if value is None:
            del at[key]
    write_json(folder / file, content)


@pytest.fixture
def folder(tmp_path):
    """A GPTQ checkpoint, symmetric, 4 bits in groups of 32."""
    return write(tmp_path / "model")


# every format by its data


EVERY = {
    "gptq": ({}, Scheme(4, 32)),
    "gptq, 3 bits": ({"bits": 3, "zero": (1, 7)}, Scheme(3, 32, False)),
    "gptq_v2": ({"form": "gptq_v2", "zero": (0, 15)}, Scheme(4, 32, False)),
    "gptq, g_idx": ({"ordered": True}, Scheme(4, 32)),
    "awq": ({"form": "awq", "zero": (0, 15)}, Scheme(4, 32, False)),
    "compressed_tensors": ({"form": "compressed_tensors", "bits": 8}, Scheme(8, 32)),
    "mlx": ({"form": "mlx", "bits": 5}, Scheme(5, 32)),
    "bnb": ({"form": "bnb", "grid": "nf4", "group": 64}, Scheme(4, 64, True, "nf4")),
    "bnb, 8 bits": ({"form": "bnb", "bits": 8, "group": -1}, Scheme(8, -1)),
}


@pytest.mark.parametrize("kind", EVERY)
def test_every_format_is_opened_by_its_data(tmp_path, kind):
    options, scheme = EVERY[kind]
    folder = write(tmp_path / "model", **options)
    found = opened(folder)
    assert found.format == options.get("form", "gptq").replace("_v2", "")
    assert len(found.linears) == LINEARS
    for name, packed in found.linears.items():
        q = found.qweight(name)
        width = q.shape[1]
        assert (packed.out, packed.width) == q.shape
        assert packed.scheme.bits == q.scheme.bits == scheme.bits
        assert packed.scheme.width(width) == q.scheme.width(width) == scheme.width(width)
        assert (q.scheme.symmetric, q.scheme.grid) == (scheme.symmetric, scheme.grid)
        names = found.names(name)
        assert names and all(n.startswith(f"{name}.") for n in names)
        assert not any(n in found.dense for n in names)
        survey = found.survey(name)
        assert replace(survey, codes=q.codes).identical(q)
    held = {n for name in found.linears for n in found.names(name)} | set(found.dense)
    assert held == set(load_file(folder / WEIGHTS))
    assert found.model_config["model_type"] == "llama"
    assert {path.name for path in found.files} >= {CONFIG, WEIGHTS}
    assert found.tokenizer().vocab_size > 0


@pytest.mark.parametrize("kind", EVERY)
def test_every_format_loads_and_computes_what_its_codes_mean(tmp_path, kind):
    folder = write(tmp_path / "model", **EVERY[kind][0])
    expected = {name: q.dequantize() for name, q in weights(folder).items()}
    plain = load_file(folder / WEIGHTS)
    dense = opened(folder).dense
    other = tmp_path / "dense"
    shutil.copytree(model("llama"), other)
    tensors = {name: plain[name].float() for name in dense}
    save(tensors | {f"{name}.weight": w for name, w in expected.items()}, other)
    assert torch.allclose(logits(folder), logits(other), atol=2e-4)


@pytest.mark.parametrize("kind", [k for k in EVERY if k not in ("gptq_v2", "gptq, 3 bits", "mlx")])
def test_tensors_are_known_without_a_configuration(tmp_path, kind):
    """All but asymmetric GPTQ v2, whose tensors do not tell, and MLX, whose bits they do not."""
    folder = write(tmp_path / "model", **EVERY[kind][0])
    expected = weights(folder)
    edit(folder, **{SECTION: None})
    (folder / LEGACY).unlink(missing_ok=True)
    found = opened(folder)
    assert found.config == {}
    for name, q in expected.items():
        assert found.qweight(name).identical(q)


def test_mlx_without_a_configuration_is_refused(tmp_path):
    folder = write(tmp_path / "model", "mlx")
    edit(folder, quantization=None, quantization_config=None)
    with pytest.raises(QuantkitError, match=r"does not say the bits .* model\.layers\.0"):
        quantkit.load(str(folder))


def test_tensors_win_over_a_configuration_of_another_method(tmp_path):
    """Only names are believed of it; AWQ's tensors are AWQ's."""
    folder = write(tmp_path / "model", "awq")
    expected = weights(folder)
    said = gptq.configuration(Scheme(8, 128), [], "somebody")
    edit(folder, **said)
    found = opened(folder)
    assert found.format == "awq"
    assert all(found.qweight(name).identical(q) for name, q in expected.items())


@pytest.mark.parametrize(("first", "second"), itertools.permutations(formats.SAFETENSORS, 2))
def test_two_formats_in_one_folder_are_refused(tmp_path, first, second):
    options = {"grid": "nf4", "group": 64} if first == "bnb" else {}
    folder = write(tmp_path / "model", first, **options)
    tensors = load_file(folder / WEIGHTS)
    for name in opened(folder).names(UP):
        del tensors[name]
    form = formats.by_name(second)
    scheme = Scheme(4, 64, True, "nf4") if second == "bnb" else Scheme(4, 32)
    q = random_weight(128, 64, scheme, None, False, 1)
    save(tensors | {f"{UP}.{suffix}": t for suffix, t in form.pack(q).items()}, folder)
    with pytest.raises(QuantkitError) as caught:
        opened(folder)
    message = caught.value.message
    assert "linears in the formats" in message and f"{second} ({UP})" in message
    assert f"{first} (model.layers" in message


@pytest.mark.parametrize("method", ["gptq", "hqq", "fp8", None])
def test_a_method_that_is_not_there_is_named(tmp_path, capsys, method):
    folder = tmp_path / "model"
    shutil.copytree(model("llama"), folder)
    edit(folder, **{SECTION: {"bits": 4} | ({"quant_method": method} if method else {})})
    with pytest.raises(QuantkitError) as caught:
        quantkit.load(str(folder))
    name = method or "an unknown method"
    assert f"says that it is quantized with {name}, and none of its tensors" in caught.value.message
    assert "quantkit reads gptq" in caught.value.hint
    assert command("convert", folder, "--to", "awq", "-o", tmp_path / "out") == 1
    assert name in sentence(capsys.readouterr().err)[0]


def test_a_plain_model_is_dense():
    found = opened(model("llama"))
    assert (found.format, found.linears, found.config) == ("dense", {}, {})
    assert set(found.dense) == set(Checkpoint(model("llama")))


def test_a_linear_that_makes_no_sense_is_named(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"][:1]
    save(tensors, folder)
    with pytest.raises(QuantkitError, match=UP):
        _ = opened(folder).linears


def test_only_linears_of_blocks_stay_quantized(tmp_path):
    """A quantized head (GPTQModel has them) is a plain one here."""
    folder = write(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    q = random_weight(*tensors.pop("lm_head.weight").shape, Scheme(4, 32), None, False, 3)
    save(tensors | {f"lm_head.{suffix}": t for suffix, t in gptq.pack(q).items()}, folder)
    found = opened(folder)
    assert len(found.linears) == LINEARS
    names = set(found.dense)
    assert "lm_head.weight" in names and "lm_head.weight" in found.dense
    assert not any(name.startswith("lm_head.q") for name in names)
    assert found.dense.spec("lm_head.weight").shape == q.shape
    assert torch.equal(found.dense.get("lm_head.weight").double(), exactly(q))
    assert logits(folder).shape == (2, 9, q.shape[0])


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("model.layers.0.mlp.up_proj", True),
        ("transformer.h.11.attn.c_attn", True),
        ("lm_head", False),
        ("model.embed_tokens", False),
        ("model2.head4", False),
    ],
)
def test_what_is_in_a_block(name, inside):
    assert in_block(name) == inside


# names of files


def test_a_legacy_folder(folder):
    """AutoGPTQ of 2023: another file, settings beside config.json, no g_idx."""
    expected, same = logits(folder), weights(folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save({n: t for n, t in tensors.items() if "g_idx" not in n}, folder, f"{OLD_NAME}.safetensors")
    edit(folder, **{SECTION: None})
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True}
    write_json(folder / LEGACY, old)
    found = opened(folder)
    assert found.format == "gptq" and found.config == old
    assert all(found.qweight(name).identical(q) for name, q in same.items())
    assert {path.name for path in found.files} == {CONFIG, LEGACY, f"{OLD_NAME}.safetensors"}
    assert torch.equal(logits(folder), expected)
    assert torch.equal(logits(folder, model_basename=OLD_NAME), expected)


def test_awq_s_own_settings_file(tmp_path):
    """``quant_config.json`` with AutoAWQ's early keys."""
    folder = write(tmp_path / "model", "awq", zero=(1, 15))
    same = weights(folder)
    edit(folder, **{SECTION: None})
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    write_json(folder / "quant_config.json", old)
    found = opened(folder)
    assert found.format == "awq" and found.config == old
    assert all(found.qweight(name).identical(q) for name, q in same.items())


def test_gemv_takes_its_group_size_from_there(tmp_path):
    """Its padding hides how many groups there are."""
    folder = write(tmp_path / "model", "awq", zero=(1, 15))
    same, tensors = weights(folder), load_file(folder / WEIGHTS)
    for name, q in same.items():
        tensors |= {f"{name}.{suffix}": t for suffix, t in gemv(q).items()}
    save(tensors, folder)
    edit(folder, **{SECTION: None})
    with pytest.raises(QuantkitError, match="group size"):
        _ = opened(folder).linears
    write_json(folder / "quant_config.json", {"q_group_size": 32, "w_bit": 4, "zero_point": True})
    found = opened(folder)
    assert all(found.qweight(name).identical(q) for name, q in same.items())


def gemv(q):
    """A row of everything for each output, padded to four words of zero points."""
    out = q.shape[0]
    zero = torch.zeros(out, 32, dtype=torch.int64)
    zero[:, : q.zero.shape[1]] = q.zero
    scale = torch.zeros(out, 32, dtype=torch.float16)
    scale[:, : q.scale.shape[1]] = q.scale

    def packed(values):
        fields = values.reshape(out, -1, 8) << (4 * torch.arange(8))
        return fields.sum(-1).to(torch.uint32).view(torch.int32)

    return {"qweight": packed(q.codes.long()), "qzeros": packed(zero), "scales": scale}


def test_a_basename_chooses_among_files(folder):
    same = weights(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors = {n: t * 2 if n.endswith("scales") else t for n, t in tensors.items()}
    save(tensors, folder, f"{OLD_NAME}.safetensors")
    usual = opened(folder)  # the usual name, where nothing is said
    assert all(usual.qweight(name).identical(q) for name, q in same.items())
    other = open_checkpoint(Source("model", folder), OLD_NAME)
    assert [path.name for path in other.files if path.suffix == ".safetensors"] == [
        f"{OLD_NAME}.safetensors"
    ]
    for name, q in same.items():
        assert torch.equal(other.qweight(name).scale, q.scale * 2)
    assert not torch.equal(logits(folder), logits(folder, model_basename=OLD_NAME))
    (folder / WEIGHTS).rename(folder / "third.safetensors")
    with pytest.raises(QuantkitError) as caught:
        quantkit.load(str(folder))
    assert "third" in caught.value.message and OLD_NAME in caught.value.message
    assert "model_basename" in caught.value.hint


def test_a_wrong_basename_is_told_what_there_is(folder):
    (folder / WEIGHTS).rename(folder / f"{OLD_NAME}.safetensors")
    with pytest.raises(QuantkitError) as caught:
        quantkit.load(str(folder), model_basename="model")
    assert "'model'" in caught.value.message and OLD_NAME in caught.value.message + str(
        caught.value.hint
    )


def test_a_named_safetensors_file(folder):
    expected = logits(folder)
    assert resolve(str(folder / WEIGHTS)).file == WEIGHTS
    assert torch.equal(logits(folder / WEIGHTS), expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_files(folder, shards):
    """``.bin`` files of torch.save, in one or several pieces with an index."""
    expected, same = logits(folder), weights(folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        where = {n: f"pytorch_model-0000{i % shards + 1}-of-00003.bin" for i, n in enumerate(names)}
        for file in set(where.values()):
            torch.save({n: tensors[n] for n in names if where[n] == file}, folder / file)
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": where})
    found = opened(folder)
    assert found.format == "gptq"
    assert len([path for path in found.files if path.suffix == ".bin"]) == shards
    assert all(found.qweight(name).identical(q) for name, q in same.items())
    assert torch.equal(logits(folder), expected)


def test_an_old_pt_file(folder):
    same, tensors = weights(folder), load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / f"{OLD_NAME}.pt")
    assert all(opened(folder).qweight(name).identical(q) for name, q in same.items())


# zero points that are not stored as declared


def quiet(call):
    """What it returns, and the warnings of quantkit on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if w.category is QuantkitWarning]


@pytest.mark.parametrize(("form", "said"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_another_convention_than_declared_is_told_once(tmp_path, form, said):
    """optimum saved v1 tensors beside a configuration that says gptq_v2."""
    folder = write(tmp_path / "model", form)
    expected, told = quiet(lambda: logits(folder))
    assert told == []
    edit(folder, SECTION, checkpoint_format=said)
    found, told = quiet(lambda: logits(folder))
    assert torch.equal(found, expected)
    (text,) = told
    ways = {"gptq": "v1", "gptq_v2": "v2"}
    assert f"stored in GPTQ's way {ways[said]}, and they are those of {ways[form]}" in text
    assert "model says" in text and "inspect" in text
    _, again = quiet(lambda: logits(folder))  # once for each checkpoint that is opened
    assert len(again) == 1
    result, told = quiet(lambda: convert(str(folder), "awq", tmp_path / "out"))
    assert result.exact and len(told) == 1
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_asymmetric_zero_points_are_read_as_declared(tmp_path):
    """The tensors do not tell, so there is nothing to warn of."""
    folder = write(tmp_path / "model", zero=(2, 14))
    before = weights(folder)
    edit(folder, SECTION, checkpoint_format="gptq_v2")
    after, told = quiet(lambda: weights(folder))
    assert told == []
    for name, q in before.items():
        assert torch.equal(after[name].zero, q.zero - 1)


def test_formats_that_only_look_like_gptq_are_refused(folder):
    edit(folder, SECTION, checkpoint_format="marlin")
    with pytest.raises(QuantkitError, match="'marlin' is not read"):
        quantkit.load(str(folder))


# GGUF


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, and the same as a GGUF file."""
    root = tmp_path_factory.mktemp("gguf")
    source = write(root / "source")
    convert(str(source), "gguf:q4_0", root / "out")
    (file,) = (root / "out").glob("*.gguf")
    return source, file


def test_a_gguf_file_and_its_folder(tmp_path, made):
    source, file = made
    expected = weights(source)
    for name in (file, file.parent, shutil.copy(file, tmp_path / "alone.gguf"), tmp_path):
        found = open_checkpoint(resolve(str(name)))
        assert found.format == "gguf" and len(found.linears) == LINEARS
        for linear, q in expected.items():
            assert found.qweight(linear).regrouped(32).identical(q)
        assert torch.equal(logits(name), logits(source))
    assert found.files == [tmp_path / "alone.gguf"]
    assert found.config["quant_method"] == "gguf"


def test_several_gguf_files_have_to_be_told_apart(tmp_path, made):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(made[1], tmp_path / name)
    with pytest.raises(QuantkitError) as caught:
        quantkit.load(str(tmp_path))
    assert "2 GGUF files: a.gguf, b.gguf" in caught.value.message
    assert "name one" in caught.value.hint
    expected = logits(made[0])
    assert torch.equal(logits(tmp_path / "b.gguf"), expected)
    assert torch.equal(logits(tmp_path, model_basename="a"), expected)
    with pytest.raises(QuantkitError):
        quantkit.load(str(tmp_path), model_basename="c")


def test_a_gguf_file_beside_a_model_has_to_be_named(tmp_path, made):
    """A folder with config.json is a model of transformers."""
    source, file = made
    folder = tmp_path / "both"
    shutil.copytree(source, folder)
    shutil.copy(file, folder / "q.gguf")
    assert opened(folder).format == "gptq"
    assert opened(folder / "q.gguf").format == "gguf"


def test_a_gguf_file_that_is_none(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(QuantkitError, match=r"model\.gguf"):
        quantkit.load(str(tmp_path / "model.gguf"))


def test_awq_s_activation_scales_of_one_do_nothing(tmp_path):
    folder = write(tmp_path / "model", "awq", source="gpt_neox")
    names = awq.activation_scale_names(opened(folder).dense)
    assert len(names) == 2
    expected = logits(folder)
    tensors = load_file(folder / WEIGHTS)
    save({name: tensor for name, tensor in tensors.items() if name not in names}, folder)
    assert torch.equal(logits(folder), expected)


def test_awq_s_activation_scales_divide(tmp_path):
    """AutoAWQ's way: what the activation is divided by is in the next linear's weight."""
    folder = write(tmp_path / "model", "awq", source="gpt_neox")
    expected = logits(folder)
    tensors = load_file(folder / WEIGHTS)
    for name in awq.activation_scale_names(tensors):
        tensors[name] = torch.full_like(tensors[name], 2)
        after = name.replace("act.scales", "dense_4h_to_h.scales")
        tensors[after] = tensors[after] * 2
    save(tensors, folder)
    torch.testing.assert_close(logits(folder), expected)
    skeleton = unpacked_skeleton(opened(folder), torch.device("cpu"), torch.float32)
    assert "ScaledActivation" in str(skeleton.model)
    with pytest.raises(QuantkitError, match="no other format has a place"):
        convert(str(folder), "gptq", tmp_path / "out")
