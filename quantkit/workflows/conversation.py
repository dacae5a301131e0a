"""``quantkit chat``: what was said so far, and the next answer.

Every turn is put through the template from the beginning; the engine notices that the tokens begin
as before and computes only what is new.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.core.checkpoint import read_json, write_json
from quantkit.core.unicode import refuse_halves
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.engine import Engine, open_engine
from quantkit.runtime.prompts import Prompts, asked
from quantkit.runtime.stream import Answer
from quantkit.runtime.templates import Message
from quantkit.workflows.generate import Wanted

_ROLES = ("system", "user", "assistant")
_LEAST = 64  # tokens that an answer must have room for, or a quarter of the context


class Conversation:
    """A chat with the model of ``engine``. Raises UsageError when it has no chat template and
    ``wanted`` names none.

    messages  all that was said, oldest first
    answer    the last answer: its text, tokens and why it ended
    dropped   turns that the last prompt left out because the context is full
    """

    def __init__(self, engine: Engine, wanted: Wanted) -> None:
        self._engine, self._wanted = engine, wanted
        self._prompts = Prompts(engine, wanted.template, chat=True)
        self._sampling = wanted.sampling(engine.own_settings)
        self._asked = 0
        self.messages: list[Message] = []
        self.answer: Answer | None = None
        self.dropped = 0
        if wanted.system:
            self.set_system(wanted.system)

    def say(self, text: str) -> Iterator[str]:
        """The answer to ``text``, piece by piece. What was shown of it is part of the conversation,
        also when it is left in the middle. Raises UsageError when even this turn alone does not fit
        into the context; the conversation is then as before."""
        self.messages += asked(text)
        try:
            ids = self._fitting()
        except QuantkitError:
            self.messages.pop()
            raise
        return self._answering(ids)

    def again(self) -> Iterator[str]:
        """Another answer to what was said last."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no answer yet that could be made again")
        last = self.messages.pop()
        try:
            ids = self._fitting()
        except QuantkitError:
            self.messages.append(last)
            raise
        return self._answering(ids)

    def undo(self) -> str:
        """Forget the last turn -> what was said in it."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise UsageError("there is nothing to undo")
        said = self.messages[users[-1]]["content"]
        del self.messages[users[-1] :]
        return said

    def set_system(self, text: str) -> None:
        """Another system message; an empty one is none."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def save(self, path: Path) -> None:
        """Write the conversation to a JSON file. Raises QuantkitError when that fails."""
        try:
            write_json(path, {"messages": self.messages})
        except OSError as error:
            raise QuantkitError(f"{path} cannot be written ({error.strerror})") from error

    def load(self, path: Path) -> None:
        """Go on with what was saved. Raises QuantkitError when it is no conversation."""
        try:
            content = read_json(path)
        except (ValueError, OSError) as error:
            raise QuantkitError(f"{path} holds no conversation ({error})") from error
        found = content.get("messages") if isinstance(content, dict) else None
        if not isinstance(found, list) or not _in_turns(found):
            raise QuantkitError(f"{path} holds no conversation", "load what /save has written")
        for message in found:
            refuse_halves(message["content"])
        self.messages = [{key: m[key] for key in ("role", "content")} for m in found]

    def _answering(self, ids: list[int]) -> Iterator[str]:
        seed = self._sampling.seed
        sampling = replace(self._sampling, seed=None if seed is None else seed + self._asked)
        self._asked += 1
        stop = (*self._wanted.stop, *self._prompts.stop)
        answer = Answer(self._engine, ids, sampling, self._wanted.budget, stop)
        self.answer = answer
        message = {"role": "assistant", "content": ""}
        self.messages.append(message)
        for piece in answer:
            message["content"] = answer.text.strip()
            yield piece

    def _fitting(self) -> list[int]:
        """The prompt, without the oldest turns where the context has no room for all."""
        context = self._engine.context
        room = context - min(_LEAST, context // 4)
        system = [message for message in self.messages if message["role"] == "system"]
        turns = [message for message in self.messages if message["role"] != "system"]
        self.dropped = 0
        while True:
            ids = self._prompts.ids([*system, *turns])
            if len(ids) <= room:
                return ids
            if len(turns) == 1:
                raise UsageError(
                    f"this alone has {len(ids)} tokens, and the context is {context}",
                    "say it shorter",
                )
            turns = turns[2:]
            self.dropped += 1


def open_conversation(
    model: str,
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    model_basename: str | None = None,
    note: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Conversation:
    """Load a model and begin. ``settings`` are the fields of Wanted, ``note`` as of open_engine."""
    wanted = Wanted(**settings)
    wanted.check()
    loaded = open_engine(
        model,
        engine=engine,
        device=device,
        dtype=dtype,
        revision=revision,
        model_basename=model_basename,
        note=note,
    )
    return Conversation(loaded, wanted)


def _in_turns(messages: list[object]) -> bool:
    """Whether these are messages: maybe a system one, then user and assistant in turns."""
    if not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") in _ROLES
        for m in messages
    ):
        return False
    roles = [m["role"] for m in messages]  # type: ignore[index]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return len(turns) % 2 == 0 and turns == ["user", "assistant"] * (len(turns) // 2)
