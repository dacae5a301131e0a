"""What quantkit raises: one clear sentence, and a hint that says what to do about it."""


class QuantkitError(Exception):
    """A problem that the user can act on.

    ``message`` is one sentence without a trailing period's worth of jargon; ``hint`` says what to
    type or change. The command line prints both and exits with ``exit_code``.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class QuantkitWarning(UserWarning):
    """Something about a model that its user should know, and that does not keep it from working."""


class UsageError(QuantkitError):
    """An option or argument that cannot work, found before anything was touched."""

    exit_code = 2


class GateFailed(QuantkitError):
    """The model was measured and is worse than the limit that the user set."""

    exit_code = 3
