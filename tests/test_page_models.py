"""The page in a browser when the service has several models: the choice, where photos go, and the figures by model."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser import EACH_MODEL, SEVEN, STAND_IN, THREE, Browser, about, counters, shares, stats
from harness import Service, run_service, wait_until
from letters import run_letters
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

pytest_plugins = ["browser"]

DIGITS = about(description="handwritten digits", classes=10)
BIRDS = about(description="birds of the Alps", ready=False)
MODELS = {"lite": about(), "birds": BIRDS, "digits": DIGITS}
LOOK = "answer = arguments[0]; document.dispatchEvent(new Event('visibilitychange'))"
RELEASE = "release()"


def open_page(service: Service, browser: Browser, **models: Any) -> None:
    """Open the page of a service with MODELS and `models`, whose answers are held back."""
    browser.before_the_page(STAND_IN % json.dumps(stats(10, MODELS | models)) + EACH_MODEL)
    browser.open(service.url)
    wait_until(lambda: browser.all("#choice"), "the choice is there")


def options(browser: Browser) -> list[Any]:
    return browser.all("#choice input")


def chosen(browser: Browser) -> str:
    """The accessible name of the chosen model."""
    return " ".join(each.accessible_name for each in options(browser) if each.is_selected())


def posted(browser: Browser) -> list[str]:
    found: list[str] = browser.script("return posted")
    return found


def test_a_model_is_chosen_by_keyboard_and_kept_when_the_page_is_loaded_again(
    service: Service, browser: Browser
) -> None:
    open_page(service, browser)
    assert [each.accessible_name for each in options(browser)] == [
        "lite 1,000 ImageNet classes: animals, plants, food, vehicles, things",
        "birds birds of the Alps not running",
        "digits handwritten digits",
    ]
    assert chosen(browser).startswith("lite ")
    assert browser.all("#samples")
    assert browser.script("return document.querySelector('#choice legend').textContent") == "Model"

    options(browser)[0].send_keys(Keys.ARROW_UP)

    assert chosen(browser) == "digits handwritten digits"
    wait_until(lambda: not browser.all("#samples"), "the samples are gone, since the model does not know them")
    browser.open(service.url)
    wait_until(lambda: chosen(browser) == "digits handwritten digits", "the choice is kept")
    browser.choose(THREE)
    browser.script(RELEASE)
    assert browser.bars() == [["seen by digits\n90.0%"]]
    assert posted(browser) == ["predict/digits"]
    heard = "return document.querySelector('#status').textContent"
    assert browser.script(heard) == "three.png shows seen by digits, 90.0%. Model: digits."


def test_photos_stay_with_the_model_that_was_chosen_when_they_came(service: Service, browser: Browser) -> None:
    browser.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.cdp("Emulation.setFocusEmulationEnabled", enabled=True)
    open_page(service, browser)
    browser.bring("drop", *[SEVEN] * 5)  # of which one has to wait
    options(browser)[2].click()
    browser.choose(THREE)
    wait_until(lambda: len(posted(browser)) == 4, "the first are sent")
    assert browser.texts(".by") == ["Model: digits", *["Model: lite"] * 5]

    browser.script(RELEASE)

    assert browser.bars() == [["seen by digits\n90.0%"], *[["seen by lite\n90.0%"]] * 5]
    assert browser.texts(".by") == ["Model: digits", *["Model: lite"] * 5]
    assert sorted(posted(browser)) == ["predict/digits", *["predict/lite"] * 5]
    assert [each["model"] for each in json.loads(copied(browser, "json"))["results"]] == ["digits", *["lite"] * 5]
    rows = list(csv.DictReader(io.StringIO(copied(browser, "csv"))))
    assert [(row["model"], row["label"]) for row in rows] == [
        ("digits", "seen by digits"), *[("lite", "seen by lite")] * 5
    ]  # fmt: skip


def copied(browser: Browser, form: str) -> str:
    browser.all(f"#copy-{form}")[0].click()
    wait_until(lambda: "Copied" in browser.texts(f"#copy-{form}"), "it is copied")
    return str(browser.chrome.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))


def test_a_model_that_does_not_run_or_is_gone_is_shown_as_such(service: Service, browser: Browser) -> None:
    open_page(service, browser)
    options(browser)[1].click()
    waits = "The model birds is not running right now, so its photos wait until it is."
    wait_until(lambda: browser.text("#model") == waits, waits)
    assert browser.all("#samples") == []

    ready = MODELS | {"birds": BIRDS | {"ready": True}}
    browser.script("answer = arguments[0]", stats(10, ready))
    wait_until(lambda: chosen(browser) == "birds birds of the Alps", "the page notices by itself that it runs")

    browser.script(LOOK, stats(10, {"lite": about(), "digits": DIGITS}))
    gone = "The model birds is no longer served, so new photos go to lite."
    wait_until(lambda: browser.text("#notice") == gone, gone)
    assert chosen(browser).startswith("lite ")

    browser.script(LOOK, stats(10, {}, queue_length=None))
    wait_until(lambda: "can't reach its queue" in browser.text("#model"), "the page says that Redis is down")
    assert len(options(browser)) == 2  # what was known stays

    browser.script(LOOK, stats(10, {"digits": DIGITS}))
    wait_until(lambda: not browser.all("#choice"), "nothing is left to choose")
    assert browser.text("#model") == "Recognizes handwritten digits. Model: digits."


def test_the_page_survives_models_of_any_kind(service: Service, browser: Browser) -> None:
    many = {"description": 1, "classes": "x", "latency": 3, "images": "x", "queue_length": [], "ready": "yes"}
    odd: dict[str, Any] = {"a": None, "b": [], "c": 7, "d": many}
    open_page(service, browser, **odd)
    browser.open_figures()
    wait_until(lambda: browser.text("#window"), "the figures are there")

    named = [each.accessible_name for each in options(browser)]
    assert [name for name in named if len(name.split()[0]) == 1] == [f"{name} not running" for name in "abcd"]
    for name in (*odd, "lite"):
        figures_of(browser, name)
        assert browser.text("#rate") == "0.0"
        assert browser.text("#queue") == "0"


def figures_of(browser: Browser, name: str) -> None:
    """Choose the model whose figures are shown."""
    [choice] = browser.all("#figures-of")
    assert choice.accessible_name == "Figures of"
    Select(choice).select_by_value(name)


def of_each(lite: int, digits: int) -> dict[str, Any]:
    """A body of /stats after so many images for two models that run and one that does not."""
    models = {
        "lite": about(**counters(lite), queue_length=4),
        "digits": DIGITS | counters(digits) | {"queue_length": 0},
        "birds": BIRDS | counters(0) | {"queue_length": 9},
    }
    return stats(lite + digits, models, queue_length=13)


def seen(browser: Browser) -> list[str]:
    names = ("queue", "servers", "models", "live-state")
    return [browser.text(f"#{name}") for name in names]


def test_figures_are_shown_for_all_models_or_one(service: Service, browser: Browser) -> None:
    browser.before_the_page(STAND_IN % json.dumps(of_each(1000, 500)))
    browser.open(service.url)
    browser.open_figures()
    wait_until(lambda: browser.text("#window"), "the figures are there")
    assert seen(browser) == ["13", "4", "lite, digits, birds (not running)", "ready"]

    browser.script("answer = arguments[0]", of_each(1000, 620))
    wait_until(lambda: browser.text("#window").endswith("of 120 images in the last minute."), "figures of all")
    assert float(browser.text("#rate")) > 5
    figures_of(browser, "digits")
    assert seen(browser) == ["0", "2", "digits", "ready"]
    assert float(browser.text("#rate")) > 5
    assert browser.text("#window") == "Times and batches of 120 images in the last minute."
    figures_of(browser, "lite")
    assert seen(browser) == ["4", "2", "lite", "ready"]
    assert browser.text("#rate") == "0.0"
    assert browser.text("#window") == "Times and batches of 1,000 images since the service was started."
    figures_of(browser, "birds")
    assert seen(browser) == ["9", "0", "birds (not running)", "not ready"]
    assert browser.text("#percentiles") == ""

    browser.script("answer = arguments[0]", stats(1620, {"lite": about(**counters(1000))}))
    wait_until(lambda: not browser.all("#figures-choice"), "a single model needs no choice")
    assert browser.text("#window").endswith("images in the last minute.")  # of all


@pytest.fixture
def both(redis_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the digits model and, as a second one, letters."""
    folder = tmp_path_factory.mktemp("both")
    with run_service(folder) as service, run_letters(service, folder):
        yield service


def test_each_model_of_a_real_service_answers_on_the_page(both: Service, browser: Browser) -> None:
    with browser.at(both.url):
        wait_until(lambda: len(options(browser)) == 2, "the choice is there")
        assert [each.accessible_name for each in options(browser)] == ["digits handwritten digits", "letters letters"]
        browser.choose(SEVEN)
        options(browser)[1].click()
        browser.choose(THREE)

        letter, digit = browser.bars()
        assert digit == shares(both, SEVEN)
        assert letter[0].startswith("d\n")  # the fourth letter stands for 3
        assert browser.texts(".by") == ["Model: letters", "Model: digits"]
        browser.open_figures()
        Select(wait_until(lambda: browser.all("#figures-of"), "figures by model")[0]).select_by_value("letters")
        wait_until(lambda: browser.text("#window").startswith("Times and batches of 1 image "), "figures of letters")
        assert seen(browser) == ["0", "1", "letters", "ready"]
