"""The report of several models: all of them everywhere, nothing that runs, and the right order."""

import json
import math
import re

import pytest
from reports import EVIL, NAN, TAGS, Reader, described, layer, poisoned, text_set
from tools import command, quantized

from quantkit.errors import QuantkitError, UsageError
from quantkit.workflows.report_candidates import front, tied
from quantkit.workflows.report_ranking import page, write
from quantkit.workflows.report_words import Words


def model(name, kl, size, bits=4.0, **more):
    sets = {"en": text_set(kl=kl * 0.9), "ja": text_set(kl=kl * 1.1)}
    sizes = {"bytes": size, "original_bytes": 90, "bits_per_weight": bits, "memory": size}
    rest = {"sets": sets, "size": sizes, "perplexity_ratio": 1 + kl, "kl_error": 0.001} | more
    return described(model=name, kl=kl, **rest)


def ranked(*models, behind=None):
    models = models or (
        model("best", 0.02, 50, 8.0),
        model("middle", 0.05, 30),
        model("beaten", 0.07, 40),
        model("small", 0.30, 20, 3.0),
    )
    gaps = behind or [{"kl": 0.03, "kl_error": 0.001}] * (len(models) - 1)
    return {"against": "base", "models": list(models), "behind": [None, *gaps]}


def read(content, lang="en"):
    return Reader(page(content, Words(lang)))


def section(content, name, lang="en"):
    written = page(content, Words(lang))
    return next(part for part in written.split("<section") if f'class="{name}"' in part)


@pytest.mark.parametrize("lang", ["en", "ja"])
@pytest.mark.parametrize("evil", [False, True])
def test_it_loads_and_runs_nothing(lang, evil):
    content = poisoned(ranked()) if evil else ranked()
    reader = read(content, lang)
    assert {tag for tag, _ in reader.tags} <= set(TAGS.split())
    for tag, attributes in reader.tags:
        assert not {"src", "href", "style", "action"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    if evil:
        assert "<script" not in page(content, Words(lang))
        assert EVIL[:20] in reader.text


def test_the_best_for_a_size():
    models = ranked()["models"]
    assert [models[i]["model"] for i in front(models)] == ["small", "middle", "best"]
    shown = section(ranked(), "best")
    names = [name for name in ("small", "middle", "best") if f"<span>{name}</span>" in shown]
    assert names == ["small", "middle", "best"]
    assert "beaten: middle is closer, and not larger." in shown
    # of two of the same size, and with a model that gives no numbers
    same = [model("a", 0.1, 9), model("b", 0.2, 9), model("c", NAN, 5)]
    assert front(same) == [0]


def test_who_is_not_worse_is_said():
    assert tied({"kl": 0.003, "kl_error": 0.002}) and not tied({"kl": 0.003, "kl_error": 0.001})
    assert not tied(None) and not tied({"kl": 0.0, "kl_error": None})
    assert not tied({"kl": NAN, "kl_error": NAN})
    close, far = {"kl": 0.001, "kl_error": 0.002}, {"kl": 0.1, "kl_error": 0.002}
    shown = read(ranked(behind=[close, far, close])).text
    assert "Not to be told from it by this measurement: middle." in shown
    assert shown.count("≈ ") == 3  # the note, and two rows
    assert "Not to be told" not in read(ranked()).text


def test_every_model_is_in_every_section():
    written = page(ranked(), Words("en"))
    assert "<h1>4 models against base</h1>" in written
    assert "best is closest" in written
    for name in ("ranking", "tradeoff", "sets", "distributions", "layers", "worst", "samples"):
        part = section(ranked(), name)
        for one in ("best", "middle", "beaten", "small"):
            assert one in part, (name, one)


def test_one_panel_at_a_time_without_a_script():
    """Radio buttons of one name, each with its label and its panel directly behind it."""
    reader = read(ranked())
    buttons = [a for tag, a in reader.tags if tag == "input"]
    names = [a["name"] for a in buttons]
    assert {name: names.count(name) for name in names} == {"sets": 2, "layers": 3, "worst": 4}
    assert [a["name"] for a in buttons if "checked" in a] == ["sets", "layers", "worst"]
    assert len({a["id"] for a in buttons}) == len(buttons)
    order = [(tag, a) for tag, a in reader.tags if tag in ("input", "label")]
    for (_, button), (tag, label) in zip(order[::2], order[1::2]):
        assert tag == "label" and label["for"] == button["id"]
    assert sum(a.get("class") == "panel" for _, a in reader.tags) == len(buttons)


def test_a_colour_is_a_model_all_over_the_page():
    written = page(ranked(), Words("en"))
    keys = re.findall(r'class="f(\d)"></path></svg><span>(\w+)</span>', written)
    assert {name: hue for hue, name in keys} == {
        "best": "0", "middle": "1", "beaten": "2", "small": "3",
    }  # fmt: skip
    assert len({(name, hue) for hue, name in keys}) == 4


def test_better_is_lower_in_the_chart():
    part = section(ranked(), "tradeoff")
    points = [
        (float(x), float(y))
        for x, y in re.findall(r'<polyline points="([\d.]+),([\d.]+) ', part)
        + re.findall(r' ([\d.]+),([\d.]+)" class="front"', part)
    ]
    small, best = points[0], points[2]
    assert small[0] < best[0] and small[1] < best[1]  # fewer bits, and more KL: further up


def test_layers_have_a_line_for_each_model():
    part = section(ranked(), "layers")
    wide = part.split('class="panel"')[1].split("</svg>")[0]
    assert [f"s{i}" in wide for i in range(5)] == [True] * 4 + [False]
    assert "best, 0: error" in wide
    broken = {**described()["layers"], "model.layers.0.attn.q": layer(NAN)}
    assert 'class="dot nan"' in page(ranked(model("a", 0.1, 9, layers=broken)), Words("en"))


def test_what_each_was_made_with_stands_side_by_side():
    one = model("a", 0.1, 9, settings={"rows": 8, "quantization": {"bits": 4, "method": "gptq"}})
    two = model("b", 0.2, 8, settings={"rows": 8, "quantization": {"bits": 3, "method": "gptq"}})
    part = section(ranked(one, two), "settings")
    row = r'scope="row">{}</th><td>{}</td><td>{}</td>'
    assert re.search(row.format("<strong>bits</strong>", 4, 3), part)
    assert re.search(row.format("method", "gptq", "gptq"), part)


def test_nothing_is_a_number_and_little_is_there():
    nothing = model("x", NAN, 9, samples=[], worst=[], layers={}, divergence=None, gate=None)
    nothing["histogram"] = {"edges": [0.1, 1.0], "counts": {"en": [0]}}
    reader = read(ranked(nothing))
    assert "No model gives predictions that are numbers" in reader.text
    for tag, attributes in reader.tags:
        if tag in ("rect", "line", "path", "polyline", "text"):
            assert not re.search("nan|inf", str(attributes.get("d")) + str(attributes.get("x")))
    read(ranked(model("dense", 0.1, 9, None), model("zero", 0.0, 9)))
    assert math.isnan(nothing["kl"])


def test_bad_requests(tmp_path):
    with pytest.raises(UsageError, match="no report in 'fr'"):
        write(ranked(), tmp_path / "r.html", "fr")
    with pytest.raises(QuantkitError, match="cannot be written"):
        write(ranked(), tmp_path / "no" / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_it(tmp_path, capsys):
    options = ["--rows", 1, "--seqlen", 16, "--no-samples", "-q", "--json"]
    report = tmp_path / "r.html"
    folders = [quantized(), quantized(bits=3)]
    assert command("compare", *folders, *options, "--report", report, "--lang", "ja") == 0
    found = json.loads(capsys.readouterr().out)
    gap = found["behind"][1]["kl"]
    assert gap == pytest.approx(found["models"][1]["kl"] - found["models"][0]["kl"])
    reader = Reader(report.read_text("utf-8"))
    assert reader.tags[0] == ("html", {"lang": "ja"})
    assert "比較レポート" in reader.text
    assert command("compare", *folders, *options, "--report", tmp_path / "no" / "r.html") == 2
