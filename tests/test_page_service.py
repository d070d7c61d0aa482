"""The page in a browser: what it says about the model and the service, and its sample photos."""

import json
import re

import pytest
import requests
from browser import IMAGENET, STAND_IN, THREE, Browser, about, shares, stats
from harness import ROOT, Service, wait_until
from selenium.webdriver.common.keys import Keys

from web.pages import SAMPLES

pytest_plugins = ["browser"]

RECOGNIZES = f"Recognizes {IMAGENET}. Model: lite."


@pytest.mark.parametrize(
    ("said", "text", "samples"),
    [
        (about(), RECOGNIZES, True),
        (about(description="birds of the Alps."), "Recognizes birds of the Alps. Model: lite.", False),
        (about(description=None), "Recognizes 1,000 classes. Model: lite.", False),
        ({"ready": True}, "Recognizes what its model was trained for. Model: lite.", False),
        (
            about(description=["a"], classes="x", version=7),
            "Recognizes what its model was trained for. Model: lite.",
            False,
        ),
        (about(description="<b>ImageNet</b>"), "Recognizes <b>ImageNet</b>. Model: lite.", True),
        (about(ready=False), "No model is running right now, so photos wait until one is.", False),
        ("nonsense", "No model is running right now, so photos wait until one is.", False),
    ],
)
def test_samples_are_offered_only_if_the_model_runs_and_knows_imagenet(
    service: Service, browser: Browser, said: object, text: str, samples: bool
) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(10, {"lite": said})))
    browser.open(service.url)

    wait_until(lambda: browser.text("#model") == text, text)
    assert bool(browser.all("#samples")) == samples
    assert any("/samples/" in url for url in browser.requested()) == samples
    assert browser.all("#choice, #figures-choice") == []


def test_the_page_says_whether_a_model_is_running(service: Service, browser: Browser) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(10, {})))
    browser.open(service.url)
    wait_until(lambda: browser.text("#model").startswith("No model is running"), "the page says that none is running")
    browser.script("answer = arguments[0]; document.dispatchEvent(new Event('visibilitychange'))",
                   stats(10, {}, queue_length=None))  # fmt: skip
    wait_until(lambda: "can't reach its queue" in browser.text("#model"), "the page says that Redis is down")

    browser.script("answer = arguments[0]", stats(10))

    wait_until(lambda: browser.text("#model") == RECOGNIZES, "the page notices the model by itself")


def test_the_page_says_what_the_running_model_recognizes(service: Service, browser: Browser) -> None:
    browser.open(service.url)

    wait_until(lambda: browser.text("#model") == "Recognizes handwritten digits. Model: digits.", "the model")
    assert browser.all("#samples") == []


def test_samples_can_be_classified_by_keyboard(service: Service, browser: Browser) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(10)))
    browser.open(service.url)
    buttons = wait_until(lambda: browser.all("#samples button"), "the samples are there")
    assert len(buttons) == len(SAMPLES) >= 2
    assert all(browser.script("return [...document.querySelectorAll('#samples img')].map(e => e.alt)"))
    loaded = "return [...document.querySelectorAll('#samples img')].every(e => e.complete && e.naturalWidth)"
    wait_until(lambda: browser.script(loaded), "they are shown")

    for button in buttons:
        button.send_keys(Keys.ENTER)

    wait_until(lambda: len(browser.all(".result")) == len(SAMPLES), "all are classified")
    bars = dict(zip(browser.texts(".result h3"), browser.bars(), strict=True))
    assert bars == {name: shares(service, ROOT / "images" / name) for name in SAMPLES}


# The service now


def test_the_figures_change_after_requests(service: Service, browser: Browser) -> None:
    browser.open(service.url)
    browser.open_figures()
    wait_until(lambda: browser.text("#live-state") == "ready", "the figures are there")
    assert browser.text("#rate") == "0.0"
    assert browser.text("#servers") == "1"
    assert browser.text("#models") == ready_model(service)
    for _ in range(7):
        service.predictions(THREE.read_bytes())

    wait_until(
        lambda: browser.text("#window") == "Times and batches of 7 images in the last minute.", "they count the images"
    )
    assert float(browser.text("#rate")) > 0
    assert browser.text("#queue") == "0"
    assert re.fullmatch(r"[\d.,]+ m?s", browser.text("#mean"))
    assert re.fullmatch(r"on average; half within [\d.]+ m?s, 95% within [\d.]+ m?s", browser.text("#percentiles"))
    assert browser.texts("#batches li")[0].split() == ["7", "1"]


def ready_model(service: Service) -> str:
    [server] = requests.get(f"{service.url}/readyz", timeout=10).json()["model_servers"].values()
    return str(server["model"])


def test_the_figures_cover_the_last_minute_and_reset_on_a_restart(service: Service, browser: Browser) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(1000)))
    browser.open(service.url)
    browser.open_figures()
    wait_until(lambda: browser.text("#window"), "figures since the start")
    assert browser.text("#window") == "Times and batches of 1,000 images since the service was started."
    assert (browser.text("#queue"), browser.text("#servers"), browser.text("#models")) == ("1,234", "2", "lite")

    browser.script("answer = arguments[0]", stats(1100))
    wait_until(lambda: browser.text("#window").endswith("of 100 images in the last minute."), "figures of a minute")
    # Median: 50 of the 90 images below 0.1 s, so 0.05 + 50/90 * 0.05. 95%: the middle of the 10 images above.
    assert browser.text("#mean") == "80 ms"
    assert browser.text("#percentiles") == "on average; half within 78 ms, 95% within 150 ms"
    assert browser.texts("#batches li") == ["0\n1", "0\n2", "100\n3\u20134", "0\n5\u201332"]
    assert float(browser.text("#rate")) > 5

    browser.script("answer = arguments[0]", stats(20, {}, queue_length=None))
    wait_until(
        lambda: browser.text("#window").endswith("of 20 images since the service was started."),
        "the figures are reset",
    )
    assert browser.text("#rate") == "0.0"
    assert (browser.text("#live-state"), browser.text("#queue"), browser.text("#servers")) == (
        "not ready",
        "no Redis",
        "0",
    )


def test_a_hidden_page_does_not_poll(service: Service, browser: Browser) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(10)))
    browser.open(service.url)
    wait_until(lambda: browser.text("#model"), "the page has asked for the model")
    assert browser.all(".figures") == []
    browser.open_figures()
    wait_until(lambda: browser.script("return polls") >= 3, "the page polls")
    show = "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
    show += "document.dispatchEvent(new Event('visibilitychange')); return polls"
    before = browser.script(show, True)

    browser.chrome.execute_async_script("setTimeout(arguments[0], 5000)")  # time for two polls

    assert browser.script("return polls") == before
    assert browser.script(show, False) == before + 1
    browser.all("#live summary")[0].click()
    closed = browser.script("return polls")
    browser.chrome.execute_async_script("setTimeout(arguments[0], 3000)")
    assert browser.script("return polls") == closed
