"""Limits: how they are written, what passes, and who is told."""

import json
from xml.etree import ElementTree

import pytest
from tools import command, quantized, sentence

from quantkit.errors import UsageError
from quantkit.workflows import gate
from quantkit.workflows.gate import DEFAULTS, Gate, Limit
from quantkit.workflows.verify import verify

MEASURED = {
    "kl": 0.1,
    "top1": 0.9,
    "perplexity_ratio": 1.05,
    "sets": {
        "en": {"kl": 0.05, "top1": 0.95, "perplexity_ratio": 1.01},
        "ja": {"kl": 0.15, "top1": 0.85, "perplexity_ratio": 1.09},
    },
}
SHORT = ["--rows", 1, "--seqlen", 16, "--no-samples", "--no-write", "-q"]


def judged(bits=4.2, nonfinite=0, usual=False, **limits):
    given = {"max_kl": None, "min_top1": None, "max_ppl_ratio": None, **limits}
    return Gate.of(**given, usual=usual).judge(MEASURED, bits, nonfinite)


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({"max_kl": 0.1}, True),
        ({"max_kl": 0.0999}, False),
        ({"max_kl": "ja=0.14"}, False),
        ({"max_kl": ["0.1", "en=0.05", "ja=0.15"]}, True),
        ({"max_kl": "en=0.14"}, True),
        ({"min_top1": 0.9}, True),
        ({"min_top1": 0.91}, False),
        ({"min_top1": "ja=0.9"}, False),
        ({"max_ppl_ratio": ("1.05", "ja=1.09")}, True),
        ({"max_ppl_ratio": ("1.05", "ja=1.08")}, False),
    ],
)
def test_what_passes(limits, passed):
    found = judged(**limits)
    assert found["passed"] is passed
    assert found["passed"] == all(check["passed"] for check in found["checks"])


@pytest.mark.parametrize("text", ["x", "ja=", "ja=x", "=1", "nan", "-1", "inf", ""])
def test_what_is_no_limit(text):
    with pytest.raises(UsageError, match="--min-top1 takes a number or SET=NUMBER"):
        Gate.of(None, text, None, False)


def test_two_limits_for_one_are_refused():
    with pytest.raises(UsageError, match="--max-kl is given 2 times for mean"):
        Gate.of(["0.1", "5"], None, None, False)
    with pytest.raises(UsageError, match="--max-kl is given 3 times for ja"):
        Gate.of(["ja=0.1", "ja=5", "1", "ja=0.1"], None, None, False)


def test_nothing_to_judge():
    assert not Gate.of(None, None, None, False)
    assert not Gate.of((), [], None, False)
    assert Gate.of(0.0, None, None, False)
    assert Gate.of(None, None, None, True)
    assert Gate.of("hf:a=b=0.5", None, None, False).limits == [Limit("kl", "hf:a=b", 0.5)]


@pytest.mark.parametrize(
    ("bits", "row"), [(16.0, 0), (8.3, 0), (None, 0), (6.6, 1), (4.16, 2), (3.2, 3), (2.2, 4)]
)
def test_usual_limits_by_bits(bits, row):
    checks = judged(bits=bits, usual=True)["checks"]
    assert [check["limit"] for check in checks] == [*DEFAULTS[row][1:], 0.0]
    assert [check["what"] for check in checks] == [*gate.NAMES, "nonfinite"]


def test_limits_that_are_given_replace_the_usual_ones():
    found = judged(usual=True, max_kl=0.01)
    assert [c["limit"] for c in found["checks"] if c["what"] == "kl"] == [0.01]
    assert len(found["checks"]) == 4
    assert judged(usual=True)["passed"]
    broken = judged(usual=True, nonfinite=2)
    assert not broken["passed"]
    assert "2 tensors or layers" in gate.told(broken["checks"][-1])


def test_fewer_bits_may_lose_more():
    bits, kl, top1, ratio = zip(*DEFAULTS)
    assert list(bits) == sorted(bits, reverse=True) and bits[-1] == 0
    assert list(kl) == sorted(kl)
    assert list(top1) == sorted(top1, reverse=True)
    assert list(ratio) == sorted(ratio)


# the command


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (["--max-kl", "ja:1"], "--max-kl takes a number or SET=NUMBER, not 'ja:1'"),
        (["--max-kl", "fr=1"], "--max-kl is for a text 'fr', which is not measured"),
        (["--junit", "x.xml"], "--junit has nothing to tell"),
        (["--junit", "no/x.xml", "--gate"], "there is no folder for no/x.xml"),
        (["--report", "no/x.html"], "there is no folder for no/x.html"),
        (["--github"], "--github works inside of a GitHub job only"),
    ],
)
def test_refused_before_anything_is_measured(limit, message, capsys, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr("quantkit.workflows.verify.Bench.measure", lambda *_: pytest.fail("run"))
    assert command("verify", quantized(), *SHORT, *limit) == 2
    assert sentence(capsys.readouterr().err)[0] == message


def test_junit_and_the_summary_of_a_job(tmp_path, capsys, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    limits = ["--max-kl", 9, "--max-kl", "ja=0.0001", "--min-top1", "en=0"]
    files = ["--junit", tmp_path / "gate.xml", "--github", "--json"]
    assert command("verify", quantized(), *SHORT, *limits, *files) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    told = sentence(captured.err)[0]
    assert told == f"mean KL on ja {found['sets']['ja']['kl']:.4f} is above --max-kl 0.0001"
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    cases = {case.get("name"): case.find("failure") for case in suite}
    assert list(cases) == ["kl mean", "kl ja", "top1 en"]
    assert cases["kl ja"].get("message") == told
    assert cases["kl mean"] is None
    text = summary.read_text("utf-8")
    assert text.startswith("before\n") and f"**failed**: {told}" in text


def test_a_gate_that_is_passed_says_so(capsys):
    assert command("verify", quantized(), *SHORT, "--max-kl", "9") == 0
    assert "passed: 1 limits were kept" in capsys.readouterr().out


def test_a_share_is_no_percentage():
    with pytest.raises(UsageError) as caught:
        Gate.of(None, "95", None, False)
    assert caught.value.hint == "write 0.95"


def test_one_text_is_one(tmp_path):
    file = tmp_path / "held.txt"
    file.write_text("The city lies at the river. " * 40, "utf-8")
    found = verify(
        str(quantized()), text=str(file), rows=1, seqlen=64, samples=False, write=False
    ).described()
    assert list(found["sets"]) == ["held"]
