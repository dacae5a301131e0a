"""Serving with a captured step: texts that come and go are what they are alone.

There is no GPU here, so nothing is captured, but rows, places, draws and steps that run ahead are
the same (tests/test_gpu_decode.py has the rest).
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends import GREEDY, Reader, alone, asked, prompt, served, turn
from serving import demo, running
from tools import model

from quantkit.core.sampling import Sampling
from quantkit.errors import UsageError
from quantkit.runtime import load as load_module
from quantkit.runtime.batch import bytes_per_token
from quantkit.runtime.kernels import attend, small, support
from quantkit.runtime.load import load
from quantkit.runtime.stretches import Stretches
from quantkit.serve.engine import Job, Token
from quantkit.serve.engines import captured, room
from quantkit.serve.engines.captured import AHEAD, CapturedBackend, sizes_up_to
from quantkit.serve.engines.logprobs import with_logprobs
from quantkit.serve.engines.torch import TorchBackend
from quantkit.workflows.serve_models import Settings, open_models

CONTEXT = 96


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Triton's interpreter would take most of the time (tests/test_rows.py lets it)."""

    def keep(key, value, keys, values, at):
        for held, new in ((keys, key), (values, value)):
            held.index_copy_(1, at, new[:, :, 0].transpose(0, 1))

    monkeypatch.setattr(small, "keep", keep)
    monkeypatch.setattr(captured, "PIECE", 16)


@pytest.fixture
def capturing(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(support, "device_why_not", lambda device: None)
    monkeypatch.setattr(captured, "PIECE", 64)


@pytest.fixture(scope="module")
def net():
    return load("demo", dtype="float32")[0]


def backend_of(net, rows=4, places=300, ends=frozenset(), context=CONTEXT) -> CapturedBackend:
    return CapturedBackend(net, ends, context=context, rows=rows, places=places)


def test_texts_of_all_lengths_come_and_go(net):
    """More than there are rows: prompts of one token, of several and of many pieces."""
    backend = backend_of(net)
    lengths = [
        (1, 9),
        (7, 30),
        (60, 12),
        (16, 1),
        (17, 20),
        (3, 40),
        (33, 5),
        (1, 1),
        (49, 25),
        (5, 3),
    ]
    readers = [asked(length, new, seed) for seed, (length, new) in enumerate(lengths)]
    served(backend, readers)
    for reader in readers:
        assert (reader.finish, reader.ids) == ("length", alone(net, reader.job))
    assert (backend.load().running, backend.load().kv_used) == (0, 0)


def test_a_text_fills_the_context_to_its_last_token(net):
    """And the memory: there is no place beyond."""
    backend = backend_of(net, rows=2, places=2 * CONTEXT)
    readers = [asked(CONTEXT - 30, 30, 1), asked(CONTEXT - 1, 1, 2), asked(2, CONTEXT - 2, 3)]
    served(backend, readers)
    for reader in readers:
        assert reader.ids == alone(net, reader.job)


def test_a_text_ends_with_its_last_token_and_nothing_behind_it(net):
    """The steps that ran ahead are dropped, and others may have the row and the places."""
    whole = alone(net, asked(7, 30, 1).job)
    end = whole[11]
    backend = backend_of(net, rows=2, places=90, ends=frozenset([end]))
    readers = [asked(7, 30, 1), asked(4, 25, 2), asked(12, 30, 3), asked(9, 8, 4)]
    served(backend, readers)
    for reader in readers:
        made = alone(net, reader.job)
        stops = end in made
        assert reader.ids == (made[: made.index(end)] if stops else made)
        assert reader.finish == ("stop" if stops else "length")
    assert readers[0].finish == "stop"


def test_steps_run_ahead_of_their_tokens(net, monkeypatch):
    """So many and no more; and not behind the last token of a text."""
    begun, step = [], captured.Rows.step
    monkeypatch.setattr(captured.Rows, "step", lambda s, n: (begun.append(n), step(s, n))[1])
    backend = backend_of(net)
    reader = asked(5, 12)
    backend.add(reader)
    ahead = []
    while backend.busy:
        turn(backend)
        ahead.append(len(begun) - len(reader.tokens))
    assert len(begun) == 12
    assert max(ahead) == AHEAD and ahead[-1] == 0
    assert ahead.count(AHEAD) >= 10


def test_who_is_gone_gets_no_more_and_leaves_at_once(net):
    """While it waits to be read, is read, or runs; those beside it are as they are alone."""
    backend = backend_of(net, rows=4, places=4 * CONTEXT)
    running_one, reading, new, stays = readers = [
        asked(6, 40, 1),
        asked(70, 20, 2),
        asked(5, 20, 3),
        asked(9, 40, 4),
    ]
    for reader in (running_one, stays):
        backend.add(reader)
    for _ in range(8):
        turn(backend)
    for reader in (reading, new):
        backend.add(reader)
    turn(backend)
    assert not reading.tokens and backend.load().running == 4
    for reader in (running_one, reading, new):
        reader.cancelled = True
    heard = len(running_one.tokens)
    turn(backend)
    assert backend.load().running == 1 and backend.load().kv_used == 49
    others = [asked(50, 30, 5), asked(60, 10, 6)]
    served(backend, others)
    assert len(running_one.tokens) == heard and not reading.tokens and not new.tokens
    assert [reader.finish for reader in readers] == ["stop", "stop", "stop", "length"]
    for reader in (stays, *others):
        assert reader.ids == alone(net, reader.job)


def test_nothing_of_a_prompt_is_read_when_its_reader_is_gone(net, monkeypatch):
    """Its places may be another one's by then."""
    read, lengths = captured.Rows.read, []
    backend = backend_of(net)
    monkeypatch.setattr(
        captured.Rows, "read", lambda s, p, *a: (lengths.extend(map(len, p)), read(s, p, *a))[1]
    )
    reading, new, stays = asked(70, 5, 1), asked(9, 5, 2), asked(6, 5, 3)
    for reader in (reading, new, stays):
        backend.add(reader)
    turn(backend)
    assert lengths == [16]
    reading.cancelled = new.cancelled = True
    while backend.busy:
        turn(backend)
    assert lengths == [16, 5]
    assert stays.ids == alone(net, stays.job)


def test_all_are_gone_while_steps_run(net):
    backend = backend_of(net)
    reader = asked(3, 50)
    backend.add(reader)
    for _ in range(4):
        turn(backend)
    reader.cancelled = True
    while backend.busy:
        turn(backend)
    assert reader.finish == "stop" and backend.load().kv_used == 0


def test_a_long_prompt_delays_others_by_a_piece_at_a_time(net):
    backend = backend_of(net)
    running_one, long = asked(4, 60, 1), asked(90, 4, 2)
    backend.add(running_one)
    for _ in range(6):
        turn(backend)
    backend.add(long)
    before = len(running_one.tokens)
    while not long.tokens:
        turn(backend)
    pieces = -(-89 // 16)
    assert len(running_one.tokens) - before >= pieces


def test_no_more_than_so_much_of_a_prompt_is_ahead_of_the_gpu(net):
    """Whoever comes next waits for that."""
    backend = backend_of(net)
    backend.add(asked(90, 2))
    ahead = []
    while backend._reading or backend._new:
        turn(backend)
        ahead.append(len(backend._coming))
    assert ahead == [1, 2, 2, 2, 2, 2]


def test_short_prompts_are_read_together(net, monkeypatch):
    read, pieces = captured.Rows.read, []
    backend = backend_of(net)
    monkeypatch.setattr(
        captured.Rows,
        "read",
        lambda s, p, *a: (pieces.append(list(map(len, p))), read(s, p, *a))[1],
    )
    for length in (4, 5, 8, 3):
        backend.add(asked(length, 5, length))
    while backend.busy:
        turn(backend)
    assert pieces == [[3, 4], [7, 2]]


def test_with_the_kernels_of_a_gpu(monkeypatch):
    """In Triton's interpreter."""
    monkeypatch.undo()
    monkeypatch.setattr(captured, "PIECE", 16)
    monkeypatch.setattr(attend, "runs_on", lambda device: True)
    tiny, _ = load(str(model("llama")), dtype="float32")
    backend = backend_of(tiny, rows=3, places=90, context=64)
    assert backend._step.direct
    lengths = [(9, 4), (1, 5), (40, 3), (5, 6)]
    readers = [
        Reader(Job([i % 250 for i in prompt(length)], GREEDY, new)) for length, new in lengths
    ]
    served(backend, readers)
    for reader in readers:
        assert reader.ids == alone(tiny, reader.job)


# memory


def test_a_text_reserves_all_that_it_may_become(net):
    backend = backend_of(net, rows=4, places=100)
    first = asked(20, 40)
    assert backend.admits(first.job)
    backend.add(first)
    assert not backend.admits(asked(10, 31).job) and backend.admits(asked(10, 30).job)
    backend.add(asked(10, 30))
    assert backend.load().kv_used == backend.load().kv_room == 100
    served(backend, [asked(30, 60, 3)])
    assert backend.load().kv_used == 0


def test_no_more_texts_than_rows(net):
    backend = backend_of(net, rows=2)
    for seed in range(2):
        backend.add(asked(3, 3, seed))
    assert not backend.admits(asked(1, 1).job)


@pytest.mark.parametrize("turns", [1, 4, 9])
def test_free_places_that_lie_apart_are_brought_together(net, turns, monkeypatch):
    """While the texts in between run, are read, or wait."""
    moved, move = [], Stretches.move
    monkeypatch.setattr(Stretches, "move", lambda s, *w: (moved.append(w), move(s, *w))[1])
    backend = backend_of(net, rows=4, places=120)
    short = [asked(5, 15, 1), asked(6, 14, 2)]
    between = [asked(10, 30, 3), asked(20, 20, 4)]
    for reader in (short[0], between[0], short[1], between[1]):
        backend.add(reader)
    for _ in range(turns):
        turn(backend)
    for reader in short:
        reader.cancelled = True
    turn(backend)
    late = asked(8, 30, 5)  # no gap is as large
    assert backend.admits(late.job)
    backend.add(late)
    assert len(moved) == 2
    served(backend, [])
    for reader in (*between, late):
        assert reader.ids == alone(net, reader.job)


def test_a_cache_that_does_not_fit_is_refused(net):
    with pytest.raises(UsageError, match="10,000,000,000 tokens take"):
        backend_of(net, places=10**10)


def test_models_of_a_server_share_the_memory(net, monkeypatch):
    each = bytes_per_token(net)
    monkeypatch.setattr(room, "free", lambda device: 1000 * each)
    assert [room.tokens(net, 10**6, None, models) for models in (1, 2)] == [500, 250]
    assert room.tokens(net, 300, None) == 300
    assert room.tokens(net, 10**6, 2000) == 2000


def test_all_weights_are_in_memory_before_an_engine_takes_the_rest(capturing, monkeypatch):
    done, put, init = [], load_module.put_together, CapturedBackend.__init__

    def loading(*arguments):
        done.append("load")
        return put(*arguments)

    def starting(self, *arguments, **more):
        done.append("start")
        init(self, *arguments, **more)

    monkeypatch.setattr(load_module, "put_together", loading)
    monkeypatch.setattr(CapturedBackend, "__init__", starting)
    settings = Settings(dtype="float32", max_batch=2, context=64)
    models = open_models(["demo", "demo"], ["a", "b"], settings, lambda text: None)
    assert done == ["load", "load", "start", "start"]
    for one in models:
        one.vocabulary.close()
        one.engine.close()


# choosing


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(net):
    settings = [
        Sampling(seed=1),
        Sampling(seed=2, temperature=0.7, top_p=0.9),
        Sampling(seed=3, top_k=20, repetition_penalty=1.3),
        GREEDY,
        Sampling(temperature=0, repetition_penalty=1.5),
    ]
    lonely = []
    for number, one in enumerate(settings):
        reader = asked(6 + number, 15, number, one)
        served(backend_of(net), [reader])
        lonely.append(reader.ids)
    assert len({tuple(ids) for ids in lonely}) == len(settings)
    together = [asked(6 + number, 15, number, one) for number, one in enumerate(settings)]
    others = [asked(3, 4, 50, Sampling(temperature=2.0)), asked(2, 20, 51, Sampling(top_k=4))]
    served(backend_of(net), [others[0], *together[:3], others[1], *together[3:]])
    assert [reader.ids for reader in together] == lonely
    without = [asked(6, 15, 0, Sampling()) for _ in range(2)]
    served(backend_of(net), without)
    assert without[0].ids != without[1].ids


def test_logprobs_of_those_who_ask(net):
    """Of the model's own distribution, also where a penalty or a draw chose."""
    settings = [GREEDY, GREEDY, Sampling(seed=4, repetition_penalty=1.4), Sampling(seed=5)]
    counts = [3, None, 0, 5]
    readers = [
        asked(5 + n, 8 + n, n, one, count) for n, (one, count) in enumerate(zip(settings, counts))
    ]
    served(backend_of(net), readers)
    for reader, count in zip(readers, counts):
        ids = list(reader.job.prompt)
        for token in reader.tokens:
            if count is None:
                assert token == Token(token.id)
                continue
            with torch.no_grad():
                meant = with_logprobs(token.id, net(torch.tensor([ids])).logits[0, -1], count)
            assert token.logprob == pytest.approx(meant.logprob, abs=1e-4)
            assert [i for i, _ in token.top] == [i for i, _ in meant.top]
            logs = [log for _, log in token.top]
            assert logs == pytest.approx([log for _, log in meant.top], abs=1e-4)
            ids.append(token.id)


# behind a server


def test_over_http(net, capturing):
    told = []
    served_model = demo(max_batch=4, queue=20, note=told.append)
    assert any("capturing a step for 1, 2, 4 texts" in line for line in told)
    prompts = [f"{n}番目の村に、" * (1 + n % 3) for n in range(8)]
    with running(served_model) as server:
        assert isinstance(server.models[0].engine._backend, CapturedBackend)

        def ask(text: str) -> dict:
            body = {"prompt": text, "max_tokens": 10 + len(text), "temperature": 0, "logprobs": 1}
            return server.post("/v1/completions", **body).json()["choices"][0]

        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(ask, prompts))
    vocabulary = served_model.vocabulary
    for text, choice in zip(prompts, found):
        ids = vocabulary.tokenizer.encode(text)
        meant = alone(net, Job(ids, GREEDY, 10 + len(text)))
        end = served_model.engine._backend._ends
        kept = meant[: next((i for i, one in enumerate(meant) if one in end), len(meant))]
        assert choice["text"] == vocabulary.decode(kept).rstrip("\ufffd")
        assert len(choice["logprobs"]["tokens"]) == len(kept)


def test_what_cannot_be_captured_is_served_as_before_and_says_so(capturing, monkeypatch):
    told = []
    with running(demo("sliding", str(model("gemma2")), note=told.append)) as server:
        assert isinstance(server.models[0].engine._backend, TorchBackend)
        assert server.post("/v1/completions", prompt=[5, 6], max_tokens=2).status_code == 200
    assert any("called for every step" in line and "Sliding" in line for line in told)

    told.clear()
    monkeypatch.setattr(attend, "runs_on", lambda device: True)
    assert isinstance(
        demo("own", str(model("gptj")), note=told.append).engine._backend, TorchBackend
    )
    assert any("attention is of another kind" in line for line in told)

    def fails(self, sizes):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(captured.Rows, "capture", fails)
    told.clear()
    assert isinstance(demo(note=told.append).engine._backend, TorchBackend)
    assert any("out of ink" in line for line in told)


def test_sizes():
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(8) == [1, 2, 4, 8]
    assert sizes_up_to(24) == [1, 2, 4, 8, 16, 24]
