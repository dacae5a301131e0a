"""The JSON of answers, whole or in pieces, in OpenAI's two forms: chat and completion."""

import json
from dataclasses import dataclass
from time import time
from typing import Any
from uuid import uuid4

from quantkit.serve.answer import Piece
from quantkit.serve.engine import Token
from quantkit.serve.prompts import Vocabulary


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event. Line ends inside of JSON are escaped, so a body is one line."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """Bodies of one request, of a chat or of a completion."""

    chat: bool
    model: str
    vocabulary: Vocabulary
    id: str
    created: int

    @classmethod
    def of(cls, chat: bool, model: str, vocabulary: Vocabulary) -> "Form":
        prefix = "chatcmpl" if chat else "cmpl"
        return cls(chat, model, vocabulary, f"{prefix}-{uuid4().hex}", int(time()))

    def whole(self, choices: list[list[Piece]], counted: dict[str, int]) -> dict[str, Any]:
        """The answer in one, from all pieces of every choice."""
        body = self._head("chat.completion" if self.chat else "text_completion")
        body["choices"] = [self._choice(i, _joined(pieces)) for i, pieces in enumerate(choices)]
        return body | {"usage": counted}

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of a chat answer, which tells who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._part(index, {"delta": delta, "logprobs": None, "finish_reason": None})

    def part(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A piece of a streamed answer. A chat tells the end in a body of its own."""
        if not self.chat:
            return [self._part(index, self._completed(piece))]
        bodies = []
        if piece.text or piece.tokens:
            delta = {"delta": {"content": piece.text}, "logprobs": self._chat_numbers(piece)}
            bodies.append(self._part(index, delta | {"finish_reason": None}))
        if piece.finish:
            end: dict[str, Any] = {"delta": {}, "logprobs": None, "finish_reason": piece.finish}
            bodies.append(self._part(index, end))
        return bodies

    def counted(self, counted: dict[str, int]) -> dict[str, Any]:
        """The last piece, when it was asked for: no choice, only the usage."""
        return self._head(self._streamed) | {"choices": [], "usage": counted}

    @property
    def _streamed(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _part(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head(self._streamed) | {"choices": [{"index": index, **choice}]}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        if not self.chat:
            return {"index": index, **self._completed(piece)}
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._chat_numbers(piece),
            "finish_reason": piece.finish,
        }

    def _completed(self, piece: Piece) -> dict[str, Any]:
        numbers = None
        if piece.tokens:
            name = self.vocabulary.piece
            numbers = {
                "tokens": [name(token.id) for token in piece.tokens],
                "token_logprobs": [token.logprob for token in piece.tokens],
                "top_logprobs": [{name(i): log for i, log in t.top} for t in piece.tokens],
                "text_offset": list(piece.offsets),
            }
        return {"text": piece.text, "logprobs": numbers, "finish_reason": piece.finish}

    def _chat_numbers(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.tokens:
            return None
        return {"content": [self._number(token) for token in piece.tokens], "refusal": None}

    def _number(self, token: Token) -> dict[str, Any]:
        return {
            **self._named(token.id, token.logprob),
            "top_logprobs": [self._named(*one) for one in token.top],
        }

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self.vocabulary.piece(token)
        whole = None if "\ufffd" in name else list(name.encode())  # null: part of a character
        return {"token": name, "logprob": logprob, "bytes": whole}


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(offset for piece in pieces for offset in piece.offsets),
        pieces[-1].finish,
    )
