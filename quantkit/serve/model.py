"""A model that is being served: its engine, its vocabulary and what is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import time
from typing import Any

from quantkit.core.sampling import Sampling, chosen
from quantkit.errors import UsageError
from quantkit.serve.engine import Busy, Dead, Engine, Job, Stream
from quantkit.serve.errors import Refused
from quantkit.serve.prompts import Vocabulary


@dataclass(frozen=True)
class Served:
    """``own`` is what the model's generation_config.json says of sampling; ``about`` what is told
    to people: format, size in bytes, and why this engine."""

    name: str
    engine: Engine
    vocabulary: Vocabulary
    own: Mapping[str, Any]
    max_tokens: int  # for those who do not say
    about: dict[str, Any]
    created: int = field(default_factory=lambda: int(time()))

    def sampling(self, given: Mapping[str, Any]) -> Sampling:
        try:
            return chosen(self.own, given)
        except UsageError as error:
            raise Refused(400, error.message) from error

    def budget(self, prompt: int, asked: int | None, field: str) -> int:
        """Tokens that may follow a prompt of so many, which came in ``field``."""
        context = self.engine.limits.context
        if prompt >= context:
            raise Refused(
                400,
                f"this model's maximum context length is {context} tokens, and your prompt has "
                f"{prompt}, which leaves none for the answer",
                param=field,
                code="context_length_exceeded",
            )
        if asked is not None and prompt + asked > context:
            raise Refused(
                400,
                f"this model's maximum context length is {context} tokens, and you asked for "
                f"{prompt + asked} ({prompt} in the prompt, {asked} in the answer)",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return min(asked or self.max_tokens, context - prompt)

    def submit(self, jobs: list[Job]) -> list[Stream]:
        """All of ``jobs``, or a refusal."""
        if any(job.logprobs is not None for job in jobs) and not self.engine.limits.logprobs:
            raise Refused(400, f"the engine {self.engine.name} tells no logprobs", param="logprobs")
        try:
            return self.engine.submit(jobs)
        except Busy as error:
            raise Refused(
                429, "too many requests are waiting, try again later", headers={"Retry-After": "1"}
            ) from error
        except Dead as error:
            raise Refused(503, f"the engine of {self.name} has failed") from error
