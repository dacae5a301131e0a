"""What people do with such models, at small scale: the five uses that quantkit was made for, with
the repositories' layouts as they lie on the Hub, and through transformers' own pipeline."""

import csv

import pytest
from checkpoints import as_legacy
from tools import QUICK, command, model, quantized
from transformers import pipeline

import quantkit
from quantkit.runtime.engine import open_engine
from quantkit.workflows.conversation import Conversation, open_conversation
from quantkit.workflows.generate import Wanted

WIDE = {"hidden_size": 128, "intermediate_size": 256}
GREEDY = {"temperature": 0, "max_new_tokens": 12}
SYNTHIA = "SYSTEM: You are a helpful assistant.\nUSER: What is a prime number?\nASSISTANT:"


def test_japanese_chat_with_a_legacy_gptq_repository(tmp_path):
    """A GPT-NeoX as AutoGPTQ wrote it, found by its base name; every answer goes on until the model
    ends it, over several turns."""
    source = model("gpt_neox", **WIDE, max_position_embeddings=160)
    folder = tmp_path / "weblab-10b-instruction-sft-GPTQ"
    folder.mkdir()
    for name, raw in as_legacy(quantized(source)).items():
        (folder / name).write_bytes(raw)
    assert (folder / "gptq_model-4bit-128g.safetensors").exists()
    chat = open_conversation(
        str(folder),
        model_basename="gptq_model-4bit-128g",
        template="weblab",
        until_eos=True,
        max_new_tokens=8,
        temperature=0.7,
        top_p=0.9,
        seed=0,
    )
    said = []
    for turn in ("日本の首都はどこですか。", "人口は?", "名物は?"):
        said.append("".join(chat.say(turn)))
        assert chat.answer.reason in ("end", "stop", "context")
        assert "### 指示:" not in said[-1]
    assert any(said) and chat.dropped > 0  # three turns are more than 160 tokens
    prompt = chat._engine.decode(chat.answer.prompt)
    assert prompt.endswith("### 指示:\n名物は?\n\n### 応答:")


def test_a_list_of_questions_to_a_branch_of_a_gptq_repository(hub, tmp_path):
    """Llama, act-order, from a branch of a repository: answers into a CSV, and by a pipeline."""
    branch = "gptq-4bit-32g-actorder_True"
    folder = quantized(group=32, act_order="group")
    hub.add("TheBloke/demo-GPTQ", as_legacy(folder), "main")
    hub.add("TheBloke/demo-GPTQ", as_legacy(folder), branch)
    questions, out = tmp_path / "questions.csv", tmp_path / "answers.csv"
    asked = ["日本の首都はどこですか。", "Who wrote it?", "山と川"]
    questions.write_text("question\n" + "\n".join(asked) + "\n", "utf-8")
    given = ["generate", "TheBloke/demo-GPTQ", "--revision", branch, "--in", str(questions)]
    given += ["--out", str(out), "--template", "llama-2", "--stop", "\n", "-t", "0", "-n", "12"]
    assert command(*given, "--dtype", "float32") == 0
    rows = list(csv.DictReader(out.read_text("utf-8").splitlines()))
    assert [row["question"] for row in rows] == asked
    loaded, tokenizer = quantkit.load(str(folder), dtype="float32")
    pipe = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
    for row in rows:
        made = pipe(
            f"[INST] {row['question']} [/INST]",
            max_new_tokens=12,
            do_sample=False,
            return_full_text=False,
        )
        text = made[0]["generated_text"].partition("\n")[0].strip()
        assert row["answer"] == text.rstrip("\ufffd")
        assert not row["error"]


def test_awq_streaming_with_sampling_settings(tmp_path):
    quick = {name: value for name, value in QUICK.items() if name != "fast"}
    quantkit.quantize_awq("demo", tmp_path / "awq", refine="none", **quick)
    loaded, tokenizer = quantkit.load(str(tmp_path / "awq"))
    settings = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}

    def streamed(seed: int) -> list[str]:
        pieces = quantkit.stream_generate(
            loaded,
            tokenizer,
            "Tell me about rivers.",
            template="deepseek",
            max_new_tokens=24,
            seed=seed,
            **settings,
        )
        return list(pieces)

    first = streamed(1)
    assert len(first) > 4
    assert streamed(1) == first != streamed(2)


def test_nf4_with_double_quantization_and_bf16_compute(tmp_path):
    quantkit.quantize_bnb(
        "demo", tmp_path / "nf4", type="nf4", double_quant=True, compute_dtype="bf16"
    )
    loaded, tokenizer = quantkit.load(str(tmp_path / "nf4"), dtype="float32")

    def generate_text(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        made = loaded.generate(**ids, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(made[0, ids.input_ids.shape[1] :], skip_special_tokens=True)

    found = quantkit.generate(
        str(tmp_path / "nf4"),
        "What is a prime number?",
        system="You are a helpful assistant.",
        template="synthia",
        dtype="float32",
        **GREEDY,
    )
    assert found.text == generate_text(SYNTHIA).rstrip("\ufffd")
    assert found.tokens == 12


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_gguf_streaming_on_a_cpu_without_naming_a_class(tmp_path, engine):
    quantkit.quantize_gguf("demo", tmp_path / "gguf", type="q4_0", **QUICK)
    file = next((tmp_path / "gguf").glob("*.gguf"))
    pieces: list[str] = []
    found = quantkit.generate(
        str(file),
        "Once upon a time",
        chat=False,
        engine=engine,
        device="cpu",
        write=pieces.append,
        **GREEDY,
    )
    assert len(pieces) > 4 and "".join(pieces) == found.text
    chat = Conversation(open_engine(str(file), engine=engine), Wanted(**GREEDY))
    assert "".join(chat.say("日本の首都はどこですか。"))


def test_langchain():
    """The example of docs/generate.md."""
    langchain = pytest.importorskip("langchain_huggingface", reason="no langchain-huggingface")
    loaded, tokenizer = quantkit.load("demo", dtype="float32")
    pipe = pipeline(
        "text-generation",
        model=loaded,
        tokenizer=tokenizer,
        max_new_tokens=12,
        do_sample=False,
        return_full_text=False,
    )
    llm = langchain.HuggingFacePipeline(pipeline=pipe)
    found = quantkit.generate("demo", "Once upon a time", chat=False, dtype="float32", **GREEDY)
    assert llm.invoke("Once upon a time").rstrip("\ufffd") == found.text
