"""The page in a real browser, before a real server.

Needs playwright and a Chromium: the one that playwright installs, or $CHROMIUM."""

import json
import os
import shutil

import pytest
from serving import demo, running
from tools import quantized

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as found:
        try:
            made = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture(scope="module")
def server():
    with running(demo(), demo("small", str(quantized()), max_tokens=40), demo("twin")) as found:
        yield found


@pytest.fixture
def page(browser, server):
    yield from opened(browser, server)


@pytest.fixture
def japanese(browser, server):
    yield from opened(browser, server, locale="ja-JP", viewport={"width": 390, "height": 780})


def opened(browser, server, **options):
    context = browser.new_context(**{"locale": "en-US", **options})
    found = context.new_page()
    wrong: list[str] = []  # scripts that fail, and what the content policy keeps out
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda message: wrong.append(message.text))
    asked: list[str] = []
    found.on("request", lambda request: asked.append(request.url))
    found.goto(server.url)
    found.wait_for_selector("#model option", state="attached")
    yield found
    assert [text for text in wrong if "the server responded with a status" not in text] == []
    assert all(url.startswith(server.url) for url in asked), "it loads something from elsewhere"
    context.close()


def ask(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def ended(page) -> None:
    page.wait_for_selector("#stop", state="hidden")


def bodies_of(page) -> list[dict]:
    """What the page sends, as it does."""
    found: list[dict] = []
    page.on("request", lambda one: found.append(one.post_data_json) if one.post_data else None)
    return found


def answered_with(page, text: str) -> None:
    """The next answers of the server are ``text``."""
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    end = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}}
    body = "".join(f"data: {json.dumps(one)}\n\n" for one in (chunk, end)) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )


def test_a_conversation(page, server):
    ask(page, "日本の首都はどこですか。")
    page.wait_for_selector("article.assistant:not(.writing)")
    messages = [{"role": "user", "content": "日本の首都はどこですか。"}]
    said = server.post("/v1/chat/completions", messages=messages).json()["choices"][0]["message"]
    assert page.text_content("article.user .body") == messages[0]["content"]
    assert page.text_content("article.assistant .body") == said["content"]
    assert "tokens/s" in page.text_content("article.assistant footer")
    assert "GB in memory" in page.text_content("#memory")

    ask(page, "The history of")
    ended(page)
    assert page.locator("article.assistant").count() == 2
    page.click("text=Again")  # only the newest answer has it
    ended(page)
    assert page.locator("article").count() == 4


def test_it_can_be_stopped(page, server):
    page.click("#settings-open")
    page.fill("#set-temperature", "1.5")
    page.fill("#set-max_tokens", "1500")
    page.fill("#stop-strings", "")
    page.keyboard.press("Escape")
    ask(page, "The history of the city and all its people, in many words")
    page.wait_for_selector("article.writing .body:not(:empty)")
    page.keyboard.press("Escape")
    ended(page)
    assert "stopped" in page.text_content("article.assistant footer")
    load = server.models[0].engine.load
    page.wait_for_timeout(300)
    assert load().running == 0


def test_settings_go_into_the_request(page):
    sent = bodies_of(page)
    page.click("#settings-open")
    assert "### 指示" in page.text_content("#template")
    page.fill("#system", "短く答えて。")
    page.fill("#set-temperature", "0.5")
    page.fill("#set-seed", "7")
    page.fill("#stop-strings", "。\n###")
    page.click("text=Done")
    ask(page, "やあ")
    ended(page)
    assert sent[0]["temperature"] == 0.5 and sent[0]["seed"] == 7
    assert sent[0]["stop"] == ["。", "###"]
    assert sent[0]["messages"] == [
        {"role": "system", "content": "短く答えて。"},
        {"role": "user", "content": "やあ"},
    ]
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    page.click("#settings-open")
    assert page.input_value("#set-seed") == "7"
    page.click("text=Reset")
    assert page.input_value("#set-seed") == "" == page.input_value("#system")


def test_conversations_are_kept_and_deleted(page):
    for text in ("first talk", "second talk"):
        page.click("#new")
        ask(page, text)
        ended(page)
    page.reload()
    page.wait_for_selector("#list li")
    titles = page.locator("#list .entry").all_text_contents()
    assert titles == ["second talk", "first talk"]
    page.click("#list >> text=first talk")
    assert page.text_content("article.user .body") == "first talk"
    assert page.locator("article.assistant").count() == 1
    page.on("dialog", lambda dialog: dialog.accept())
    page.hover("#list li:has-text('first talk')")
    page.click("[aria-label='Delete: first talk']")
    assert page.locator("#list .entry").all_text_contents() == ["second talk"]
    assert page.locator("article").count() == 0


def test_what_a_model_says_never_becomes_markup(page):
    text = (
        "<img src=x onerror=alert(1)><script>alert(2)</script> [a](javascript:alert(3)) "
        "[b](https://example.com/?a=1&b=2)\n\n```html\n<b>x</b>\n```\n\n"
        '<svg onload=alert(4)>\n\n| <i>h</i> |\n|---|\n| <a href="x">c</a> |\n'
    )
    answered_with(page, text)
    page.on("dialog", lambda dialog: pytest.fail(f"the page ran {dialog.message}"))
    ask(page, "<b>mine</b>")
    ended(page)
    body = page.locator("article.assistant .body")
    for tag in ("img", "script", "svg", "b", "i"):
        assert body.locator(tag).count() == 0, tag
    assert page.locator("article.user .body b").count() == 0
    assert "<script>alert(2)</script>" in body.inner_text()
    assert [a.get_attribute("href") for a in body.locator("a").all()] == [
        "https://example.com/?a=1&b=2"
    ]
    assert body.locator("pre code").inner_text() == "<b>x</b>"
    page.reload()  # the same from what the browser saved
    page.click("#list .entry")
    assert page.locator("article.assistant .body img").count() == 0


def test_markdown(page):
    text = (
        "# Title\n\nSome **bold *both* text**, `a*b*c` and 2*3*4\nnext line\n\n1. one\n2. two\n"
        "   - inner\n\n> quoted\n\n- [x](http://e.org)\n\n---\n\n"
        "| a | b |\n|---|:-:|\n| 1 | 2 |\n\n"
        "```python\ndef f():\n    return '**'\n```\n\n```\nnot closed"
    )
    answered_with(page, text)
    ask(page, "markdown")
    ended(page)
    body = page.locator("article.assistant .body")
    assert body.locator("h3").inner_text() == "Title"
    assert body.locator("strong").inner_text() == "bold both text"
    assert body.locator("strong em").inner_text() == "both"
    assert body.locator("p code").inner_text() == "a*b*c"
    assert body.locator("ol > li").count() == 2
    assert body.locator("ol ul li").inner_text() == "inner"
    assert body.locator("blockquote").inner_text() == "quoted"
    assert body.locator("td").all_text_contents() == ["1", "2"]
    assert body.locator("pre").all_text_contents() == ["def f():\n    return '**'", "not closed"]
    assert body.locator("pre").first.get_attribute("data-language") == "python"


def test_enter_while_a_word_is_converted_does_not_send(page):
    page.fill("#input", "にほん")
    for event in ({"isComposing": True}, {"keyCode": 229}):
        page.evaluate(
            """(more) => document.getElementById("input").dispatchEvent(new KeyboardEvent(
                "keydown", {key: "Enter", bubbles: true, cancelable: true, ...more}))""",
            event,
        )
        assert page.locator("article").count() == 0
        assert page.input_value("#input") == "にほん"
    page.press("#input", "Shift+Enter")
    assert page.input_value("#input") == "にほん\n"
    page.press("#input", "Enter")
    ended(page)
    assert page.locator("article.user").count() == 1


def test_models_are_compared(page):
    page.click("#tab-compare")
    assert page.locator("#chosen input:checked").count() == 3
    sent = bodies_of(page)
    ask(page, "The history of the city")
    ended(page)
    assert {one["model"] for one in sent} == {"demo", "small", "twin"}
    assert {one["seed"] for one in sent} == {1}
    bodies = page.locator("#columns .columns .body").all_inner_texts()
    heads = page.locator("#columns .columns header").all_inner_texts()
    assert "reference" in heads[0]
    assert bodies[2] == bodies[0] and "the same text" in heads[2]
    assert bodies[1] != bodies[0]
    marks = page.locator("#columns article").nth(2).locator("mark")
    assert marks.count() > 0 and "alike" in heads[1]
    page.uncheck("#chosen input >> nth=1")
    page.uncheck("#chosen input >> nth=2")
    ask(page, "x")
    assert "Choose two or three models" in page.text_content("#trouble")


def test_refusals_are_shown(page):
    page.click("#settings-open")
    page.fill("#set-max_tokens", "5000")
    page.click("text=Done")
    ask(page, "hello")
    ended(page)
    assert "maximum context length is 2048 tokens" in page.text_content("#trouble")
    assert page.locator("article.assistant").count() == 0


def test_japanese_on_a_phone(japanese):
    page = japanese
    assert page.get_attribute("html", "lang") == "ja"
    assert page.text_content("#send") == "送信"
    ask(page, "日本の首都はどこですか。")
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not page.is_visible("#new")
    page.click("#menu")
    page.click("#new")
    assert page.locator("article").count() == 0
    page.click("#lang")
    page.wait_for_selector("html[lang=en]")
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.text_content("#send") == "Send"


def test_every_word_is_there_in_every_language():
    from quantkit import data

    words = {file.stem: json.loads(file.read_text("utf-8")) for file in data.page().glob("*.json")}
    assert words.keys() == {"en", "ja"}
    assert words["en"].keys() == words["ja"].keys()


def test_light_and_dark(page):
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after


def test_with_a_key(browser):
    with running(demo(), api_key="secret") as server:
        page = browser.new_context(locale="en-US").new_page()
        page.goto(server.url)
        page.wait_for_selector("#trouble:not([hidden])")
        assert "API key" in page.text_content("#trouble")
        page.click("#settings-open")
        page.fill("#api-key", "secret")
        page.click("text=Done")
        page.wait_for_selector("#model option", state="attached")
        ask(page, "hello")
        ended(page)
        assert page.locator("article.assistant").count() == 1
        page.context.close()
