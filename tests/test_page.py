"""The pages in a browser: what somebody sees, hears and does there, and that the browser has nothing to complain of."""

import base64
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests
from axe_core_python.selenium import Axe
from conftest import ROOT, Service, assert_error, free_port, need, responds, run_apache, running, wait_until
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from web.pages import FILES, SAMPLES, SCRIPTS

SEVEN, THREE, TWO = (ROOT / "models/digits" / name for name in ("seven.jpg", "three.png", "two.webp"))
BROWSERS = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
KEY = "the-key-of-2026-is-this"
LINE = "Welcome to the PyImageSearch Keras REST API!"
IMAGENET = "1,000 ImageNet classes: animals, plants, food, vehicles, things"


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = need("chromium")
    for argument in ("--headless=new", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, ChromeService(need("chromedriver")))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


class Browser:
    """A tab of its own for each test, by what somebody sees there."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.chrome.execute_cdp_cmd(command, arguments)

    def open(self, url: str) -> None:
        self.url = url
        self.chrome.get(url)

    @contextmanager
    def at(self, url: str) -> Iterator[None]:
        """Open a page that is left before its service ends."""
        self.open(url)
        yield
        self.chrome.get("about:blank")

    def all(self, selector: str) -> list[Any]:
        return [each for each in self.chrome.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()]

    def texts(self, selector: str) -> list[str]:
        return [each.text for each in self.all(selector)]

    def text(self, selector: str) -> str:
        return " ".join(self.texts(selector))

    def script(self, code: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(code, *arguments)

    def choose(self, *files: Path) -> None:
        self.chrome.find_element(By.ID, "files").send_keys("\n".join(map(str, files)))

    def bars(self) -> list[list[str]]:
        """What the bars of each result say, once all results are there."""
        wait_until(self.all_answered, "every image has an answer")
        return [
            [bar.text for bar in result.find_elements(By.CSS_SELECTOR, ".bars li")] for result in self.all(".result")
        ]

    def all_answered(self) -> bool:
        return bool(self.all(".result")) and not self.all(".wait") and not self.all("[aria-busy]")

    def bring(self, event: str, *files: Path, names: Sequence[str] = ()) -> None:
        """Drop or paste files, as the browser would hand them to the page; `names` replace those of the files."""
        contents = [base64.b64encode(file.read_bytes()).decode() for file in files]
        self.script(BRING, event, list(zip(names or [file.name for file in files], contents, strict=True)))

    def drag(self, *files: Path) -> None:
        """Drag files or folders of the disk over the page, by the browser itself."""
        self.dragged = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
        for step in ("dragEnter", "dragOver"):
            self.cdp("Input.dispatchDragEvent", type=step, x=300, y=300, data=self.dragged)

    def drop(self, *files: Path) -> None:
        """Drag files or folders of the disk onto the page and let them go."""
        self.drag(*files)
        self.cdp("Input.dispatchDragEvent", type="drop", x=300, y=300, data=self.dragged)

    def open_figures(self) -> None:
        self.all("#live summary")[0].click()

    def size(self, width: int, *, phone: bool = False) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=phone)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=phone)

    def media(self, **features: str) -> None:
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=named)

    def before_the_page(self, source: str) -> None:
        self.cdp("Page.addScriptToEvaluateOnNewDocument", source=source)

    def log(self, name: str) -> list[dict[str, Any]]:
        """What was logged since the last call."""
        entries: list[dict[str, Any]] = self.chrome.get_log(name)  # type: ignore[no-untyped-call]
        return entries

    def requested(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What is on the console, but for answers of /predict that are errors."""
        refused = re.compile(r"\S+/predict - Failed to load resource")
        return [entry["message"] for entry in self.log("browser") if not refused.match(entry["message"])]


BRING = """
const [event, files] = arguments, data = new DataTransfer();
for (const [name, content] of files)
  data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
if (event === "paste") document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
else for (const step of ["dragenter", "dragover", "drop"])
  document.querySelector("main").dispatchEvent(
    new DragEvent(step, {dataTransfer: data, bubbles: true, cancelable: true}));
"""


@pytest.fixture
def browser(chrome: Chrome) -> Iterator[Browser]:
    """A new tab; afterwards, no script or style was refused, nothing failed, and no other host was asked."""
    first = chrome.current_window_handle
    chrome.switch_to.new_window("tab")
    tab = Browser(chrome)
    tab.size(1200)
    tab.requested()
    tab.complaints()
    yield tab
    asked, complaints = tab.requested(), tab.complaints()
    chrome.close()
    chrome.switch_to.window(first)
    assert complaints == []
    assert [url for url in asked if not url.startswith((tab.url, "blob:", "data:"))] == []


def shares(service: Service, image: Path) -> list[str]:
    """What the bars should say, by a request of our own."""
    found = service.predictions(image.read_bytes())
    return [f"{each['label']}\n{each['probability'] * 100:.1f}%" for each in found]


# Images


def test_a_chosen_file_is_shown_with_its_predictions_as_bars(service: Service, browser: Browser) -> None:
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
def test_images_that_are_dropped_or_pasted_are_shown_in_their_order(
    service: Service, browser: Browser, way: str
) -> None:
    browser.open(service.url)
    browser.bring(way, SEVEN, THREE, TWO)

    assert browser.bars() == [shares(service, each) for each in (SEVEN, THREE, TWO)]
    assert browser.texts(".result h3") == ["seven.jpg", "three.png", "two.webp"]
    assert browser.all(".drop") == []


# In place of a service that is slow: /predict answers when `release` is called.
HELD = """
const real = window.fetch;
let open;
const gate = new Promise((resolve) => (open = resolve));
window.release = open;
window.asked = 0;
window.fetch = async (address, ...rest) => {
  if (address === "predict") window.asked++, await gate;
  return real(address, ...rest);
};
"""


def test_a_new_drop_comes_first_and_leaves_the_others_running(service: Service, browser: Browser) -> None:
    browser.before_the_page(HELD)
    browser.open(service.url)
    browser.choose(SEVEN)
    wait_until(lambda: browser.script("return asked") == 1, "the first is sent")

    browser.bring("drop", THREE, TWO)
    browser.script("release()")

    assert browser.bars() == [shares(service, each) for each in (THREE, TWO, SEVEN)]
    assert browser.texts(".result h3") == ["three.png", "two.webp", "seven.jpg"]
    assert browser.script("return asked") == 3


def test_clear_empties_the_list_and_ends_what_runs(service: Service, browser: Browser) -> None:
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
    assert browser.script("return asked") == 5  # the two that had not been sent never were


# In place of a service: /predict answers at once. The page's object URLs are counted.
INSTANT = """
const real = window.fetch;
window.fetch = (address, ...rest) => address !== "predict" ? real(address, ...rest)
  : Promise.resolve(new Response('{"success":true,"predictions":[{"label":"tabby","probability":0.9}]}'));
window.addresses = 0;
const [create, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
URL.createObjectURL = (blob) => (window.addresses++, create(blob));
URL.revokeObjectURL = (address) => (window.addresses--, revoke(address));
"""


def test_what_the_page_keeps_is_bounded_and_it_says_so(service: Service, browser: Browser) -> None:
    browser.before_the_page(INSTANT)
    browser.open(service.url)
    browser.bring("drop", *[THREE] * 198)
    browser.bring("drop", *[THREE] * 5)

    assert browser.text("#notice").startswith("This page keeps 200 images, so 3 images were left out.")
    answered = "200 images: 200 answered; most common: tabby 200."
    wait_until(lambda: browser.text("#summary") == answered, "all are answered")
    previews = "return document.querySelectorAll('canvas.preview').length"
    wait_until(lambda: browser.script(previews) == 200, "all are seen", 60)
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
    assert browser.script(heard) == summary  # and not each of the 17

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
        "file": "LICENSE", "success": False, "error": {"code": "bad_image", "message": error}
    }  # fmt: skip
    assert [each["file"] for each in copied["results"][1:]] == HOSTILE
    assert copied["results"][1]["success"] is True
    labels = [each["label"] for each in predictions]
    assert [each["label"] for each in copied["results"][1]["predictions"]] == labels

    text = copy(browser, "csv")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0][:6] == ["file", "label", "probability", "error", "label_2", "probability_2"]
    assert {len(row) for row in rows} == {12}
    assert rows[1][:4] == ["LICENSE", "", "", error]
    guarded = [f"'{name}" for name in HOSTILE[:5]] + HOSTILE[5:]
    assert [row[0] for row in rows[2:]] == guarded
    assert rows[2][1:4] == ["7", str(copied["results"][1]["predictions"][0]["probability"]), ""]
    assert text.endswith("\r\n")


def copy(browser: Browser, form: str) -> str:
    """Press the button; return what is on the clipboard once it says so."""
    button = browser.all(f"#copy-{form}")[0]
    button.click()
    wait_until(lambda: button.text == "Copied", "it says so")
    return str(browser.chrome.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))


def test_where_the_clipboard_is_refused_the_text_can_be_selected_or_saved(
    service: Service, browser: Browser, tmp_path: Path
) -> None:
    browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.before_the_page("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as by plain HTTP
    browser.open(service.url)
    browser.choose(SEVEN)
    browser.bars()
    browser.all("#copy-csv")[0].click()

    [area] = wait_until(lambda: browser.all("#export-text"), "the text is there")
    text = area.get_property("value")
    assert text.startswith("file,label,probability,error,label_2")
    assert browser.chrome.switch_to.active_element == area
    assert browser.script("return String(getSelection())") == text
    [link] = browser.all("#save")
    assert link.get_attribute("download") == "results.csv"
    link.click()
    saved = tmp_path / "results.csv"
    wait_until(saved.exists, "it is saved")
    assert saved.read_bytes().decode("utf-8-sig").replace("\r\n", "\n") == text  # as a field has it
    browser.all("#export-close")[0].click()
    assert browser.all("#export") == []


# What it recognises


def server(**about: Any) -> dict[str, Any]:
    return {"model": "lite", "classes": 1000, "description": IMAGENET} | about


RECOGNISES = f"Recognises {IMAGENET}. Model: lite."


@pytest.mark.parametrize(
    ("servers", "text", "samples"),
    [
        ([server(), server()], RECOGNISES, True),
        (
            [server(description="birds of the Alps.", model="birds")],
            "Recognises birds of the Alps. Model: birds.",
            False,
        ),
        ([server(), server(description="birds", model="b")], f"{RECOGNISES} Recognises birds. Model: b.", False),
        ([server(description=None)], "Recognises 1,000 classes. Model: lite.", False),
        ([{}], "Recognises what its model was made for.", False),
        ([server(description=["a"], classes="x", model=7)], "Recognises what its model was made for.", False),
        ([server(description="<b>ImageNet</b>")], "Recognises <b>ImageNet</b>. Model: lite.", True),
    ],
)
def test_it_says_what_the_model_recognises_and_offers_samples_only_where_that_is_imagenet(
    service: Service, browser: Browser, servers: list[dict[str, Any]], text: str, samples: bool
) -> None:
    alive = {f"server-{i}": about for i, about in enumerate(servers)}
    browser.before_the_page(STAND_IN % json.dumps(stats(10, model_servers=alive)))
    browser.open(service.url)

    wait_until(lambda: browser.text("#model") == text, text)
    assert bool(browser.all("#samples")) == samples
    assert any("/samples/" in url for url in browser.requested()) == samples


def test_it_says_that_no_model_is_there_and_when_one_is(service: Service, browser: Browser) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(10, model_servers={})))
    browser.open(service.url)
    wait_until(lambda: browser.text("#model").startswith("No model is running"), "it says that none is there")
    browser.script("answer = arguments[0]; document.dispatchEvent(new Event('visibilitychange'))",
                   stats(10, model_servers={}, queue_length=None))  # fmt: skip
    wait_until(lambda: "can't reach its queue" in browser.text("#model"), "it says that Redis is not there")

    browser.script("answer = arguments[0]", stats(10, model_servers={"a": server()}))

    wait_until(lambda: browser.text("#model") == RECOGNISES, "it has noticed by itself")


def test_of_the_running_service_it_says_what_its_model_recognises(service: Service, browser: Browser) -> None:
    browser.open(service.url)

    wait_until(lambda: browser.text("#model") == "Recognises handwritten digits. Model: digits.", "it says so")
    assert browser.all("#samples") == []


def test_a_sample_is_classified_by_the_keyboard_as_a_chosen_file_is(service: Service, browser: Browser) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(10, model_servers={"a": server()})))
    browser.open(service.url)
    buttons = wait_until(lambda: browser.all("#samples button"), "the samples are there")
    assert len(buttons) == len(SAMPLES) >= 2
    assert all(browser.script("return [...document.querySelectorAll('#samples img')].map(e => e.alt)"))
    loaded = "return [...document.querySelectorAll('#samples img')].every(e => e.complete && e.naturalWidth)"
    wait_until(lambda: browser.script(loaded), "they are seen")

    for button in buttons:
        button.send_keys(Keys.ENTER)

    wait_until(lambda: len(browser.all(".result")) == len(SAMPLES), "all are classified")
    bars = dict(zip(browser.texts(".result h3"), browser.bars(), strict=True))
    assert bars == {name: shares(service, ROOT / "images" / name) for name in SAMPLES}


# While it waits


def test_waiting_is_seen_with_its_seconds_and_no_promise(service: Service, browser: Browser) -> None:
    browser.media(prefers_reduced_motion="no-preference")
    browser.before_the_page(HELD + "const now = performance.now.bind(performance); window.ahead = 0;"
                            "performance.now = () => now() + window.ahead;")  # fmt: skip
    browser.open(service.url)
    browser.bring("drop", *[THREE] * 5)
    wait_until(lambda: browser.texts(".wait")[:1] == ["Waiting for the answer, 1 s"], "it counts the seconds")
    assert browser.texts(".wait")[4] == "Not sent yet: others of yours come first."
    turning = "return document.getAnimations().filter(a => a.animationName === 'turn').length"
    assert browser.script(turning) == 4

    browser.script("ahead = 90000")
    long = r"Still waiting, 9\d s: the upload is slow, or other images come first in the queue\."
    wait_until(lambda: re.fullmatch(long, browser.texts(".wait")[0]), "it says why")

    browser.media(prefers_reduced_motion="reduce")
    assert browser.script("return document.getAnimations().length") == 0
    browser.script("release()")
    assert len(browser.bars()) == 5


def test_a_screen_reader_hears_of_results_and_of_errors(service: Service, browser: Browser, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("No image.")
    browser.open(service.url)
    browser.choose(SEVEN, text)
    browser.bars()

    heard = browser.script(
        "return ['status', 'alert'].map(role => document.querySelector(`[role=${role}]`).textContent)"
    )

    assert re.fullmatch(r"seven.jpg shows 7, 9\d\.\d%\.", heard[0])
    assert heard[1].startswith("notes.txt: This is text, so send ")


# What goes wrong


def test_a_text_file_is_refused_in_the_words_of_the_service_beside_an_image_that_is_not(
    service: Service, browser: Browser, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("No image.")
    browser.open(service.url)
    browser.choose(text, THREE)

    assert browser.bars() == [[], shares(service, THREE)]
    assert browser.texts(".error") == [assert_error(service.post(b"No image."), 400, "bad_image")]
    assert browser.texts(".again") == []  # the same file would be refused again


def test_what_is_no_photo_is_named_and_looks_whole(service: Service, browser: Browser, tmp_path: Path) -> None:
    kinds = {
        "report.pdf": (b"%PDF-1.7", "This is a PDF document, so"),
        "drawing.svg": (
            b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
            "This is an SVG drawing, so",
        ),
        "clip.mp4": (b"\0\0\0\x18ftypmp42" + bytes(99), "This is a video, so"),
        "empty.jpg": (b"", "This file is empty (0 bytes), so choose another."),
    }
    for name, (content, _) in kinds.items():
        (tmp_path / name).write_bytes(content)
    browser.open(service.url)
    browser.choose(*(tmp_path / name for name in kinds))
    browser.bars()

    errors = browser.texts(".error")
    assert [error.startswith(said) for error, (_, said) in zip(errors, kinds.values(), strict=True)] == [True] * 4
    wait_until(lambda: len(browser.texts(".tile")) == 3, "those that can't be shown have a tile")
    assert browser.texts(".tile b") == ["PDF", "MP4", "JPG"]
    assert browser.texts(".file-size")[:2] == ["8 bytes", "62 bytes"]


def test_a_photo_s_size_is_in_megabytes_and_megapixels(service: Service, browser: Browser, tmp_path: Path) -> None:
    photo, huge = tmp_path / "photo.jpg", tmp_path / "huge.jpg"
    Image.new("RGB", (4032, 3024)).save(photo)
    content = photo.read_bytes()
    photo.write_bytes(content + bytes(int(2.4 * 2**20) - len(content)))
    huge.write_bytes(content + bytes(17 * 2**20))
    browser.open(service.url)
    browser.choose(photo, huge)
    browser.bars()

    sizes = "4,032 \N{MULTIPLICATION SIGN} 3,024 (12.2 megapixels)"
    wait_until(lambda: browser.texts(".file-size")[1].endswith(sizes), "both are seen")
    assert browser.texts(".file-size")[0] == f"2.4 MB, {sizes}"
    assert browser.texts(".error") == ["A request may have 16 MB, so send a smaller image."]


def test_of_a_dropped_folder_the_images_are_taken(service: Service, browser: Browser, tmp_path: Path) -> None:
    nested, empty = tmp_path / "photos/2026", tmp_path / "empty"
    nested.mkdir(parents=True)
    empty.mkdir()
    for folder, file in ((nested, SEVEN), (nested.parent, THREE)):
        shutil.copy(file, folder)
    (nested / "notes.txt").write_text("No image.")
    (nested / ".DS_Store").write_bytes(bytes(9))
    browser.open(service.url)

    browser.drop(TWO, tmp_path / "photos")
    wait_until(lambda: len(browser.all(".result")) == 3, "the images are there")
    assert browser.texts(".result h3") == ["two.webp", "seven.jpg", "three.png"]
    assert browser.bars() == [shares(service, each) for each in (TWO, SEVEN, THREE)]
    assert browser.text("#notice") == "1 file in the folder is no image, and left out."

    browser.drop(empty)
    wait_until(lambda: browser.text("#notice").startswith("There is no image in this folder"), "it says so")
    assert len(browser.all(".result")) == 3


def test_while_files_are_dragged_the_page_says_where_to_drop_them(service: Service, browser: Browser) -> None:
    browser.open(service.url)
    text = {"items": [{"mimeType": "text/plain", "data": "a text"}], "dragOperationsMask": 1}
    for step in ("dragEnter", "dragOver"):
        browser.cdp("Input.dispatchDragEvent", type=step, x=300, y=300, data=text)
    assert browser.all(".drop") == []
    browser.cdp("Input.dispatchDragEvent", type="dragCancel", x=300, y=300, data=text)

    browser.drag(SEVEN)
    assert browser.text(".drop") == "Drop to classify"
    browser.script("document.body.dispatchEvent(new DragEvent('dragleave', {bubbles: true}))")  # for no other element
    wait_until(lambda: not browser.all(".drop"), "it is gone with the files")
    browser.drop(SEVEN)
    assert browser.bars() == [shares(service, SEVEN)]
    assert browser.all(".drop") == []


def test_without_a_network_it_says_so_and_can_be_tried_again(service: Service, browser: Browser) -> None:
    browser.open(service.url)
    browser.open_figures()
    away = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.cdp("Network.enable")
    browser.cdp("Network.emulateNetworkConditions", offline=True, **away)
    browser.choose(SEVEN)
    browser.bars()
    told = browser.text(".error")
    wait_until(lambda: browser.text("#live-state") == "no answer", "the figures say that they are old")
    browser.cdp("Network.emulateNetworkConditions", offline=False, **away)
    browser.complaints()  # the browser's own, of the network

    browser.all(".again")[0].click()

    assert told == "The service can't be reached, so check your network and try again."
    assert browser.bars() == [shares(service, SEVEN)]
    assert browser.texts(".error") == []


def test_a_service_without_redis_says_when_to_try_again(browser: Browser) -> None:
    with run_apache(REDIS_PORT=str(free_port()), REDIS_TIMEOUT="0.5") as url, browser.at(url):
        browser.choose(SEVEN)
        browser.bars()

        assert browser.text(".error") == "The queue can't be reached now, so try again in a few seconds."
        [button] = browser.all(".again")
        assert re.fullmatch(r"Try again in [2-5] seconds", button.text)
        assert not button.is_enabled()
        wait_until(button.is_enabled, "the time is over")
        assert button.text == "Try again"


def test_a_client_that_sent_too_much_is_told_when_it_may_again(service: Service, browser: Browser) -> None:
    with run_apache(RATE_LIMIT="1/minute", IMAGE_QUEUE=service.queue) as url, browser.at(url):
        browser.choose(THREE, THREE, THREE)
        browser.bars()

        assert any(error.startswith("You have sent more than 1/minute") for error in browser.texts(".error"))
        assert re.fullmatch(r"Try again in \d+ seconds?", browser.texts(".again")[0])
        assert browser.texts("#retry") == ["Try 2 again"]


def test_by_the_keyboard_alone_a_file_is_chosen_and_the_key_given_that_is_asked_for(
    service: Service, browser: Browser
) -> None:
    with run_apache(API_KEYS=KEY, IMAGE_QUEUE=service.queue) as url, browser.at(url):
        assert browser.all("#key") == []
        ActionChains(browser.chrome).send_keys(Keys.TAB * 3).perform()
        focused = browser.chrome.switch_to.active_element
        assert focused.get_attribute("id") == "files"
        assert browser.script("return getComputedStyle(document.querySelector('#zone')).outlineWidth") == "3px"
        focused.send_keys("\n".join(map(str, [SEVEN, THREE, TWO, SEVEN, THREE, TWO])))
        wait_until(lambda: browser.all("#key"), "the field for the key is there")
        assert browser.text("#key-hint").startswith("This service needs an API key.")
        assert browser.texts(".error")[0] == "A key is needed: enter it above."
        assert "Not sent yet: a key is needed." in browser.texts(".wait")

        give_key(browser, "a-wrong-one")
        wait_until(lambda: browser.text("#key-hint").startswith("This key is not accepted."), "it says so")
        assert "The key is not accepted: enter another above." in browser.texts(".error")
        assert browser.chrome.find_element(By.ID, "key").get_attribute("aria-invalid") == "true"
        assert browser.script("return sessionStorage.length") == 0

        give_key(browser, KEY)
        assert browser.bars() == [shares(service, each) for each in (SEVEN, THREE, TWO, SEVEN, THREE, TWO)]
        assert browser.texts(".error") == []
        assert browser.all("#key") == []
        assert browser.script("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        browser.chrome.refresh()
        browser.choose(SEVEN)
        assert browser.bars() == [shares(service, SEVEN)]


def give_key(browser: Browser, key: str) -> None:
    wait_until(lambda: browser.chrome.switch_to.active_element.get_attribute("id") == "key", "it has the focus")
    ActionChains(browser.chrome).send_keys(key, Keys.ENTER).perform()


# The service now


def test_the_figures_move_after_requests(service: Service, browser: Browser) -> None:
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


def stats(images: int, **more: Any) -> dict[str, Any]:
    """Counters of answers a tenth of which took 0.1 to 0.2 s and the others 0.05 to 0.1 s, and of batches of 3 or 4."""
    slow = images // 10
    latency = {"0.05": 0, "0.1": images - slow, "0.2": images, "+Inf": images}
    batches = {"1": 0, "2": 0, "4": images, "32": images, "+Inf": images}
    return {
        "queue_length": 1234, "model_servers": {"a": {"model": "ResNet50"}, "b": {"model": "ResNet50"}},
        "requests": {"200": images}, "images": images,
        "latency": {"sum": images * 0.08, "count": images, "buckets": latency},
        "batch_size": {"sum": images * 3.5, "count": images, "buckets": batches},
    } | more  # fmt: skip


# In place of a service that restarts: what `answer` holds is what /stats says.
STAND_IN = """
const real = window.fetch;
window.polls = 0;
window.answer = %s;
window.fetch = (address, ...rest) => address !== "stats" ? real(address, ...rest)
  : (window.polls++, Promise.resolve(new Response(JSON.stringify(window.answer))));
"""


def test_the_figures_are_those_of_the_last_minute_and_begin_anew_with_the_service(
    service: Service, browser: Browser
) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(1000)))
    browser.open(service.url)
    browser.open_figures()
    wait_until(lambda: browser.text("#window"), "figures since the start")
    assert browser.text("#window") == "Times and batches of 1,000 images since the service was started."
    assert (browser.text("#queue"), browser.text("#servers"), browser.text("#models")) == ("1,234", "2", "ResNet50")

    browser.script("answer = arguments[0]", stats(1100))
    wait_until(lambda: browser.text("#window").endswith("of 100 images in the last minute."), "figures of a minute")
    # The half of 100 is 50 of the 90 below 0.1 s: 0.05 + 50/90 of 0.05. 95 is the middle of the 10 above.
    assert browser.text("#mean") == "80 ms"
    assert browser.text("#percentiles") == "on average; half within 78 ms, 95% within 150 ms"
    assert browser.texts("#batches li") == ["0\n1", "0\n2", "100\n3\u20134", "0\n5\u201332"]
    assert float(browser.text("#rate")) > 5

    browser.script("answer = arguments[0]", stats(20, queue_length=None, model_servers={}))
    wait_until(
        lambda: browser.text("#window").endswith("of 20 images since the service was started."),
        "the figures begin anew",
    )
    assert browser.text("#rate") == "0.0"
    assert (browser.text("#live-state"), browser.text("#queue"), browser.text("#servers")) == (
        "not ready",
        "no Redis",
        "0",
    )


def test_a_page_that_nobody_sees_asks_for_no_figures(service: Service, browser: Browser) -> None:
    browser.before_the_page(STAND_IN % json.dumps(stats(10)))
    browser.open(service.url)
    wait_until(lambda: browser.text("#model"), "it has asked for the model")
    assert browser.all(".figures") == []
    browser.open_figures()
    wait_until(lambda: browser.script("return polls") >= 3, "it asks")
    show = "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
    show += "document.dispatchEvent(new Event('visibilitychange')); return polls"
    before = browser.script(show, True)

    browser.chrome.execute_async_script("setTimeout(arguments[0], 5000)")  # two polls would fit

    assert browser.script("return polls") == before
    assert browser.script(show, False) == before + 1
    browser.all("#live summary")[0].click()
    closed = browser.script("return polls")
    browser.chrome.execute_async_script("setTimeout(arguments[0], 3000)")
    assert browser.script("return polls") == closed


# Everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_with_results_errors_and_the_key_s_field(
    service: Service, browser: Browser, tmp_path: Path, scheme: str
) -> None:
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
    wait_until(browser.all_answered, "they are rows")
    browser.all(".more")[0].click()
    assert_accessible(browser)


def assert_accessible(browser: Browser) -> None:
    found = Axe().run(browser.chrome, options={"resultTypes": ["violations", "incomplete"]})
    assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
    assert "color-contrast" in {each["id"] for each in found["passes"]}
    assert browser.script("return document.getAnimations().length") == 0


def test_dark_and_light_are_as_the_system_has_them(service: Service, browser: Browser) -> None:
    browser.open(service.url)
    seen = []
    for scheme in ("light", "dark"):
        browser.media(prefers_color_scheme=scheme)
        colour = browser.script("return getComputedStyle(document.body).backgroundColor")
        seen.append(sum(map(int, re.findall(r"\d+", colour))))

    assert seen[0] > 700
    assert seen[1] < 100


def test_a_phone_scrolls_only_downwards_and_may_take_a_photo(
    service: Service, browser: Browser, tmp_path: Path
) -> None:
    photo, text = tmp_path / f"{'holiday' * 20}.jpg", tmp_path / "notes.txt"
    photo.write_bytes(SEVEN.read_bytes())
    text.write_text("No image.")
    browser.size(360, phone=True)
    about = server(model="efficientnet_lite0" * 5)
    browser.before_the_page(STAND_IN % json.dumps(stats(123_456_789, model_servers={"a": about})))
    browser.open(service.url)
    browser.script("document.querySelector('#key-form').hidden = false")
    browser.choose(photo, text)
    browser.bars()
    place = "const {top, bottom} = document.querySelector('.result').getBoundingClientRect(); return [top, bottom]"
    wait_until(lambda: browser.script(place)[0] < 200, "the result has come into view")
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
    wait_until(browser.all_answered, "they are rows")
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


# /docs


def test_docs_shows_every_operation_and_does_one(service: Service, browser: Browser) -> None:
    browser.open(service.url + "/docs")
    wait_until(lambda: browser.all(".opblock"), "the operations are there")
    described = json.loads((ROOT / "web/static/openapi.json").read_text())["paths"]
    assert {text.replace("\u200b", "") for text in browser.texts(".opblock-summary-path")} == set(described)

    open_operation(browser, "health", "livez")

    assert '"live": true' in execute(browser)
    browser.url = service.url


def test_docs_classifies_a_file(service: Service, browser: Browser) -> None:
    browser.open(service.url + "/docs")
    open_operation(browser, "classify", "predict")
    field = wait_until(lambda: browser.all(".opblock-body input[type=file]"), "the field is there")
    field[0].send_keys(str(SEVEN))

    assert re.search(r'"label": "7",\s+"probability": 0\.9', execute(browser))
    # Swagger UI's own, which then takes another.
    assert all("Could not find component" in each for each in browser.complaints())
    browser.url = service.url


def open_operation(browser: Browser, tag: str, name: str) -> None:
    [block] = wait_until(lambda: browser.all(f"#operations-{tag}-{name}"), "the operation is there")
    block.find_element(By.CSS_SELECTOR, ".opblock-summary-control").click()
    wait_until(lambda: browser.all(".execute"), "it can be tried")


def execute(browser: Browser) -> str:
    """Do the opened operation; return what the page shows of the answer."""
    browser.all(".execute")[0].click()
    return str(wait_until(lambda: browser.text(".live-responses-table .response"), "an answer is there"))


# Behind a proxy, and called by pages elsewhere


PROXY = """
ServerName localhost
ServerRoot {folder}
DefaultRuntimeDir {folder}
PidFile {folder}/pid
ErrorLog {folder}/log
User www-data
Group www-data
Listen 127.0.0.1:{port}
Include /etc/apache2/mods-available/mpm_event.load
Include /etc/apache2/mods-available/authz_core.load
Include /etc/apache2/mods-available/proxy.load
Include /etc/apache2/mods-available/proxy_http.load
{proxy_pass}
"""


@contextmanager
def run_proxy(folder: Path, service: Service) -> Iterator[str]:
    """Serve the service as https://host/ai/ would be, by the line of docs/operations.md; give the address."""
    [line] = re.findall(r"^ +ProxyPass .*$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    proxy_pass = line.strip().replace("http://127.0.0.1:8080", service.url)
    assert "/ai/" in proxy_pass
    config, port = folder / "proxy.conf", free_port()
    config.write_text(PROXY.format(folder=folder, port=port, proxy_pass=proxy_pass))
    url = f"http://127.0.0.1:{port}/ai"
    with running([need("apache2"), "-f", str(config), "-D", "FOREGROUND"], folder / "output") as process:
        wait_until(lambda: responds(url) or not process.alive, "the proxy answers")
        assert process.alive, process.log
        yield f"{url}/"


def test_under_a_proxys_prefix_page_and_docs_work(service: Service, browser: Browser, tmp_path: Path) -> None:
    with run_proxy(tmp_path, service) as url, browser.at(url):
        browser.choose(SEVEN)
        assert browser.bars() == [shares(service, SEVEN)]
        browser.open_figures()
        wait_until(lambda: browser.text("#live-state") == "ready", "the figures are there")
        assert browser.script("return document.querySelector('.brand img').naturalWidth") > 0
        assert browser.script("return document.querySelector('#form').action") == f"{url}predict"  # without JavaScript

        browser.all("nav a")[0].click()
        open_operation(browser, "health", "readyz")
        assert '"ready": true' in execute(browser)
        assert f"{url}readyz" in browser.text(".request-url")

        browser.all(".back a")[0].click()
        wait_until(lambda: browser.all("#files, .zone"), "the page is back")


@contextmanager
def page_elsewhere() -> Iterator[str]:
    """Serve an empty page; give its origin."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Elsewhere</title><link rel=icon href=data:,>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", free_port()), Empty) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# What a page elsewhere finds out by a request: status, JSON and headers, or that the browser keeps the answer from it.
POST_FROM_ELSEWHERE = """
const [url, content, size, key, done] = arguments;
const form = new FormData();
const bytes = content ? Uint8Array.from(atob(content), (c) => c.charCodeAt(0)) : new Uint8Array(size);
form.append("image", new Blob([bytes]), "photo");
fetch(url + "/predict", { method: "POST", body: form, headers: key ? { Authorization: `Bearer ${key}` } : {} })
  .then(async (answer) => done([answer.status, await answer.json(),
    ["X-Request-ID", "Server-Timing", "Retry-After"].map((name) => answer.headers.get(name))]))
  .catch((error) => done([error.name]));
"""


def test_a_page_of_an_allowed_origin_reads_predictions_and_errors(service: Service, chrome: Chrome) -> None:
    three, no_image = (base64.b64encode(data).decode() for data in (THREE.read_bytes(), b"No image."))

    def post(url: str, content: str = "", size: int = 0, key: str = KEY) -> Any:
        return chrome.execute_async_script(POST_FROM_ELSEWHERE, url, content, size, key)

    with page_elsewhere() as origin, run_apache(
        IMAGE_QUEUE=service.queue, CORS_ORIGINS=f"https://app.example,{origin}", API_KEYS=KEY, RATE_LIMIT="4/minute"
    ) as url:  # fmt: skip
        chrome.get(origin)
        status, body, headers = post(url, three)
        assert (status, body["predictions"][0]["label"]) == (200, "3")
        assert headers[0]
        assert "total;dur=" in headers[1]
        assert post(url, no_image)[:2] == [400, assert_body("bad_image", service.post(b"No image."))]
        assert [post(url, three, key=wrong)[0] for wrong in ("", "another-key-than-that")] == [401, 401]
        assert post(url, size=17_000_000)[0] == 413
        assert post(url, three)[0] == 200
        status, body, headers = post(url, three)
        assert (status, body["error"]["code"]) == (429, "rate_limited")
        assert int(headers[2]) > 0
        assert post(service.url, three, key="") == ["TypeError"]  # where the setting is empty
        chrome.get("about:blank")


def assert_body(code: str, answer: requests.Response) -> Any:
    assert_error(answer, 400, code)
    return answer.json()


# What is sent


@pytest.mark.parametrize(
    ("accept", "page"),
    [(BROWSERS, True), ("text/html", True), ("text/html;q=0.2, */*;q=0.1", True), ("*/*", False), ("text/*", False),
     (None, False), ("text/plain, text/html;q=0.9", False), ("application/json", False), ("nonsense", False)],
)  # fmt: skip
def test_who_prefers_html_gets_the_page_and_others_the_line(service: Service, accept: str | None, page: bool) -> None:
    answer = requests.get(service.url, headers={"Accept": accept}, timeout=10)

    assert answer.headers["Vary"] == "Accept"
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert ("<form" in answer.text) == page
    assert LINE in answer.text if page else answer.text == LINE


@pytest.mark.parametrize("address", ["/", *FILES])
def test_a_file_is_kept_and_asked_for_again_by_its_tag(service: Service, address: str) -> None:
    first = requests.get(service.url + address, headers={"Accept": BROWSERS}, timeout=10)
    tag = {"If-None-Match": first.headers["ETag"], "Accept": BROWSERS}
    second = requests.get(service.url + address, headers=tag, timeout=10)

    assert (first.status_code, second.status_code, second.content) == (200, 304, b"")
    assert first.headers["Cache-Control"] == second.headers["Cache-Control"] == "no-cache"
    # Browsers take the headers of a 304 for those of the page.
    policies = [answer.headers["Content-Security-Policy"] for answer in (first, second)]
    assert policies[0] == policies[1]
    assert policies[0].startswith("default-src 'none'")
    assert "unsafe" not in policies[0]


@pytest.mark.parametrize("address", ["/docs/", "/docs/swagger-ui.js", "/docs/LICENSE", "/static/page.js"])
def test_only_the_named_files_have_an_address(service: Service, address: str) -> None:
    assert_error(requests.get(service.url + address, timeout=10), 404, "not_found")


def test_the_pages_have_nothing_inline_and_name_no_other_host() -> None:
    files = [path for path in (ROOT / "web/static").iterdir() if path.suffix in (".html", ".css", ".js")]
    assert len(files) >= len(SCRIPTS) + 5
    for path in files:
        name, text = path.name, path.read_text()
        assert not re.search(r"<style|style=|<script>|\bon\w+=\"|javascript:", text), name
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text), name
