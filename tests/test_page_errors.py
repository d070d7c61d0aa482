"""The page in a browser while images wait, and when something goes wrong."""

import re
import shutil
from pathlib import Path

from browser import HELD, KEY, SEVEN, THREE, TWO, Browser, shares
from harness import Service, assert_error, free_port, run_apache, wait_until
from PIL import Image
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["browser"]

# Waiting


def test_waiting_images_show_their_seconds(service: Service, browser: Browser) -> None:
    browser.media(prefers_reduced_motion="no-preference")
    browser.before_the_page(HELD + "const now = performance.now.bind(performance); window.ahead = 0;"
                            "performance.now = () => now() + window.ahead;")  # fmt: skip
    browser.open(service.url)
    browser.bring("drop", *[THREE] * 5)
    wait_until(lambda: browser.texts(".wait")[:1] == ["Waiting for the answer, 1 s"], "it counts the seconds")
    assert browser.texts(".wait")[4] == "Not sent yet: your other images go first."
    turning = "return document.getAnimations().filter(a => a.animationName === 'turn').length"
    assert browser.script(turning) == 4

    browser.script("ahead = 90000")
    long = r"Still waiting, 9\d s: the upload is slow, or other images are ahead in the queue\."
    wait_until(lambda: re.fullmatch(long, browser.texts(".wait")[0]), "the page says why")

    browser.media(prefers_reduced_motion="reduce")
    assert browser.script("return document.getAnimations().length") == 0
    browser.script("release()")
    assert len(browser.bars()) == 5


def test_screen_readers_hear_results_and_errors(service: Service, browser: Browser, tmp_path: Path) -> None:
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


# Errors


def test_a_refused_file_shows_the_message_of_the_service(service: Service, browser: Browser, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("No image.")
    browser.open(service.url)
    browser.choose(text, THREE)

    assert browser.bars() == [[], shares(service, THREE)]
    assert browser.texts(".error") == [assert_error(service.post(b"No image."), 400, "bad_image")]
    assert browser.texts(".again") == []  # the same file would be refused again


def test_files_that_are_not_photos_are_named_and_get_a_tile(service: Service, browser: Browser, tmp_path: Path) -> None:
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
    assert [error.startswith(start) for error, (_, start) in zip(errors, kinds.values(), strict=True)] == [True] * 4
    wait_until(lambda: len(browser.texts(".tile")) == 3, "those without a preview have a tile")
    assert browser.texts(".tile b") == ["PDF", "MP4", "JPG"]
    assert browser.texts(".file-size")[:2] == ["8 bytes", "62 bytes"]


def test_sizes_are_in_megabytes_and_megapixels(service: Service, browser: Browser, tmp_path: Path) -> None:
    photo, huge = tmp_path / "photo.jpg", tmp_path / "huge.jpg"
    Image.new("RGB", (4032, 3024)).save(photo)
    content = photo.read_bytes()
    photo.write_bytes(content + bytes(int(2.4 * 2**20) - len(content)))
    huge.write_bytes(content + bytes(17 * 2**20))
    browser.open(service.url)
    browser.choose(photo, huge)
    browser.bars()

    sizes = "4,032 \N{MULTIPLICATION SIGN} 3,024 (12.2 megapixels)"
    wait_until(lambda: browser.texts(".file-size")[1].endswith(sizes), "both are shown")
    assert browser.texts(".file-size")[0] == f"2.4 MB, {sizes}"
    assert browser.texts(".error") == ["A request may have at most 16 MB, so send a smaller image."]


def test_the_images_in_a_dropped_folder_are_classified(service: Service, browser: Browser, tmp_path: Path) -> None:
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
    assert browser.text("#notice") == "1 file in the folder is not an image and was left out."

    browser.drop(empty)
    wait_until(lambda: browser.text("#notice").startswith("There are no images in this folder"), "a notice")
    assert len(browser.all(".result")) == 3


def test_dragging_files_shows_where_to_drop_them(service: Service, browser: Browser) -> None:
    browser.open(service.url)
    text = {"items": [{"mimeType": "text/plain", "data": "a text"}], "dragOperationsMask": 1}
    for step in ("dragEnter", "dragOver"):
        browser.cdp("Input.dispatchDragEvent", type=step, x=300, y=300, data=text)
    assert browser.all(".drop") == []
    browser.cdp("Input.dispatchDragEvent", type="dragCancel", x=300, y=300, data=text)

    browser.drag(SEVEN)
    assert browser.text(".drop") == "Drop to classify"
    browser.script("document.body.dispatchEvent(new DragEvent('dragleave', {bubbles: true}))")  # leaves the window
    wait_until(lambda: not browser.all(".drop"), "the mark is gone with the files")
    browser.drop(SEVEN)
    assert browser.bars() == [shares(service, SEVEN)]
    assert browser.all(".drop") == []


def test_without_a_network_the_user_can_try_again(service: Service, browser: Browser) -> None:
    browser.open(service.url)
    browser.open_figures()
    limits = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.cdp("Network.enable")
    browser.cdp("Network.emulateNetworkConditions", offline=True, **limits)
    browser.choose(SEVEN)
    browser.bars()
    message = browser.text(".error")
    wait_until(lambda: browser.text("#live-state") == "no answer", "the figures say that they are old")
    browser.cdp("Network.emulateNetworkConditions", offline=False, **limits)
    browser.console()  # the browser's own messages about the network

    browser.all(".again")[0].click()

    assert message == "The service can't be reached, so check your network and try again."
    assert browser.bars() == [shares(service, SEVEN)]
    assert browser.texts(".error") == []


def test_without_redis_the_page_counts_down_to_the_next_try(browser: Browser) -> None:
    with run_apache(REDIS_PORT=str(free_port()), REDIS_TIMEOUT="0.5") as url, browser.at(url):
        browser.choose(SEVEN)
        browser.bars()

        assert browser.text(".error") == "The queue can't be reached now, so try again in a few seconds."
        [button] = browser.all(".again")
        assert re.fullmatch(r"Try again in [2-5] seconds", button.text)
        assert not button.is_enabled()
        wait_until(button.is_enabled, "the countdown is over")
        assert button.text == "Try again"


def test_over_the_rate_limit_the_page_says_when_to_try_again(service: Service, browser: Browser) -> None:
    with run_apache(RATE_LIMIT="1/minute", IMAGE_QUEUE=service.queue) as url, browser.at(url):
        browser.choose(THREE, THREE, THREE)
        browser.bars()

        assert any(error.startswith("You have exceeded the limit of 1/minute") for error in browser.texts(".error"))
        assert re.fullmatch(r"Try again in \d+ seconds?", browser.texts(".again")[0])
        assert browser.texts("#retry") == ["Try 2 again"]


def test_a_file_and_the_api_key_can_be_given_by_keyboard_alone(service: Service, browser: Browser) -> None:
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
        wait_until(lambda: browser.text("#key-hint").startswith("This key is not accepted."), "the key is refused")
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
    wait_until(
        lambda: browser.chrome.switch_to.active_element.get_attribute("id") == "key",
        "the field for the key has the focus",
    )
    ActionChains(browser.chrome).send_keys(key, Keys.ENTER).perform()
