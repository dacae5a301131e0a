"""The CPU loop: the same tokens and logits as transformers, whatever the linears are made of, with
single tokens compiled and by calls of torch."""

import pytest
import torch
from tools import model, quantized
from torch.nn.utils import prune

from quantkit.core.sampling import Sampling
from quantkit.runtime import decode_cpu, token_loop
from quantkit.runtime.load import load
from quantkit.runtime.torch_engine import CacheState, TorchEngine

IDS = [5, 17, 99, 3, 250, 31, 8, 120, 64, 77]
GREEDY = Sampling(temperature=0)


@pytest.fixture(params=["compiled", "calls"])
def way(request, monkeypatch):
    if request.param == "calls":
        monkeypatch.setattr(token_loop, "why_not", lambda: "it shall not be")
    elif reason := token_loop.why_not():
        pytest.skip(reason)
    return request.param


def stepwise(state, ids: list[int], at: int) -> torch.Tensor:
    """Logits behind the first ``at`` tokens at once, and then behind every one."""
    with torch.inference_mode():
        return torch.stack([state.compute(ids[:at]), *(state.compute([i]) for i in ids[at:])])


@pytest.mark.parametrize("source", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_logits_are_those_of_transformers(source, at, way):
    changes = {"sliding_window": None} if source == "mistral" else {}
    loaded, _ = load(str(model(source, **changes)), dtype="float32")
    assert decode_cpu.fits(loaded)
    with torch.inference_mode():
        wanted = loaded(torch.tensor([IDS])).logits[0, at - 1 :]
    state = decode_cpu.LlamaState(loaded)
    assert (state._loop is not None) == (way == "compiled")
    found = stepwise(state, IDS, at)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-4)
    with torch.inference_mode():  # the model itself is as it was
        torch.testing.assert_close(loaded(torch.tensor([IDS])).logits[0, at - 1 :], wanted)


@pytest.mark.parametrize("settings", [{}, {"bits": 3}, {"act_order": "group"}, {"sym": False}])
def test_quantized_linears_of_all_kinds(settings, way):
    folder = str(quantized("demo", **settings))
    loaded, tokenizer = load(folder, dtype="bfloat16")
    exact, _ = load(folder, dtype="float32")
    ids = tokenizer.encode("日本の首都は東京です。")
    with torch.inference_mode():
        wanted = exact(torch.tensor([ids])).logits[0, 1:]
        theirs = loaded(torch.tensor([ids])).logits[0, 1:].float()
    state = decode_cpu.LlamaState(loaded)
    plain = settings in ({}, {"sym": False})  # 4 bits, inputs in their order
    assert (state._loop is not None) == (plain and way == "compiled")
    found = stepwise(state, ids, 2).float()
    error, usual = ((x - wanted).norm() / wanted.norm() for x in (found, theirs))
    assert error < 1.3 * usual
    tokens = list(TorchEngine(exact, tokenizer).stream(ids, GREEDY, 12))
    made = exact.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert tokens == made[0, len(ids) :].tolist()


def test_full_precision_in_bfloat16(way):
    """A dense model, and the demo's embeddings as its head."""
    loaded, tokenizer = load("demo", dtype="bfloat16")
    exact, _ = load("demo", dtype="float32")
    ids = tokenizer.encode("日本の首都は東京です。")
    with torch.inference_mode():
        wanted = exact(torch.tensor([ids])).logits[0]
        theirs = loaded(torch.tensor([ids])).logits[0].float()
    state = decode_cpu.LlamaState(loaded)
    assert (state._loop is not None) == (way == "compiled")
    found = stepwise(state, ids, 1).float()
    error, usual = ((x - wanted).norm() / wanted.norm() for x in (found, theirs))
    assert error < 1.3 * usual


def test_float16_is_not_compiled():
    loaded, _ = load("demo", dtype="float16")
    assert decode_cpu.LlamaState(loaded)._loop is None


def test_joined_linears_share_their_memory():
    """And a second engine of the model shares it too."""

    def places(loaded) -> list[int]:
        attention = loaded.model.layers[0].self_attn
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        weights = [part.packed if hasattr(part, "packed") else part.weight for part in parts]
        return [weight.untyped_storage().data_ptr() for weight in weights]

    for source in (str(quantized("demo")), "demo"):
        loaded, tokenizer = load(source, dtype="bfloat16")
        engines = []
        for _ in range(2):
            engines.append(TorchEngine(loaded, tokenizer))
            engines[-1]._decoder.begin([IDS])
            found = places(loaded)
            assert len(set(found)) == 1
            joint = engines[0]._decoder._state._blocks[0].qkv.one
            memory = joint.packed if hasattr(joint, "packed") else joint.weight
            assert memory.untyped_storage().data_ptr() == found[0]


def test_a_model_can_be_trained_on():
    """The engine reads it in inference mode, and joins its linears."""
    loaded, tokenizer = load(str(model("llama")), dtype="float32")
    parameters = list(loaded.requires_grad_(True).parameters())
    engine = TorchEngine(loaded, tokenizer)
    list(engine.stream(IDS, GREEDY, 2))
    assert all(a is b and a.requires_grad for a, b in zip(parameters, loaded.parameters()))
    loaded(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    with torch.inference_mode():
        found = decode_cpu.LlamaState(loaded).compute(IDS)
        torch.testing.assert_close(found, loaded(torch.tensor([IDS])).logits[0, -1])
    loaded.load_state_dict({name: t.clone() for name, t in loaded.state_dict().items()})


def test_weights_that_are_made_for_every_call_stay_so():
    loaded, tokenizer = load(str(model("llama")), dtype="float32")
    pruned = loaded.model.layers[0].self_attn.q_proj
    prune.random_unstructured(pruned, "weight", 0.5)
    tokens = list(TorchEngine(loaded, tokenizer).stream(IDS, GREEDY, 6))
    made = loaded.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)
    assert tokens == made[0, len(IDS) :].tolist()


def test_it_grows_and_is_cut(monkeypatch, way):
    monkeypatch.setattr(decode_cpu, "_STEP", 4)
    loaded, _ = load(str(model("llama")), dtype="float32")
    state = decode_cpu.LlamaState(loaded)
    whole = stepwise(decode_cpu.LlamaState(loaded), IDS, 1)
    torch.testing.assert_close(stepwise(state, IDS, 1), whole)
    assert state.cut(3) == 3
    with torch.inference_mode():
        state.compute([9, 9])
        state.cut(3)
        found = state.compute(IDS[3:7])
    torch.testing.assert_close(found, whole[6], atol=1e-5, rtol=1e-4)


def test_growing_that_was_interrupted_is_done_again(monkeypatch, way):
    monkeypatch.setattr(decode_cpu, "_STEP", 4)
    loaded, _ = load(str(model("llama")), dtype="float32")
    whole = stepwise(decode_cpu.LlamaState(loaded), IDS, 1)
    state = decode_cpu.LlamaState(loaded)
    torch.testing.assert_close(stepwise(state, IDS[:4], 1), whole[:4])
    owner = state if state._loop is None else state._loop
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, "hold" if way == "compiled" else "_enlarged", _interrupted)
        state.compute(IDS[4:5])
    with torch.inference_mode():
        found = torch.stack([state.compute([i]) for i in IDS[4:]])
    torch.testing.assert_close(found, whole[4:])


def _interrupted(*given):
    raise KeyboardInterrupt


@pytest.mark.parametrize("source", ["gpt_neox", "mistral", "qwen3", "phi"])
def test_other_models_go_through_transformers(source):
    loaded, tokenizer = load(str(model(source)), dtype="float32")
    assert not decode_cpu.fits(loaded)
    engine = TorchEngine(loaded, tokenizer)
    tokens = list(engine.stream(IDS, GREEDY, 6))
    assert isinstance(engine._decoder._state, CacheState)
    made = loaded.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)
    assert tokens == made[0, len(IDS) :].tolist()
    again = [*IDS[:5], 1, 2]
    fresh = TorchEngine(loaded, tokenizer)
    assert list(engine.stream(again, GREEDY, 6)) == list(fresh.stream(again, GREEDY, 6))


@pytest.mark.parametrize(
    "angles", [{"rope_type": "dynamic"}, {"rope_type": "linear", "partial_rotary_factor": 0.5}]
)
def test_other_angles_are_left_to_transformers(angles):
    loaded, _ = load(str(model("llama")))
    loaded.config.rope_parameters = angles
    assert not decode_cpu.fits(loaded)


def test_what_is_hooked_in_is_not_passed_over():
    loaded, tokenizer = load(str(model("llama")), dtype="float32")
    loaded(torch.tensor([IDS]), output_hidden_states=True)  # for which transformers hooks in itself
    assert decode_cpu.fits(loaded)
    plain = list(TorchEngine(loaded, tokenizer).stream(IDS, GREEDY, 6))
    layer = loaded.model.layers[1]
    hook = layer.mlp.register_forward_hook(lambda module, given, out: -8 * out)
    tokens = list(TorchEngine(loaded, tokenizer).stream(IDS, GREEDY, 6))
    made = loaded.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False)
    assert tokens == made[0, len(IDS) :].tolist() != plain
    hook.remove()
    assert decode_cpu.fits(loaded)
    layer.mlp.forward = lambda x: -8 * type(layer.mlp).forward(layer.mlp, x)
    assert list(TorchEngine(loaded, tokenizer).stream(IDS, GREEDY, 6)) == tokens


def test_a_class_of_somebody_else_is_not_passed_over():
    loaded, _ = load(str(model("llama")), dtype="float32")

    class Louder(type(loaded)):
        pass

    loaded.__class__ = Louder
    assert not decode_cpu.fits(loaded)
