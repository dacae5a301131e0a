"""What may be asked: every field checked for type and range before anything else looks at it.

Fields that are not listed are ignored, as OpenAI's clients send many. Those that would change the
answer and cannot be honoured are listed with the only values that are harmless. docs/serve.md has
the table.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    field_validator,
    model_validator,
)

from quantkit.core.sampling import LEAST_PENALTY, SEEDS

CHOICES = 16  # prompts times n, in one request


def _utf8(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair, which is no character") from error
    return text


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return value


Text = Annotated[str, Field(strict=True), AfterValidator(_utf8)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]
# of lists without end the first error will do: to tell of a million takes half a minute
Ids = Annotated[
    list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)
]
Count = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]


class _Tolerant(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Part(_Tolerant):
    """A piece of a message; text is all there is."""

    type: Literal["text"]
    text: Text


class Message(_Tolerant):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Tolerant):
    include_usage: StrictBool = False


class ResponseFormat(_Tolerant):
    """Grammars and schemas of a request are not for a server to run."""

    type: Literal["text"]


class Asked(_Tolerant):
    """What both kinds of requests have. None is: as the model's generation_config.json says."""

    model: Annotated[Text, Field(max_length=1024)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=LEAST_PENALTY, le=10)] | None = None
    seed: Annotated[StrictInt, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=CHOICES)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _usage_of_a_stream(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        return self

    @property
    def budget(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """The settings of core/sampling.py that were given."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("top_k") == -1:  # vLLM's and llama.cpp's way to say all
            given["top_k"] = 0
        if "seed" in given:
            given["seed"] %= SEEDS
        return given


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _numbers_of_nothing(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def told(self) -> int | None:
        """How many likely tokens to tell (engine.Job.logprobs)."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Asked):
    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=CHOICES)]
        | Annotated[list[Ids], Field(min_length=1, max_length=CHOICES)]
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @field_validator("echo", mode="before")
    @classmethod
    def _a_real_bool(cls, value: object) -> object:
        if value is not None and not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def told(self) -> int | None:
        return self.logprobs
