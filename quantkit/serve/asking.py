"""One request's way: fields -> token ids -> jobs -> answers -> JSON."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from quantkit.core.sampling import SEEDS, Sampling
from quantkit.errors import QuantkitError
from quantkit.serve.answer import Answer, Piece, Writer
from quantkit.serve.bodies import DONE, Form, event, usage
from quantkit.serve.engine import Dead, Job
from quantkit.serve.errors import Refused, error_body
from quantkit.serve.metrics import Metrics
from quantkit.serve.model import Served
from quantkit.serve.schemas import CHOICES, ChatRequest, CompletionRequest


@dataclass
class Asking:
    """A request that an engine has taken up: ``prompt`` tokens, and an answer for every choice."""

    served: Served
    form: Form
    metrics: Metrics
    prompt: int
    answers: list[Answer]
    started: float

    async def whole(self) -> dict[str, Any]:
        """The body of an answer in one. Raises Refused when the engine or a text fails."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._all(answer)) for answer in self.answers]
        except* Dead as errors:
            raise Refused(503, self._failure(errors.exceptions[0])) from errors
        finally:
            self._finished()
        choices = [task.result() for task in tasks]
        return self.form.whole(choices, self._counted())

    async def events(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events."""
        try:
            if self.form.chat:
                for index in range(len(self.answers)):
                    yield event(self.form.opening(index))
            async for index, piece in self._merged():
                for body in self.form.part(index, piece):
                    yield event(body)
            if include_usage:
                yield event(self.form.counted(self._counted()))
            yield DONE
        except Dead as error:
            yield event(error_body(503, self._failure(error)))
        finally:
            self._finished()

    def _failure(self, error: BaseException) -> str:
        name = self.served.name
        return f"{name} failed: {error}" if str(error) else f"the engine of {name} failed"

    async def _all(self, answer: Answer) -> list[Piece]:
        return [piece async for piece in self._timed(answer)]

    async def _timed(self, answer: Answer) -> AsyncIterator[Piece]:
        """Its pieces; when the first comes is noted."""
        first = True
        async for piece in answer.pieces():
            if first:
                self._observe(self.metrics.first_token)
            first = False
            yield piece

    async def _merged(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all answers as they come, with the number of the choice."""
        ready: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

        async def pass_on(index: int, answer: Answer) -> None:
            try:
                async for piece in self._timed(answer):
                    ready.put_nowait((index, piece))  # stop strings wait for no reader
            finally:
                ready.put_nowait((index, None))

        tasks = [asyncio.create_task(pass_on(*one)) for one in enumerate(self.answers)]
        try:
            for _ in tasks:
                while (one := await ready.get())[1] is not None:
                    yield one  # type: ignore[misc]
            await asyncio.gather(*tasks)  # raises what they raised
        finally:
            for task in tasks:
                task.cancel()

    def _counted(self) -> dict[str, int]:
        return usage(self.prompt, sum(answer.count for answer in self.answers))

    def _finished(self) -> None:
        for answer in self.answers:
            answer.stream.cancel()
        counted = self._counted()
        self.metrics.prompt_tokens.labels(self.served.name).inc(counted["prompt_tokens"])
        self.metrics.generation_tokens.labels(self.served.name).inc(counted["completion_tokens"])
        self._observe(self.metrics.seconds)

    def _observe(self, histogram: Any) -> None:
        histogram.labels(self.served.name).observe(perf_counter() - self.started)


async def ask(request: ChatRequest | CompletionRequest, served: Served, metrics: Metrics) -> Asking:
    """Hand ``request`` to the engine. Raises Refused with the reason when it cannot be."""
    started = perf_counter()
    if chat := isinstance(request, ChatRequest):
        prompts = await _messages(request, served)
    else:
        prompts = await _texts(request, served)
    sampling, choices = served.sampling(request.sampling()), request.n or 1
    if len(prompts) * choices > CHOICES:
        raise Refused(400, f"n times prompts is more than {CHOICES}", param="n")
    jobs, field = [], "messages" if chat else "prompt"
    for ids in prompts:
        if not ids:
            raise Refused(400, "the prompt is empty", param=field)
        budget = served.budget(len(ids), request.budget, field)
        each = (_choice(sampling, i) for i in range(choices))
        jobs += [Job(ids, settings, budget, request.told) for settings in each]
    streams = served.submit(jobs)
    vocabulary = served.vocabulary
    stops = [*request.stops, *(vocabulary.stop if chat else ())]
    answers = [Answer(stream, Writer(vocabulary.decode, stops)) for stream in streams]
    form = Form.of(chat, served.name, vocabulary)
    return Asking(served, form, metrics, sum(map(len, prompts)), answers, started)


def _choice(sampling: Sampling, index: int) -> Sampling:
    """Every choice has a seed of its own; the first that of the request."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % SEEDS)


async def _messages(request: ChatRequest, served: Served) -> list[list[int]]:
    try:
        return [await served.vocabulary.chat([one.plain() for one in request.messages])]
    except QuantkitError as error:
        hint = f"; {error.hint}" if error.hint else ""
        raise Refused(400, error.message + hint, param="messages") from error


async def _texts(request: CompletionRequest, served: Served) -> list[list[int]]:
    found = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            found.append(await served.vocabulary.encode(prompt))
            continue
        size = served.vocabulary.size
        if max(prompt) >= size:
            raise Refused(400, f"the model has token ids below {size}", param="prompt")
        found.append(prompt)
    return found
