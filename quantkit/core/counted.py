"""Numbers of things, in words."""


def counted(number: int, noun: str) -> str:
    """``1 row``, ``1,024 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
