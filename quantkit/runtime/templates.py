"""How messages become the text that a model was trained on.

Messages are ``{"role": "system" | "user" | "assistant", "content": text}``, the last of a user. A
template is the model's own (Jinja, in its tokenizer), one of BUILT_IN, or a file: Jinja, or plain
text with {system} and {prompt} in it. Jinja runs in transformers' sandbox.

    weblab     matsuo-lab/weblab-10b-instruction-sft: the card of the model
    alpaca-ja  the Japanese Alpaca form; with a system message that is the instruction, and the
               prompt its input (llm-jp-eval, PROMPTS.md)
    llama-2    Llama 2 chat: reference code of the model, generation.py
    deepseek   DeepSeek LLM chat: the card of the model
    synthia    SynthIA: the card of the model
    qa         tags, for models that only know plain text
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError, UsageError

Message = dict[str, str]


@dataclass(frozen=True)
class Turns:
    """A form of plain text, in which {bos} and {eos} are the model's tokens.

    turn     what a user says: {prompt}, maybe {system}
    first    the same where there is a system message
    answer   what was answered: {answer}
    default  the system message where none is given
    stop     where an answer ends, whatever the model thinks
    whole    the text has the special tokens in it that it begins with
    """

    turn: str
    answer: str
    first: str
    default: str = ""
    stop: tuple[str, ...] = ()
    whole: bool = False

    @property
    def source(self) -> str:
        """The form of a first turn, as a file would have it."""
        return self.first

    def render(self, messages: Sequence[Message], special: Mapping[str, str]) -> str:
        """The text up to where the answer begins. Raises QuantkitError when nobody is to be
        answered."""
        if messages[-1]["role"] != "user":
            raise QuantkitError("the last message is not of the user, whom the model answers")
        tokens = {"bos": special.get("bos_token", ""), "eos": special.get("eos_token", "")}
        system, parts = self.default, []
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system":
                if content and "{system}" not in self.first:
                    raise QuantkitError(
                        "the template has no place for a system message", "put {system} into it"
                    )
                system = content
            elif role == "assistant":
                parts.append(_filled(self.answer, {**tokens, "answer": content}))
            else:
                form = self.first if system else self.turn
                parts.append(_filled(form, {**tokens, "system": system, "prompt": content}))
                system = ""
        return "".join(parts)


@dataclass(frozen=True)
class Jinja:
    """A chat template as models have them; ``stop`` and ``whole`` as in Turns."""

    source: str
    stop: tuple[str, ...] = ()
    whole: bool = True

    def render(self, messages: Sequence[Message], special: Mapping[str, str]) -> str:
        """The text up to where the answer begins. Raises QuantkitError when the template fails."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.source,
                add_generation_prompt=True,
                **special,
            )
        except RecursionError as error:
            raise QuantkitError(
                "the chat template calls itself without an end", "--template NAME uses another one"
            ) from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise QuantkitError(
                f"the chat template fails on these messages ({error})",
                "it may take no system message; --template NAME uses another one",
            ) from error
        return str(texts[0])


Template = Turns | Jinja
_RESPONSE = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
_WITH_INPUT = (
    "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。"
    "要求を適切に満たす応答を書きなさい。"
)
BUILT_IN: dict[str, Turns] = {
    "weblab": Turns(
        turn="### 指示:\n{prompt}\n\n### 応答:",
        first="{system}\n\n### 指示:\n{prompt}\n\n### 応答:",
        answer="{answer}\n\n",
        default=_RESPONSE,
        stop=("### 指示:",),
    ),
    "alpaca-ja": Turns(
        turn=_RESPONSE + "\n\n### 指示:\n{prompt}\n\n### 応答:\n",
        first=_WITH_INPUT + "\n\n### 指示:\n{system}\n\n### 入力:\n{prompt}\n\n### 応答:\n",
        answer="{answer}\n\n",
        stop=("### 指示:", "### 入力:"),
    ),
    "llama-2": Turns(
        turn="[INST] {prompt} [/INST]",
        first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{prompt} [/INST]",
        answer=" {answer} {eos}{bos}",
    ),
    "deepseek": Turns(
        turn="User: {prompt}\n\nAssistant:",
        first="{system}\n\nUser: {prompt}\n\nAssistant:",
        answer=" {answer}{eos}",
        stop=("\nUser:",),
    ),
    "synthia": Turns(
        turn="USER: {prompt}\nASSISTANT:",
        first="SYSTEM: {system}\nUSER: {prompt}\nASSISTANT:",
        answer=" {answer}\n",
        stop=("\nUSER:",),
    ),
    "qa": Turns(
        turn="<prompt>{prompt}</prompt>\n<answer>",
        first="{system}\n\n<prompt>{prompt}</prompt>\n<answer>",
        answer="{answer}</answer>\n",
        stop=("</answer>",),
    ),
}


def find(name: str) -> Template:
    """The template NAME of BUILT_IN, or in the file of that name. Raises UsageError when there is
    neither, or when the file has no place for a prompt."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name).expanduser()
    try:
        source = path.read_text("utf-8-sig")
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"there is no template '{name}', and no file of that name",
            f"the built-in ones are {', '.join(BUILT_IN)}",
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the template {name} is not UTF-8 text") from error
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        return Jinja(source)
    if "{prompt}" not in source:
        raise UsageError(
            f"the template {name} has no {{prompt}} in it",
            "say with {prompt} where the prompt goes, and with {system} where --system does",
        )
    return Turns(turn=_filled(source, {"system": ""}), first=source, answer="{answer}\n")


def _filled(form: str, values: Mapping[str, str]) -> str:
    """``form`` with its {names} replaced, all at once: a value that has braces stays as it is.
    Braces around anything else are text."""
    pieces, rest = [], form
    while rest:
        found = [(at, name) for name in values if (at := rest.find("{" + name + "}")) >= 0]
        if not found:
            break
        at, name = min(found)
        pieces += [rest[:at], values[name]]
        rest = rest[at + len(name) + 2 :]
    return "".join([*pieces, rest])
