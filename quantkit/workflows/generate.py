"""``quantkit generate``: a prompt in, text out as it is made."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from quantkit.core.sampling import Sampling, chosen
from quantkit.errors import UsageError
from quantkit.runtime import templates
from quantkit.runtime.engine import Engine, open_engine
from quantkit.runtime.prompts import Prompts, asked
from quantkit.runtime.stream import Answer
from quantkit.runtime.torch_engine import TorchEngine

UNTIL_EOS = 8192  # tokens after which a text that does not end is ended


@dataclass(frozen=True)
class Generated:
    """text: what was generated; tokens: how many; seconds: how long it took, prompt included;
    reason: why it ended (see runtime/stream.py)."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    reason: str | None


@dataclass(frozen=True)
class Wanted:
    """How texts are made: what is not given, None, is the model's own. ``until_eos`` goes on past
    ``max_new_tokens``, until the model ends the text, its context is full, or UNTIL_EOS tokens."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int = 256
    until_eos: bool = False
    stop: tuple[str, ...] = ()
    system: str | None = None
    template: str | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # one, not its letters
            object.__setattr__(self, "stop", (self.stop,))

    def check(self) -> None:
        """Raises UsageError for what no model could do, before one is loaded."""
        self.sampling({})
        if self.chat is False and self.system:
            raise UsageError(
                "there is no place for a system message in --raw text", "leave one of them out"
            )
        if not all(self.stop):
            raise UsageError("an empty --stop would end every answer at once", "leave it out")
        if self.max_new_tokens < 1:
            raise UsageError("--max-new-tokens must be at least 1")
        if self.template is not None:
            templates.find(self.template)

    def sampling(self, own: Any) -> Sampling:
        """The settings, those of the model where nothing was given."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        return chosen(own, {name: getattr(self, name) for name in names})

    @property
    def budget(self) -> int:
        """Tokens to make at most."""
        return max(UNTIL_EOS, self.max_new_tokens) if self.until_eos else self.max_new_tokens


def generate(
    model: str,
    prompt: str,
    *,
    system: str | None = None,
    template: str | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 256,
    until_eos: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    model_basename: str | None = None,
    write: Callable[[str], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Continue ``prompt``, or answer it when the model has a chat template (``chat=False``: never,
    ``chat=True``: it must have one) or ``template`` names one.

    Sampling settings that are not given are the model's own; ``temperature=0`` is greedy. ``write``
    receives the text piece by piece, ``note`` what else there is to say. Raises UsageError for
    settings out of range and prompts that do not fit, QuantkitError when the model does not load.
    """
    wanted = Wanted(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        until_eos=until_eos,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        system=system,
        template=template,
        chat=chat,
    )
    wanted.check()
    messages = asked(prompt, system)
    loaded = open_engine(
        model,
        engine=engine,
        device=device,
        dtype=dtype,
        revision=revision,
        model_basename=model_basename,
        note=note,
    )
    answer = answer_to(loaded, Prompts(loaded, template, chat), messages, wanted)
    started = perf_counter()
    for piece in answer:
        if write is not None:
            write(piece)
    seconds = perf_counter() - started
    return Generated(answer.text, len(answer.prompt), len(answer.ids), seconds, answer.reason)


def stream_generate(model: Any, tokenizer: Any, prompt: str, **settings: Any) -> Iterator[str]:
    """The answer to ``prompt`` piece by piece, in whole characters, from what quantkit.load
    returned (or any causal LM of transformers). ``settings`` are the fields of Wanted."""
    wanted = Wanted(**settings)
    wanted.check()
    return iter(begin(TorchEngine(model, tokenizer), prompt, wanted))


def begin(engine: Engine, prompt: str, wanted: Wanted) -> Answer:
    """The answer to ``prompt``, which has not begun."""
    prompts = Prompts(engine, wanted.template, wanted.chat)
    messages = asked(prompt, wanted.system)
    return answer_to(engine, prompts, messages, wanted)


def answer_to(
    engine: Engine, prompts: Prompts, messages: Sequence[templates.Message], wanted: Wanted
) -> Answer:
    """The answer to ``messages``, which has not begun."""
    return Answer(
        engine,
        prompts.ids(messages),
        wanted.sampling(engine.own_settings),
        wanted.budget,
        (*wanted.stop, *prompts.stop),
    )
