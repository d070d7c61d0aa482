"""The page in a browser: accessibility, dark mode, phones, and no JavaScript."""

import json
import re
from pathlib import Path

import pytest
from axe_core_python.selenium import Axe
from browser import LINE, SEVEN, STAND_IN, THREE, TO_DEFAULT, Browser, about, counters, shares, stats
from harness import Service, wait_until
from selenium.webdriver.common.by import By

pytest_plugins = ["browser"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_in_every_state(service: Service, browser: Browser, tmp_path: Path, scheme: str) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("No image.")
    browser.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    browser.open(service.url)
    browser.choose(SEVEN, text)
    browser.bars()
    browser.open_figures()
    wait_until(lambda: browser.text("#live-state") == "ready", "the figures are there")
    for part in ("#key-form", "#samples", "#notice", "#export"):
        browser.script("document.querySelector(arguments[0]).hidden = false", part)
    browser.script("document.querySelector('#notice').textContent = 'Something.'")
    browser.script("document.querySelector('#export label').textContent = 'The results.'")
    assert_accessible(browser)

    browser.script("document.querySelector('#key-form').hidden = true")
    browser.bring("drop", *[THREE] * 6)
    wait_until(browser.all_answered, "all have an answer")
    browser.all(".more")[0].click()
    assert_accessible(browser)


def assert_accessible(browser: Browser) -> None:
    found = Axe().run(browser.chrome, options={"resultTypes": ["violations", "incomplete"]})
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    assert "color-contrast" in {each["id"] for each in found["passes"]}
    assert browser.script("return document.getAnimations().length") == 0


def test_dark_or_light_follows_the_system(service: Service, browser: Browser) -> None:
    browser.open(service.url)
    seen = []
    for scheme in ("light", "dark"):
        browser.media(prefers_color_scheme=scheme)
        color = browser.script("return getComputedStyle(document.body).backgroundColor")
        seen.append(sum(map(int, re.findall(r"\d+", color))))

    assert seen[0] > 700
    assert seen[1] < 100


def test_a_phone_scrolls_only_down_and_can_take_a_photo(service: Service, browser: Browser, tmp_path: Path) -> None:
    photo, text = tmp_path / f"{'holiday' * 20}.jpg", tmp_path / "notes.txt"
    photo.write_bytes(SEVEN.read_bytes())
    text.write_text("No image.")
    browser.size(360, phone=True)
    models = {"efficientnet_lite0" * 5: about(**counters(0)), "digits": about(), "b" * 80: {}}
    browser.before_the_page(STAND_IN % json.dumps(stats(123_456_789, models)) + TO_DEFAULT)
    browser.open(service.url)
    browser.script("document.querySelector('#key-form').hidden = false")
    browser.choose(photo, text)
    browser.bars()
    place = "const {top, bottom} = document.querySelector('.result').getBoundingClientRect(); return [top, bottom]"
    wait_until(lambda: browser.script(place)[0] < 200, "the result is in view")
    assert browser.script(place)[0] > 0
    assert browser.script(place)[1] < 800
    browser.open_figures()
    wait_until(lambda: browser.text("#window"), "the figures are there")
    browser.script("document.querySelector('#key-form').hidden = false")

    width = "return [document.documentElement.scrollWidth, window.innerWidth]"
    assert browser.script(width) == [360, 360]
    assert browser.texts(".camera label") == ["Take a photo"]
    camera = browser.chrome.find_element(By.ID, "photo")
    assert (camera.get_attribute("capture"), camera.get_attribute("accept")) == ("environment", "image/*")
    camera.send_keys(str(THREE))
    wait_until(lambda: browser.texts(".result h3")[0] == "three.png", "the photo is the first")
    assert browser.bars()[0] == shares(service, THREE)
    browser.bring("drop", *[photo, text] * 3)
    wait_until(browser.all_answered, "all have an answer")
    browser.all(".more")[0].click()
    assert browser.script(width) == [360, 360]


def test_without_javascript_the_form_posts_plainly(service: Service, browser: Browser) -> None:
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(service.url)
    assert LINE in browser.text("main")
    assert browser.all("#live, #key-form, #camera, #samples, #results-section, .drop, kbd, svg") == []
    controls = [each.get_attribute("id") or each.text for each in browser.all("main button, main input, main select")]
    assert controls == ["files", "Classify"]
    browser.choose(SEVEN)
    [button] = browser.all("button")
    button.click()

    answer = json.loads(wait_until(lambda: browser.text("pre"), "the answer is there"))
    assert answer["predictions"][0]["label"] == "7"
