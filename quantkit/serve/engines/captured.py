"""Any transformers model on a GPU whose step can be captured: many texts, no Python between layers.

Every turn begins a step of all running texts, and behind it a piece of a new prompt, so that a long
prompt delays everybody else by one piece at a time. Then it looks at the tokens of a step that was
begun some turns before: the GPU has the next ones to do while tokens become text and are sent. The
end of a text is noticed late by as many steps, and what came behind it is dropped.

Keys and values of all texts share one cache, which is allocated at the start. A text has a stretch
of it for all that it may become, so nothing that runs can run out of it. Where free places lie
apart, the stretches are moved together.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, takewhile
from time import perf_counter
from typing import Any

import torch

from quantkit.runtime.device import sent
from quantkit.runtime.draw import Draw
from quantkit.runtime.follow import Arriving
from quantkit.runtime.kernels import attend
from quantkit.runtime.places import Places, Stretch
from quantkit.runtime.rows import Rows, attempt
from quantkit.serve.engine import Finish, Job, Limits, Load, Stream, Token
from quantkit.serve.engines import room
from quantkit.serve.engines.logprobs import Numbers, Told
from quantkit.serve.worker import Delivery

AHEAD = 2  # steps that are begun before the tokens of one are looked at
PIECE = 1024  # tokens of prompts that are read in one turn, all texts together


@dataclass(eq=False)
class _Text:
    """A text, and its places in the cache.

    read   tokens of its prompt that are there; the last one is for its first step
    begun  steps that compute a token of it
    count  tokens that came out
    gone   nothing more of it is given out
    """

    stream: Stream
    stretch: Stretch
    read: int = 0
    begun: int = 0
    count: int = 0
    gone: bool = False

    @property
    def job(self) -> Job:
        return self.stream.job

    @property
    def first(self) -> int:
        return self.stretch.first

    def part(self, start: int, stop: int) -> list[int]:
        """Tokens of its prompt that are read; the last one is not."""
        return self.job.prompt[start : min(stop, len(self.job.prompt) - 1)]

    @property
    def through(self) -> bool:
        """Whether all of its prompt was read that is."""
        return self.read == len(self.job.prompt) - 1

    @property
    def held(self) -> int:
        """Places of it that have keys and values, or will have before anything else is done."""
        return self.read + self.begun

    @property
    def goes_on(self) -> bool:
        """Whether another step computes a token of it."""
        return not self.gone and self.begun < self.job.max_tokens


@dataclass(frozen=True)
class _Coming:
    """A step that was begun: its texts, row by row, their tokens, and what is told of them; or the
    reading of a piece, with no texts."""

    texts: list[_Text]
    tokens: Arriving
    numbers: Numbers | None


class CapturedBackend:
    """``model`` from the one loader. ``ends``: the tokens that end a text; ``context``: tokens of a
    text at most; ``rows``: texts that run together; ``places``: tokens of all of them. ``note`` is
    told what takes its time. Raises NotCaptured with the reason for a model, or a machine, where a
    step cannot be captured, and UsageError when there is no memory for so many tokens."""

    name = "torch"

    def __init__(
        self,
        model: Any,
        ends: frozenset[int],
        *,
        context: int,
        rows: int,
        places: int,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        room.refuse_more_than_fits(model, places)
        self._ends, self.rows = ends, rows
        self._model = model  # the rows have no hold of it
        self._places = Places(places)
        self.limits = Limits(min(context, places))
        sizes, started = sizes_up_to(rows), perf_counter()
        note(f"capturing a step for {', '.join(map(str, sizes))} texts (CUDA graphs)")
        with attempt(model):
            self._step = Rows(model, rows, longest=self.limits.context, places=places)
            if attend.runs_on(model.device) and not self._step.direct:
                raise ValueError("its attention is of another kind than quantkit's kernel computes")
            self._step.capture(sizes)
            self._warm_up()
        note(
            f"captured in {perf_counter() - started:.1f} s; keys and values of {places:,} tokens "
            f"take {self._step.cache.bytes / 1e9:.1f} GB"
        )
        self._device = model.device
        self._clear()

    def _clear(self) -> None:
        self._texts: list[_Text] = []  # all that are not gone
        self._new: list[_Text] = []  # nothing of them was read
        self._reading: list[_Text] = []  # begin at the same token
        self._running: list[_Text] = []  # row by row
        self._coming: deque[_Coming] = deque()
        self._draw = Draw([], [], self._device)
        self._told = Told([], self._device)

    def _warm_up(self) -> None:
        """Compile and choose what prompts of any length need, before one comes."""
        for tokens in (PIECE, 256, 40, 24, 12):
            if tokens < self.limits.context:
                self._step.read([[0] * tokens], 0, [0])
                self._step.read([[0]], tokens, [0])

    @property
    def busy(self) -> bool:
        return bool(self._texts or self._coming)

    def admits(self, job: Job) -> bool:
        left = self._places.total - self._places.used
        return len(self._texts) < self.rows and _size(job) <= left

    @torch.inference_mode()
    def add(self, stream: Stream) -> None:
        stretch = self._places.take(_size(stream.job))
        if stretch is None:
            self._close_up()
            stretch = self._places.take(_size(stream.job))
        assert stretch is not None, "not admitted"
        text = _Text(stream, stretch)
        self._texts.append(text)
        self._new.append(text)

    @torch.inference_mode()
    def turn(self) -> list[Delivery]:
        cancelled = [text for text in self._texts if text.stream.cancelled]
        for text in cancelled:
            self._end(text)
        begun = self._begin()
        if self._read() and not begun:
            # what is read ahead is limited as steps are, for the sake of whoever comes next
            self._coming.append(_Coming([], Arriving(self._step.length[:1]), None))
            begun = True
        deliveries: list[Delivery] = [(text.stream, [], "stop") for text in cancelled]
        if self._coming and (len(self._coming) > AHEAD or not begun):
            deliveries += self._arrived(self._coming.popleft())
        return deliveries

    def load(self) -> Load:
        return Load(len(self._texts), 0, self._places.used, self._places.total)

    def close(self) -> None:
        self._clear()

    def _end(self, text: _Text) -> None:
        """Nothing more of it is given out, and others may have its places: the GPU is done with
        what was begun for it before it begins anything of theirs."""
        text.gone = True
        self._texts.remove(text)
        self._places.give(text.stretch)

    def _close_up(self) -> None:
        """Make one gap of what is free."""
        texts = {text.stretch: text for text in self._texts}
        for stretch, before in self._places.close_up():
            self._step.cache.move(before, stretch.first, texts[stretch].held)
        if self._running:
            firsts = torch.tensor([text.first for text in self._running])
            self._step.first[: len(firsts)] = sent(firsts, self._device)

    def _begin(self) -> bool:
        """Begin the next step of all texts that go on, if any do."""
        stay = [row for row, text in enumerate(self._running) if text.goes_on]
        if len(stay) < len(self._running):
            self._step.keep(stay)
            self._draw.keep(stay)
            self._run([self._running[row] for row in stay])
        if not self._running:
            return False
        logits = self._step.step(len(self._running))
        tokens = self._draw(logits)
        self._step.token[: len(tokens)] = tokens
        numbers = self._told(logits, tokens)
        self._coming.append(_Coming(self._running, Arriving(tokens), numbers))
        for text in self._running:
            text.begun += 1
        return True

    def _read(self) -> bool:
        """Read a piece of new prompts, if there are any; those that are through with it run from
        the next step on."""
        self._reading = [text for text in self._reading if not text.gone]
        if not self._reading:
            self._reading, self._new = _few([text for text in self._new if not text.gone])
        texts = self._reading
        if not texts:
            return False
        before = texts[0].read
        parts = [text.part(before, before + PIECE) for text in texts]
        self._step.read(parts, before, [text.first for text in texts])
        for text, part in zip(texts, parts):
            text.read += len(part)
        if all(text.through for text in texts):
            self._join(texts)
            self._reading = []
        return True

    def _join(self, texts: list[_Text]) -> None:
        prompts = [text.job.prompt for text in texts]
        self._step.seat(
            len(self._running),
            [text.first for text in texts],
            [text.read for text in texts],
            [prompt[-1] for prompt in prompts],
        )
        self._draw.join([text.job.sampling for text in texts], prompts)
        self._run(self._running + texts)

    def _run(self, texts: list[_Text]) -> None:
        self._running = texts
        self._told = Told([text.job for text in texts], self._device)

    def _arrived(self, step: _Coming) -> list[Delivery]:
        ids = step.tokens.numbers()
        told = step.numbers.tokens(ids) if step.numbers else {}
        return [
            self._delivery(text, told.get(row) or Token(ids[row]))
            for row, text in enumerate(step.texts)
            if not text.gone
        ]

    def _delivery(self, text: _Text, token: Token) -> Delivery:
        text.count += 1
        ended = token.id in self._ends
        finish: Finish | None = "stop" if ended else None
        if not ended and text.count == text.job.max_tokens:
            finish = "length"
        if finish:
            self._end(text)
        return text.stream, [] if ended else [token], finish


def sizes_up_to(rows: int) -> list[int]:
    """Numbers of texts that a step is captured for: powers of two, and the largest."""
    return [*takewhile(lambda size: size < rows, (1 << i for i in count())), rows]


def _size(job: Job) -> int:
    return len(job.prompt) + job.max_tokens


def _few(texts: list[_Text]) -> tuple[list[_Text], list[_Text]]:
    """The first texts, as many as make one piece when all are as long as the longest; the rest."""
    longest = 0
    for number, text in enumerate(texts):
        longest = max(longest, len(text.job.prompt))
        if number and longest * (number + 1) > PIECE:
            return texts[:number], texts[number:]
    return texts, []
