"""The page in a real browser against the real routes and engine: what a person at a desk or with a phone meets."""

import re
from dataclasses import replace

import httpx
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from bento.api import create_app
from tests.bento.openai_service import CHAT_TEMPLATE
from tests.bento.page.browser import missing, requested, set_colors, set_viewport
from tests.bento.page.opened import listening

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]

GAUGES = ("rex_num_requests_running", "rex_num_requests_waiting")
MARKUP = "<img src=x onerror=document.title='broken'>"
CONTRAST = """
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = parse(color).slice(0, 3).map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (parse(color)[3] !== 0) return color;
  }
};
const texts = "h1, h2, p, label, small, dt, dd, button:enabled, a, summary, input, textarea, #given, #generated";
return [...document.querySelectorAll(texts + ", #error")]
  .filter((element) => element.checkVisibility())
  .map((element) => {
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    return [element.id || element.tagName + " " + element.textContent.slice(0, 20), (a + 0.05) / (b + 0.05)];
  });
"""


def test_the_page_sends_no_request_to_another_host_and_obeys_its_content_security_policy(page):
    page.wait(lambda: page.text("model") == "rex-tiny:1")
    addresses = requested(page.driver)
    assert {address.removeprefix(page.address) for address in addresses} >= {"", "page/app.js", "page/style.css"}
    assert all(address.startswith(page.address) for address in addresses), addresses
    assert page.complaints == []
    assert page.focused == "prompt"


def test_text_streams_in_and_is_counted(page):
    page.fill(prompt="def main", max_tokens="20", temperature="0")
    page["generate"].click()
    page.allow(8)
    page.wait(lambda: page.text("generated"))
    assert page.is_busy and page["stop"].is_enabled() and not page["generate"].is_enabled()
    assert page.text("given") == "def main"
    part = page.text("generated")
    page.allow(100)
    page.wait(lambda: not page.is_busy)
    assert page.text("generated").startswith(part) and len(page.text("generated")) > len(part)
    assert page.text("tokens") == "20"
    assert page.text("speed").endswith("tokens/s")
    assert page.text("first-token") != "–"
    assert page.text("status") == "As many tokens as asked for."
    assert not page["error"].is_displayed() and page.complaints == []


def test_stopping_cancels_on_the_server(page):
    page.fill(prompt="def main", max_tokens="80")
    page["generate"].click()
    page.allow(6)
    page.wait(lambda: page.text("generated"))
    assert page.service.engine.stats().running == 1
    taken = page.service.steps
    page["stop"].click()
    page.wait(lambda: not page.is_busy)
    page.allow(200)
    page.wait(lambda: page.is_idle)
    assert page.service.steps - taken < 40, "the rest was generated without a reader"
    gauges = httpx.get(f"{page.address}metrics").text.splitlines()
    assert {line.split()[-1] for line in gauges if line.startswith(GAUGES)} == {"0.0"}
    assert page.text("status") == "Stopped."
    assert page.text("generated") and not page["error"].is_displayed()


def test_a_refusal_is_shown_in_the_servers_words_at_the_field_it_names(page):
    page.fill(prompt="def", temperature="-1")
    page["generate"].click()
    page.wait(lambda: page["error"].is_displayed())
    assert page.text("error").startswith("temperature is -1")
    assert page.focused == "temperature" and page["temperature"].get_attribute("aria-invalid") == "true"
    page.fill(temperature="0", max_tokens="2")
    page.allow(100)
    page["generate"].click()
    page.wait(lambda: page.text("tokens") == "2")
    assert not page["error"].is_displayed() and page["temperature"].get_attribute("aria-invalid") is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": "x", "max_tokens": "100000"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "1.5"}, "max_tokens"),
        ({"prompt": "x", "top_p": "7"}, "top_p"),
        ({"prompt": "x", "seed": "9007199254740993"}, "seed"),
    ],
)
def test_each_wrong_value_is_named(page, fields, named):
    page.fill(**fields)
    page["generate"].click()
    page.wait(lambda: page["error"].is_displayed())
    assert named in page.text("error")
    assert page.focused == named


def test_an_empty_prompt_starts_a_new_text(page):
    page.fill(prompt="", max_tokens="2")
    page.allow(100)
    page["generate"].click()
    page.wait(lambda: page.text("tokens") == "2")
    assert not page["error"].is_displayed()


def test_the_keyboard_is_enough(page):
    page.press("d")
    assert page["prompt"].get_property("value") == "d"
    page.press(Keys.TAB)
    assert page.focused == "generate"
    visited = []
    while "key" not in visited and len(visited) < 30:
        page.press(Keys.TAB)
        visited.append(page.focused)
        if page.focused == "max_tokens":
            page.press("40")
    fields = [
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop_strings",
        "key",
    ]
    assert [name for name in visited if name in fields] == fields
    page["prompt"].click()
    page.press(Keys.CONTROL, Keys.ENTER)
    page.allow(4)
    page.wait(lambda: page.text("generated"))
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.is_busy)
    assert page.text("status") == "Stopped."
    page.allow(300)
    page["generate"].send_keys(Keys.ENTER)
    page.wait(lambda: page.text("status").startswith("As many"))
    assert page.focused == "generate"


def test_every_field_has_a_label_and_the_output_announces_itself(page):
    for field in page.driver.find_elements(By.CSS_SELECTOR, "input, textarea"):
        assert field.accessible_name, field.get_attribute("id")
    assert page["output"].get_attribute("aria-live") == "polite"
    assert page["output"].accessible_name == "Result"


def test_markup_of_users_and_models_stays_text(page):
    page.fill(prompt=MARKUP, max_tokens="2")
    page.allow(100)
    page["generate"].click()
    page.wait(lambda: page.text("tokens") == "2")
    assert page.text("given") == MARKUP
    assert page.driver.title == "REX"
    assert not page["output"].find_elements(By.TAG_NAME, "img")


def test_the_address_keeps_prompt_and_parameters_and_no_key(page):
    page.fill(prompt="größer & #1 = 100 %", max_tokens="2", stop_strings="x", key="secret-of-mine")
    page["probabilities"].click()
    page.allow(100)
    page["generate"].click()
    page.wait(lambda: page.text("tokens") == "2")
    address = page.driver.current_url
    assert address.startswith(f"{page.address}#") and "secret" not in address
    page.driver.get("about:blank")
    page.driver.get(address)
    page.wait(lambda: page["prompt"].get_property("value"))
    values = {name: page[name].get_property("value") for name in ("prompt", "max_tokens", "stop_strings")}
    assert values == {"prompt": "größer & #1 = 100 %", "max_tokens": "2", "stop_strings": "x"}
    assert not page["probabilities"].is_selected() and page.complaints == []


def test_pointing_at_a_token_shows_its_probability_and_those_of_others(page):
    page.fill(prompt="def main", max_tokens="6", temperature="0")
    page.allow(100)
    page["generate"].click()
    page.wait(lambda: page.text("tokens") == "6" and not page.is_busy)
    titles = [one.get_attribute("title") for one in page["generated"].find_elements(By.TAG_NAME, "span")]
    assert titles and sum(title.count("instead of") for title in titles) == 6
    assert all(re.match(r'".+" [\d.]+ %\ninstead of\n  ".+" [\d.]+ %', title, re.DOTALL) for title in titles)
    page["probabilities"].click()
    page.driver.execute_script("document.getElementById('tokens').textContent = ''")
    page["generate"].click()
    page.wait(lambda: page.text("tokens") == "6" and not page.is_busy)
    assert not page["generated"].find_elements(By.CSS_SELECTOR, "[title]")


def test_a_conversation_goes_on_turn_by_turn(page, monkeypatch):
    page.fill(max_tokens="3")
    page["chat"].click()
    page.allow(300)
    page.fill(prompt="x")
    page["generate"].click()
    page.wait(lambda: page["error"].is_displayed())
    assert "no chat template" in page.text("error") and page.focused == "prompt"
    monkeypatch.setattr(page.service.engine.tokenizer, "chat_template", CHAT_TEMPLATE)
    said = []
    for turn in ("first", "second"):
        page.fill(prompt=turn)
        page["generate"].click()
        page.wait(lambda: page.text("status").startswith("As many") and not page["prompt"].get_property("value"))
        said.append(page.text("generated"))
        page.driver.execute_script("document.getElementById('status').textContent = ''")
    assert page.text("given") == f"You: first\n\nModel: {said[0]}\n\nYou: second\n\nModel: "
    page["clear"].click()
    assert page.text("output") == ""
    page["chat"].click()
    assert not page["clear"].is_displayed() and page.complaints == []


def test_a_chat_model_opens_a_conversation_unless_the_address_has_another_mode(page, monkeypatch):
    monkeypatch.setattr(page.service.engine.tokenizer, "chat_template", CHAT_TEMPLATE)
    page.open()
    page.wait(lambda: page.text("prompt-label") == "Message")
    assert page["chat"].is_selected() and page["clear"].is_displayed()
    assert page["prompt"].get_attribute("placeholder") == "Your message"
    page["chat"].click()
    assert page["prompt"].get_attribute("placeholder").startswith("The text to continue")
    page.allow(300)
    page.fill(max_tokens="3", prompt="x")
    page["generate"].click()
    page.wait(lambda: page.text("status").startswith("As many"))
    assert page.text("given") == "x" and "chat=false" in page.driver.current_url
    page.driver.refresh()
    page.wait(lambda: page.text("model") != "A language model that continues your text.")
    assert not page["chat"].is_selected()


def test_a_server_with_keys_shows_the_page_and_asks_for_one(page):
    app = create_app(model_name="rex-tiny:1", request_timeout_s=60, max_body_bytes=4096, api_keys=["right"])
    app.state.models.serve(page.service.engine)
    page.allow(100)
    with listening(app) as address:
        guarded = replace(page, address=address)
        guarded.open()
        guarded.fill(prompt="def", max_tokens="3")
        guarded["generate"].click()
        guarded.wait(lambda: guarded["error"].is_displayed())
        assert "key" in guarded.text("error").lower()
        assert guarded.focused == "key" and guarded["key"].get_attribute("aria-invalid") == "true"
        guarded.press("right")
        guarded.press(Keys.CONTROL, Keys.ENTER)
        guarded.wait(lambda: guarded.text("tokens") == "3")
        assert not guarded["error"].is_displayed()
        guarded.press(Keys.TAB)  # the field is left: the key is kept, and the model's name can be asked for
        guarded.wait(lambda: guarded.text("model") == "rex-tiny:1")
        guarded.driver.get("about:blank")  # no connection of the browser keeps the server


def test_the_key_stays_in_this_tab(page):
    page.fill(key="secret-of-mine")
    page.press(Keys.TAB)
    page.driver.get(page.address)
    assert page["key"].get_property("value") == "secret-of-mine"
    assert page["key"].get_attribute("type") == "password"
    assert page.driver.execute_script("return localStorage.length") == 0 and not page.driver.get_cookies()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(page, width):
    set_viewport(page.driver, width, 700, phone=True)
    page.open()
    page.fill(prompt="x" * 80, max_tokens="8")
    page.allow(100)
    page["generate"].click()
    page.wait(lambda: page.text("tokens") == "8")
    root = "document.documentElement"
    assert page.driver.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    for name in ("prompt", "generate", "stop", "output", "key"):
        box = page[name].rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page, scheme):
    set_colors(page.driver, scheme)
    page.fill(prompt="def", top_p="7")
    page["generate"].click()
    page.wait(lambda: page["error"].is_displayed())
    faint = {name: ratio for name, ratio in page.driver.execute_script(CONTRAST) if ratio < 4.5}
    assert not faint
    ground = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ("16, 21, 20" in ground) == (scheme == "dark")
