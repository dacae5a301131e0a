"""The report: nothing in it can run or load, whatever a model says, and it says what was found."""

import math
import re
from base64 import b64encode
from hashlib import sha256
from itertools import pairwise
from string import Formatter

import pytest
from reports import NAN, TAGS, Reader, described, layer, poisoned, text_set

from quantkit import data
from quantkit.errors import QuantkitError, UsageError
from quantkit.workflows.gate import DEFAULTS
from quantkit.workflows.report_html import page, write
from quantkit.workflows.report_verdict import LEVELS, findings, layers, level, shortened
from quantkit.workflows.report_words import Words, change, number, percent, size, tick, with_error


def read(content, lang="en"):
    return Reader(page(content, Words(lang)))


@pytest.mark.parametrize("content", [described(), poisoned(described())], ids=["plain", "evil"])
def test_it_loads_and_runs_nothing(content):
    written = page(content, Words("en"))
    reader = Reader(written)
    allowed = set(TAGS.split())
    assert {tag for tag, _ in reader.tags} <= allowed
    for tag, attributes in reader.tags:
        loading = {"src", "href", "style", "srcset", "action", "xlink:href", "data"} & set(
            attributes
        )
        assert not loading, (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    style = re.search("<style>(.*?)</style>", written, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for t, a in reader.tags if a.get("http-equiv"))
    hashed = b64encode(sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{hashed}';")
    assert "script" not in policy and "unsafe" not in policy


def test_hostile_text_is_shown_not_obeyed():
    content = poisoned(described())
    written = page(content, Words("en"))
    assert "<script" not in written and "<img" not in written
    assert "\x00" not in written and "\x1b" not in written
    shown = Reader(written).text
    # the name of the model, a layer, a set, a token, what a model wrote, a setting, a note
    assert shown.count("alert(1)") > 20
    assert "␀␛" in shown and "{kl}" in shown


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    write(described(notes=["half \ud83d"]), tmp_path / "report.html")
    assert "half ?" in (tmp_path / "report.html").read_text("utf-8")


def fields(label):
    return {name for _, name, _, _ in Formatter().parse(label) if name}


def test_languages_have_the_same_labels():
    files = {file.stem: Words(file.stem).labels for file in data.report().glob("*.json")}
    assert {"en", "ja"} <= files.keys()
    english = files["en"]
    for lang, labels in files.items():
        assert labels.keys() == english.keys(), lang
        for key, label in labels.items():
            assert label.strip(), (lang, key)
            assert fields(label) == fields(english[key]), (lang, key)


def test_every_label_is_used_and_japanese_is_japanese():
    code = "".join(
        file.read_text("utf-8")
        for file in (data.report().parents[1] / "workflows").glob("report_*.py")
    )
    built = ("set_", "scale_", "find_", "term_", "about_", "gate_", "settings_")
    for key in Words("en").labels:
        assert f'"{key}"' in code or key.startswith(built), f"{key} is never shown"
    shown = read(described(), "ja")
    assert shown.tags[0] == ("html", {"lang": "ja"})
    headings = [
        label for key, label in Words("en").labels.items() if key in ("sets", "layers", "worst")
    ]
    assert not any(heading in shown.text for heading in headings)
    assert "テキスト別の結果" in shown.text


@pytest.mark.parametrize("lang", ["en", "ja"])
@pytest.mark.parametrize("missing", [None, *described()])
def test_what_is_missing_is_left_out(missing, lang):
    content = {key: value for key, value in described().items() if key != missing}
    reader = read(content, lang)
    sections = {a.get("class") for tag, a in reader.tags if tag == "section"}
    shown_in = {"sets", "histogram", "worst", "layers", "samples", "gate", "settings", "notes"}
    assert sections == (shown_in - {missing}) | {"numbers", "glossary"}


def test_the_gate_shows_what_was_allowed():
    more = [("perplexity_ratio", 1.1, 1.2), ("nonfinite", 0.0, 2.0), ("min_top1", 0.5, 0.81)]
    checks = described()["gate"]["checks"] + [
        {"what": what, "set": "mean", "limit": limit, "value": value, "passed": True}
        for what, limit, value in more
    ]
    reader = read(described(gate={"passed": False, "checks": checks}))
    assert "Gate failed" in reader.text and "Gate passed" not in reader.text
    shown = reader.text.split("Text by text")[0].split("The limits that")[1]
    rows = re.findall(r"(Mean|Japanese) (at \w+ \S+) (\S+) +(✓|✗)", shown)
    assert [row[1:] for row in rows] == [
        ("at most 0.1", "0.0871", "✓"),
        ("at least 90%", "81.0%", "✗"),
        ("at most 2", "NaN", "✗"),
        ("at most 1.1", "1.20", "✓"),
        ("at most 0", "2.00", "✓"),
        ("at least 50%", "81.0%", "✓"),
    ]
    assert rows[1][0] == "Japanese" and "max_new" in shown
    assert "Perplexity ratio" in shown and "Values that are not numbers" in shown


def test_a_mean_that_was_measured_is_the_one_shown():
    shown = read(described(perplexity_ratio=1.5, perplexity_ratio_error=0.02)).text
    assert "+50.0%" in shown and "1.500 ± 0.020" in shown
    assert "+4.0%" in read(described()).text


def test_older_descriptions_and_nothing_at_all():
    old = {key: described()[key] for key in ("model", "against", "kl", "kl_error", "top1", "notes")}
    old["sets"] = {"en": {k: v for k, v in text_set().items() if k in ("kl", "kl_error", "top1")}}
    old["layers"] = {"model.layers.0.q": 0.01, "model.layers.1.q": 0.02}
    old["samples"] = [{"prompt": "a", "original": "b", "quantized": ""}]
    shown = read(old).text
    assert "2.0%" in shown and "Predicted" not in shown and "SQNR" not in shown.split("What the")[0]
    assert "Mean KL" in shown and "Probability lost" not in shown.split("What the numbers")[0]
    read({})
    unknown = {"en": text_set(), "ja": text_set(perplexity_ratio=None)}
    assert "compared with the original" in read(described()).text
    assert "compared with the original" not in read(described(sets=unknown)).text
    read(
        described(histogram={"edges": [0.1, 1], "counts": {"en": [0]}}, gate=None, divergence=None)
    )


def test_what_is_no_number_is_said():
    names = list(described()["layers"])
    broken = {**described()["layers"], names[3]: layer(NAN), names[4]: layer(math.inf)}
    bad = described(
        kl=NAN,
        kl_error=NAN,
        sets={"en": text_set(), "ja": text_set(kl=NAN, perplexity=math.inf, perplexity_ratio=NAN)},
        layers=broken,
        nonfinite=[f"{names[3]}.scales"],
    )
    reader = read(bad)
    assert level(bad) == "broken"
    assert "Broken" in reader.text and "NaN" in reader.text and "∞" in reader.text
    first = reader.text.split("In numbers")[0]
    assert f"{names[3]}.scales holds values that are not numbers" in first
    assert f"The output of {names[4]} is not a number" in first
    assert f"The output of {names[3]} is" not in first  # said once
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            if tag in ("rect", "line", "path", "polyline", "text") and name not in ("class",):
                assert "nan" not in str(value) and "inf" not in str(value), (tag, attributes)
    assert level(described(nonfinite=["a tensor that no text reached"])) == "broken"
    # JSON has no NaN; some write null
    assert level(described(kl=None)) == "broken"
    read(described(kl=None, kl_error=None, layers={"a.0.b": layer(None)}))


@pytest.mark.parametrize(
    ("kl", "top1", "expected"),
    [
        (0.001, 0.99, "same"),
        (0.001, 0.94, "close"),
        (0.03, 0.99, "close"),
        (0.0871, 0.811, "different"),
        (0.4, 0.7, "worse"),
        (0.4, 0.6, "far"),
        (5.0, 0.1, "broken"),
        (0.001, NAN, "broken"),
    ],
)
def test_the_verdict_is_the_worse_of_both(kl, top1, expected):
    content = described(kl=kl, top1=top1)
    assert level(content) == expected
    reader = read(content)
    assert [a["class"] for _, a in reader.tags if a.get("aria-current")] == [f"v-{expected}"]
    assert Words("en").labels[expected] in reader.text


def test_the_verdict_and_the_gate_use_the_same_limits():
    for name, (_, kl, top1, _) in zip((one for one, _, _ in LEVELS), DEFAULTS, strict=True):
        assert level(described(kl=kl, top1=top1)) == name


def test_findings_point_at_the_layer():
    names = list(described()["layers"])

    def found(**more):
        return [(one.key, one.names.get("name")) for one in findings(described(**more))]

    def changed(one):
        return {**described()["layers"], names[5]: one}

    assert found() == []
    assert found(layers=changed(layer(0.9, 0.004))) == [("find_lost", names[5])]
    assert found(layers=changed(layer(0.02, 0.004))) == [("find_unpredicted", names[5])]
    assert found(layers=changed(layer(0.2))) == [("find_outlier", names[5])]
    assert found(layers=changed(layer(0.02))) == []
    assert found(layers=changed(layer(0.009, 0.001))) == []  # small whatever was predicted
    assert found(size={"bytes": 3, "original_bytes": 2}) == [("find_larger", None)]
    ja = {"en": text_set(), "ja": text_set(kl=0.3), "code": text_set()}
    assert [one.names["set"] for one in findings(described(sets=ja))] == ["ja"]
    assert "Japanese suffers most" in read(described(sets=ja)).text
    many = shortened(findings(described(nonfinite=[f"t{i}" for i in range(9)])))
    assert [more for _, more in many] == [0, 0, 0, 0, 4]


def test_where_a_layer_is():
    found = layers({"layers": {"m.h.12.mlp.experts.3.up": 0.1, "lm_head": {"error": 0.2}}})
    assert [(one.block, one.kind, one.error) for one in found] == [
        (12, "mlp.experts.*.up", 0.1),
        (None, "lm_head", 0.2),
    ]


def test_charts_show_the_numbers():
    reader = read(described())
    charts = [a for tag, a in reader.tags if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == 6  # three, wide and narrow
    titles = [text for text in reader.texts if "nats:" in text]
    # 11 of the 17 tokens; 6 of the 10 English ones
    assert any("0.010 to 0.10 nats: 64.7%" in text and "English 60.0%" in text for text in titles)
    dots = [
        text for text in reader.texts if text.startswith("model.layers.4.mlp.down: error 0.49%")
    ]
    assert len(dots) == 4  # two charts of layers, twice
    assert all("Predicted 0.40%" in text for text in dots)


def test_a_worse_layer_is_higher_in_the_chart():
    worse = {"b.0.q": layer(0.001), "b.1.q": layer(0.01), "b.2.q": layer(0.1), "b.3.q": layer(0.0)}
    reader = read(described(layers=worse))
    run = next(a["points"] for tag, a in reader.tags if tag == "polyline")
    places = [tuple(map(float, pair.split(","))) for pair in run.split()]
    xs, ys = zip(*places)
    assert list(xs) == sorted(xs) and ys[0] > ys[1] > ys[2]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.3)  # tenfold is always as far
    assert ys[3] >= ys[0]


def test_passages_are_coloured_and_the_place_is_outlined():
    written = page(described(), Words("en"))
    assert '<span class="h0" title="KL 0.0100">Once</span>' in written
    assert '<mark><span class="h3" title="KL 2.00"> upon</span></mark>' in written
    assert 'class="h4" title="KL NaN"' in written  # a NaN is not calm
    assert "Next in the text: " in written
    blank = described()
    blank["worst"][0]["at"] = 2
    assert "↵" in page(blank, Words("en")).split("<mark>")[1].split("</mark>")[0]


def test_the_first_difference_is_marked():
    written = page(described(), Words("en"))
    assert "<span>in a land </span><mark>far</mark> away</p>" in written
    assert "<span>in a land </span><mark>so</mark> far</p>" in written
    assert "the same for 3 of 32 tokens" in written
    same = [{"prompt": "a", "original": "b c", "quantized": "b c"}]
    written = page(described(samples=same), Words("en"))
    assert "the same to the end" in written.split("<h2>What they write")[1]
    assert "<span>b c</span></p>" in written
    longer = [{"prompt": "a", "original": "b c", "quantized": "b c d"}]
    assert "<span>b c</span><mark> d</mark></p>" in page(described(samples=longer), Words("en"))


def test_tables_and_headings_can_be_heard():
    reader = read(described())
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("table") == tags.count("caption") > 6
    assert all(a.get("scope") in ("col", "row") for tag, a in reader.tags if tag == "th")
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for tag, attributes in reader.tags:
        if tag == "svg":
            assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_apart():
    style = (data.report() / "style.css").read_text("utf-8")
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        for ink in ("ink", "soft", "good", "fair", "poor", "bad", "c0"):
            for back in ("page", "paper"):
                assert contrast(theme[ink], theme[back]) >= 4.5, (ink, back)
        for back in ("h1", "h2", "h3"):
            assert contrast(theme["ink"], theme[back]) >= 4.5, back
        assert contrast(theme["h4-ink"], theme["h4"]) >= 4.5
        assert contrast(theme["mark-ink"], theme["mark"]) >= 4.5
        assert contrast(theme["ink"], theme["track"]) >= 4.5
        for series in range(10):  # WCAG's limit for graphics
            assert contrast(theme[f"c{series}"], theme["paper"]) >= 3, series


def test_numbers_as_people_read_them():
    values = (0.08712, 5.3249, 66.63, 12345.6, 0, None, NAN, -math.inf, 2e-9)
    assert [number(value) for value in values] == [
        "0.0871", "5.32", "66.6", "12,346", "0", "–", "NaN", "−∞", "2.00e-09",
    ]  # fmt: skip
    assert [percent(v) for v in (0.8112, 0.0021, -0.05, 0.0, 1.0)] == [
        "81.1%", "0.21%", "−5.0%", "0.0%", "100.0%",
    ]  # fmt: skip
    assert with_error(0.08712, 0.00164) == ("0.0871", "± 0.0016")
    assert with_error(0.8112, 0.0086, share=True) == ("81.1%", "± 0.9")
    assert with_error(NAN, 0.1) == ("NaN", "") and with_error(0.5, 0) == ("0.500", "")
    assert [size(v) for v in (5_870_080, 21_300_000_000, 12, None)] == [
        "5.87 MB", "21.3 GB", "12 B", "–",
    ]  # fmt: skip
    assert [change(v) for v in (1.047, 0.99)] == ["+4.7%", "−1.0%"]
    assert [tick(v) for v in (0.05, 1.0, 1e-6)] == ["0.05", "1", "10⁻⁶"]


def test_bad_requests(tmp_path):
    target = tmp_path / "report.html"
    with pytest.raises(UsageError, match="no report in 'fr'"):
        write(described(), target, "fr")
    with pytest.raises(UsageError):
        write(described(), target, "../demo/config")
    assert not target.exists()
    with pytest.raises(QuantkitError, match="cannot be written"):
        write(described(), tmp_path / "no" / "report.html")
    write(described(), target)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert Reader(target.read_text("utf-8")).text.count("small-gptq") == 2
