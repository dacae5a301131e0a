"""Does llama.cpp cut texts into the same tokens as the tokenizer that a GGUF file was made from?

Nothing else finds a wrong pre-tokenizer: the model still answers, a little worse.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.errors import QuantkitError

# short, and each for a thing that tokenizers do differently
TEXTS = (
    "Hello, world! It's a test, isn't it? I'VE DONE IT.",
    "The quick brown fox jumps over the lazy dog.",
    " leading space, two  spaces,   three, and one at the end ",
    "line\nbreak\n\ntwo\r\n\r\nwindows\n \n  indented\n\n\n",
    "\ttabs\t\tand   spaces \t mixed\n",
    "def f(x: int) -> str:\n    return f'{x:>10}' + \"a\\n\"  # 100%\n",
    "if (a[i] != b->c && !(d >>= 2)) { e += 0xFF; } // ok?",
    "1 12 123 1234 12345 3.14159 1,000,000 2024-01-31 ١٢٣ Ⅻ ½",
    "日本語の文章です。吾輩は猫である。名前はまだ無い。",
    "カタカナとひらがな、漢字とABCと１２３を混ぜた文！？",
    "中文句子，没有空格。한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "Привет, мир! Ελληνικά κείμενο. हिन्दी में लिखा है। ภาษาไทย",
    "Élève, naïve café, Größe, Łódź, Ångström, ǅ",
    "😀 👩‍👩‍👧‍👦 🇯🇵 ❤️ ✅ emoji🙂text",
    "$€£¥ %‰ «quotes» “curly” ‘single’ – — … \u00a0nbsp\u3000wide",
    "https://example.com/a?b=c&d=e#f user@example.org",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ======== ---- ...... !!!???",
    "CamelCaseWord snake_case_word SCREAMING_CASE kebab-case-word",
    "'s 't 're 'VE 'm 'LL 'd don't DON'T we’re",
)


class Difference(NamedTuple):
    """A text that llama.cpp cuts otherwise."""

    text: str
    ours: list[int]
    llama_cpp: list[int]


def available() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def check_roundtrip(path: Path, tokenizer: Any, texts: Iterable[str] = TEXTS) -> list[Difference]:
    """The texts for which llama.cpp, with the tokenizer in the file ``path``, finds other tokens
    than ``tokenizer`` of transformers. Raises QuantkitError when llama-cpp-python is missing or
    does not take the file."""
    if not available():
        raise QuantkitError(
            "llama-cpp-python is not installed, so the tokenizer cannot be compared",
            "pip install 'quantkit[llamacpp]'",
        )
    from llama_cpp import Llama

    try:
        model = Llama(str(path), vocab_only=True, verbose=False)
    except ValueError as error:
        raise QuantkitError(f"llama.cpp does not open {path} ({error})") from error
    differences = []
    for text in texts:
        found = model.tokenize(text.encode(), add_bos=True, special=True)
        wanted = tokenizer.encode(text)
        if found != wanted:
            differences.append(Difference(text, wanted, found))
    return differences
