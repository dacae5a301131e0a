"""The document around a report: nothing in it can run, and it loads nothing, from nowhere.

Its Content-Security-Policy allows one inline style, by its hash, and no script. What is switched is
switched by radio buttons and the style; without a style everything is there, one under the other.
"""

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from quantkit import __version__, data
from quantkit.core.checkpoint import write_text
from quantkit.errors import QuantkitError
from quantkit.workflows import report_sections as sections
from quantkit.workflows.report_words import Words, tag


def document(title: str, header: str, parts: Iterable[str], words: Words) -> str:
    """The whole page; all but ``words`` are HTML."""
    style = (data.report() / "style.css").read_text("utf-8")
    allowed = b64encode(sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        f"<style>{style}</style>",
    )
    footer = tag("footer", tag("p", words("made_by", version=__version__)))
    main = tag("main", *parts, sections.glossary(words))
    body = tag("body", header, main, footer)
    return "<!DOCTYPE html>\n" + tag("html", head, "\n", body, lang=words.lang) + "\n"


def save(content: str, path: Path) -> None:
    """Raises QuantkitError when the file cannot be written."""
    try:
        write_text(path, content)
    except OSError as error:
        raise QuantkitError(
            f"the report cannot be written to {path}: {error.strerror}",
            "choose another file, in a folder that exists",
        ) from error
