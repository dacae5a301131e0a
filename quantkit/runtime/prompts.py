"""From what somebody says to the tokens that a model continues."""

from collections.abc import Sequence

from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime import templates
from quantkit.runtime.engine import Tokenizing
from quantkit.runtime.templates import Jinja, Message, Template


class Prompts:
    """Makes prompts for a model that reads by ``tokenizer``; engines are one. ``template`` is the
    name of a built-in one or of a file; None: the model's own, if it has one. ``chat=False``: text
    goes in as it is, ``chat=True``: a model without a template is refused.

    Raises UsageError when these do not go together, or the template is not there.
    """

    def __init__(
        self, tokenizer: Tokenizing, template: str | None = None, chat: bool | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.template = _template(tokenizer, template, chat)

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer, by the template."""
        return () if self.template is None else self.template.stop

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the answer begins. Raises UsageError for messages that are not one
        prompt where there is no template."""
        if self.template is None:
            if len(messages) > 1:
                raise UsageError(
                    "without a template there is no place for a system message",
                    "choose a --template",
                )
            found = self._tokenizer.encode(messages[0]["content"])
        else:
            text = self.template.render(messages, self._tokenizer.special_tokens)
            found = self._tokenizer.encode(text, special=not self.template.whole)
        if not found:
            raise QuantkitError("the tokenizer makes no tokens of the prompt")
        return found


def asked(prompt: str, system: str | None = None) -> list[Message]:
    """The messages of a single question. Raises UsageError when it is empty."""
    if not prompt:
        raise UsageError("the prompt is empty")
    found = [{"role": "system", "content": system}] if system else []
    return [*found, {"role": "user", "content": prompt}]


def _template(tokenizer: Tokenizing, name: str | None, chat: bool | None) -> Template | None:
    if chat is False:
        if name is not None:
            raise UsageError("--raw and --template exclude each other", "leave one of them out")
        return None
    if name is not None:
        return templates.find(name)
    if tokenizer.chat_template:
        return Jinja(tokenizer.chat_template)
    if chat:
        raise UsageError(
            "the model has no chat template",
            f"choose one with --template: {', '.join(templates.BUILT_IN)}, or a file",
        )
    return None
