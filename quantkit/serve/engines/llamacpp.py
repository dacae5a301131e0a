"""A GGUF file run by llama.cpp, one text after the other."""

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.runtime.llamacpp import LlamaCpp
from quantkit.serve.engine import Finish, Job, Limits, Load, Stream, Token
from quantkit.serve.worker import Delivery


@dataclass
class _Running:
    stream: Stream
    tokens: Iterator[int]
    count: int = 0


class LlamaCppBackend:
    """``model`` has its own context, which a text and its answer share. Texts wait for each other;
    what two in a row begin with alike is computed once."""

    name = "llama.cpp"
    rows = 1

    def __init__(self, model: LlamaCpp) -> None:
        self._model = model
        self.limits = Limits(model.context, logprobs=False)
        self._running: _Running | None = None

    @property
    def busy(self) -> bool:
        return self._running is not None

    def admits(self, job: Job) -> bool:
        return self._running is None

    def add(self, stream: Stream) -> None:
        job = stream.job
        tokens = self._model.stream(job.prompt, job.sampling, job.max_tokens)
        self._running = _Running(stream, tokens)

    def turn(self) -> list[Delivery]:
        """One token, or as the first one the whole prompt."""
        running = self._running
        if running is None:
            return []
        tokens, finish = ([], "stop") if running.stream.cancelled else self._next(running)
        if finish:
            self._running = None
        return [(running.stream, tokens, finish)]

    def load(self) -> Load:
        return Load(int(self.busy), 0, 0, self.limits.context)

    def close(self) -> None:
        self._running = None
        self._model.close()

    def _next(self, running: _Running) -> tuple[list[Token], Finish | None]:
        token = next(running.tokens)
        running.count += 1
        if token in self._model.end_ids:
            return [], "stop"
        last = running.count == running.stream.job.max_tokens
        return [Token(token)], "length" if last else None
