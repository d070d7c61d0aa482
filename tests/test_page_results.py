"""The page in a browser: choosing, dropping and pasting images, seeing their results and copying them."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from browser import HELD, LINE, SEVEN, THREE, TWO, Browser, shares
from harness import ROOT, Service, assert_error, wait_until
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["browser"]


def test_a_chosen_file_is_shown_with_its_predictions(service: Service, browser: Browser) -> None:
    browser.open(service.url)
    browser.choose(SEVEN)

    assert browser.bars() == [shares(service, SEVEN)]
    assert browser.text(".result .label").startswith("7 ")
    widths = browser.script(
        "return [...document.querySelectorAll('.track')].map(t => t.firstChild.offsetWidth / t.offsetWidth)"
    )
    assert widths[0] == pytest.approx(service.predictions(SEVEN.read_bytes())[0]["probability"], abs=0.01)
    assert widths == sorted(widths, reverse=True)
    assert re.search(
        r"Took \d+ ms in the service \(prepare \d+, queue \d+, compute \d+, batch of 1\)", browser.text(".took")
    )
    assert browser.script("return document.querySelector('canvas.preview').width") > 0
    assert browser.text("h1") == "What does your photo show?"
    assert browser.text(".welcome") == LINE
    sizes = browser.script(
        "return ['.welcome', '#model'].map(e => parseFloat(getComputedStyle(document.querySelector(e)).fontSize))"
    )
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_dropped_and_pasted_images_keep_their_order(service: Service, browser: Browser, way: str) -> None:
    browser.open(service.url)
    browser.bring(way, SEVEN, THREE, TWO)

    assert browser.bars() == [shares(service, each) for each in (SEVEN, THREE, TWO)]
    assert browser.texts(".result h3") == ["seven.jpg", "three.png", "two.webp"]
    assert browser.all(".drop") == []


def test_a_new_drop_is_shown_first_while_others_still_run(service: Service, browser: Browser) -> None:
    browser.before_the_page(HELD)
    browser.open(service.url)
    browser.choose(SEVEN)
    wait_until(lambda: browser.script("return asked") == 1, "the first is sent")

    browser.bring("drop", THREE, TWO)
    browser.script("release()")

    assert browser.bars() == [shares(service, each) for each in (THREE, TWO, SEVEN)]
    assert browser.texts(".result h3") == ["three.png", "two.webp", "seven.jpg"]
    assert browser.script("return asked") == 3


def test_clear_empties_the_list_and_cancels_requests(service: Service, browser: Browser) -> None:
    browser.before_the_page(HELD)
    browser.open(service.url)
    browser.bring("drop", *[THREE] * 6)
    wait_until(lambda: browser.script("return asked") == 4, "some are sent")

    browser.all("#clear")[0].click()
    browser.script("release()")

    assert browser.all(".result, #results-section") == []
    assert browser.chrome.switch_to.active_element.get_attribute("id") == "files"
    browser.choose(SEVEN)
    assert browser.bars() == [shares(service, SEVEN)]
    assert browser.script("return asked") == 5  # the two that were not sent yet never are


# Stands in for the service: /predict answers at once. The object URLs of the page are counted.
INSTANT = """
const real = window.fetch;
window.fetch = (address, ...rest) => address !== "predict" ? real(address, ...rest)
  : Promise.resolve(new Response('{"success":true,"predictions":[{"label":"tabby","probability":0.9}]}'));
window.addresses = 0;
const [create, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
URL.createObjectURL = (blob) => (window.addresses++, create(blob));
URL.revokeObjectURL = (address) => (window.addresses--, revoke(address));
"""


def test_the_page_holds_200_images_and_says_so(service: Service, browser: Browser) -> None:
    browser.before_the_page(INSTANT)
    browser.open(service.url)
    browser.bring("drop", *[THREE] * 198)
    browser.bring("drop", *[THREE] * 5)

    assert browser.text("#notice").startswith("This page holds 200 images, so 3 images were left out.")
    answered = "200 images: 200 answered; most common: tabby 200."
    wait_until(lambda: browser.text("#summary") == answered, "all are answered")
    previews = "return document.querySelectorAll('canvas.preview').length"
    wait_until(lambda: browser.script(previews) == 200, "all are shown", 60)
    assert browser.script("return addresses") == 0
    browser.all("#clear")[0].click()
    assert browser.all("#notice, .result") == []


def test_many_images_are_rows_with_a_summary(service: Service, browser: Browser, tmp_path: Path) -> None:
    text, empty = tmp_path / "notes.txt", tmp_path / "empty.png"
    text.write_text("No image.")
    empty.write_bytes(b"")
    browser.open(service.url)
    browser.bring("drop", *[THREE] * 6)
    browser.bars()
    assert browser.all("#summary, .more") == []
    tall = browser.all(".result")[0].size["height"]

    browser.bring("drop", *[SEVEN] * 9, text, empty)

    wait_until(browser.all_answered, "all have an answer")
    summary = "17 images: 15 answered, 2 failed; most common: 7 9, 3 6."
    assert browser.text("#summary") == summary
    rows = browser.all(".result")
    assert max(row.size["height"] for row in rows[:9]) < tall / 3
    best = shares(service, SEVEN)[0]
    assert rows[0].text.split("\n")[0] == "seven.jpg"
    assert browser.texts(".bars")[0] == best
    assert browser.texts(".error") == [
        "This is text, so send a file of JPEG, PNG, GIF, WEBP, BMP, TIFF, HEIC or AVIF.",
        "This file is empty (0 bytes), so choose another.",
    ]
    heard = "return document.querySelector('#status').textContent"
    assert browser.script(heard) == summary  # not each of the 17 results

    more = browser.all(".more")[0]
    assert (more.accessible_name, more.get_attribute("aria-expanded")) == ("Details of seven.jpg", "false")
    more.send_keys(Keys.ENTER)
    assert more.get_attribute("aria-expanded") == "true"
    assert browser.texts(".bars")[0].split("\n") == "\n".join(shares(service, SEVEN)).split("\n")


HOSTILE = ["=1+1.png", "+1.png", "-1.png", "@SUM(A1).png", "\t=1.png", ' "a", b.png ', "new\nline.png"]


def test_results_are_copied_as_json_and_as_csv(service: Service, browser: Browser) -> None:
    browser.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.cdp("Emulation.setFocusEmulationEnabled", enabled=True)
    browser.open(service.url)
    browser.bring("drop", *[SEVEN] * 7, names=HOSTILE)
    nothing = ROOT / "LICENSE"
    browser.bring("drop", nothing)
    browser.bars()

    predictions = service.predictions(SEVEN.read_bytes())
    copied = json.loads(copy(browser, "json"))
    assert copied["success"] is False
    error = assert_error(service.post(nothing.read_bytes()), 400, "bad_image")
    assert copied["results"][0] == {
        "file": "LICENSE", "model": "digits", "success": False, "error": {"code": "bad_image", "message": error}
    }  # fmt: skip
    assert [each["file"] for each in copied["results"][1:]] == HOSTILE
    assert copied["results"][1]["success"] is True
    assert copied["results"][1]["model"] == "digits"
    labels = [each["label"] for each in predictions]
    assert [each["label"] for each in copied["results"][1]["predictions"]] == labels

    text = copy(browser, "csv")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0][:6] == ["file", "label", "probability", "error", "model", "label_2"]
    assert {len(row) for row in rows} == {13}
    assert rows[1][:5] == ["LICENSE", "", "", error, "digits"]
    guarded = [f"'{name}" for name in HOSTILE[:5]] + HOSTILE[5:]
    assert [row[0] for row in rows[2:]] == guarded
    assert rows[2][1:5] == ["7", str(copied["results"][1]["predictions"][0]["probability"]), "", "digits"]
    assert text.endswith("\r\n")


def copy(browser: Browser, form: str) -> str:
    """Press the button, and return the text in the clipboard once the page says that it was copied."""
    button = browser.all(f"#copy-{form}")[0]
    button.click()
    wait_until(lambda: button.text == "Copied", "the button says that it was copied")
    return str(browser.chrome.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))


def test_without_a_clipboard_results_can_be_selected_or_saved(
    service: Service, browser: Browser, tmp_path: Path
) -> None:
    browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.before_the_page("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as with plain HTTP
    browser.open(service.url)
    browser.choose(SEVEN)
    browser.bars()
    browser.all("#copy-csv")[0].click()

    [area] = wait_until(lambda: browser.all("#export-text"), "the text is there")
    text = area.get_property("value")
    assert text.startswith("file,label,probability,error,model,label_2")
    assert browser.chrome.switch_to.active_element == area
    assert browser.script("return String(getSelection())") == text
    [link] = browser.all("#save")
    assert link.get_attribute("download") == "results.csv"
    link.click()
    saved = tmp_path / "results.csv"
    wait_until(saved.exists, "it is saved")
    assert saved.read_bytes().decode("utf-8-sig").replace("\r\n", "\n") == text  # a text field has \n
    browser.all("#export-close")[0].click()
    assert browser.all("#export") == []
