"""What reports are made from, with markup in every text if wanted, and a strict reader."""

import math
from html.parser import HTMLParser

EVIL = '<script src="http://evil.example/x.js">alert(1)</script>{kl}&\x00\x1b"\'><img src=x>'
NAN = math.nan
VOID = {"meta", "br", "input"}
TAGS = """html head meta title style body header main footer section article div p span ol ul li
h1 h2 h3 h4 table caption thead tbody tfoot tr th td small details summary mark bdi dl dt dd
figure svg input label fieldset legend strong rect line path polyline text g"""


def text_set(**more):
    estimates = ("kl", "top1", "top5", "perplexity_ratio", "probability_lost")
    one = {
        "kl": 0.08,
        "top1": 0.81,
        "top5": 0.98,
        "perplexity_ratio": 1.04,
        "probability_lost": 0.01,
    }
    one |= {f"{key}_error": 0.002 for key in estimates}
    one |= {"kl_p95": 0.25, "kl_p99": 0.5, "kl_max": 1.7, "rows": 8, "tokens": 4096}
    return one | {"reference_perplexity": 66.6, "perplexity": 69.3} | more


def layer(error, predicted=None):
    return {"error": error, "sqnr": 20.0, "cosine": 0.995, "predicted": predicted}


def described(**more):
    """Everything that a report can show; ``more`` replaces parts."""
    names = [f"model.layers.{i}.{kind}" for i in range(5) for kind in ("attn.q", "mlp.down")]
    passage = [
        {"text": piece, "kl": kl} for piece, kl in (("Once", 0.01), (" upon", 2.0), ("\n", NAN))
    ]
    sides = {"original": "in a land far away", "quantized": "in a land so far"}
    return {
        "model": "small-gptq",
        "against": "small",
        "kl": 0.0871,
        "kl_error": 0.0016,
        "top1": 0.811,
        "top5": 0.98,
        "sets": {"en": text_set(), "ja": text_set(kl=0.09), "mine": text_set()},
        "histogram": {
            "edges": [0.001, 0.01, 0.1, 1.0],
            "counts": {"en": [1, 6, 3], "ja": [2, 5, 0]},
        },
        "worst": [
            {
                "set": "en",
                "kl": 2.0,
                "tokens": passage,
                "at": 1,
                "reference": [[" a", 0.9], ["\n", 0.1]],
                "model": [[" the", 0.5], [" a", 0.25]],
            }
        ],
        "layers": {name: layer(0.004 + i / 1e4, 0.004) for i, name in enumerate(names)},
        "samples": [{"prompt": "Once", "language": "en", "same": 3, "tokens": 32, **sides}],
        "divergence": {"prompts": 24, "mean": 9.4, "identical": 3, "tokens": 64},
        "size": {"bytes": 5_870_080, "original_bytes": 10_494_472, "bits_per_weight": 4.1562}
        | {"memory": 612_000_000},
        "nonfinite": [],
        "gate": {
            "passed": False,
            "checks": [
                {"what": "kl", "set": "mean", "limit": 0.1, "value": 0.0871, "passed": True},
                {"what": "top1", "set": "ja", "limit": 0.9, "value": 0.81, "passed": False},
                {"what": "max_new", "set": None, "limit": 2, "value": NAN, "passed": False},
            ],
        },
        "settings": {"rows": 8, "device": "cpu", "quantization": {"method": "gptq", "bits": 4}},
        "notes": ["a note"],
    } | more


def poisoned(content):
    """The same, with every text and every name replaced by markup."""
    if isinstance(content, dict):
        keep = {"what": "max_kl"}
        free = {"sets", "counts", "layers", "settings", "quantization"}
        made = {}
        for key, value in content.items():
            value = keep.get(key) or poisoned(value)
            if key in free:
                value = {f"{EVIL}{i}": one for i, one in enumerate(value.values())}
            made[key] = value
        return made
    if isinstance(content, list):
        return [poisoned(one) for one in content]
    return EVIL if isinstance(content, str) else content


class Reader(HTMLParser):
    """Checks the nesting, and keeps all elements and all text."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, content):
        self.texts.append(content)

    @property
    def text(self):
        return " ".join(self.texts)
