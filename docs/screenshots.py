"""Take the screenshots of the page: light, dark, and on a phone.

    .venv/bin/python docs/screenshots.py http://localhost:8080

This needs Chromium and its driver, and a running service whose model has ImageNet's classes, such as that of bin/serve.
For the screenshot with the live figures, clients keep the service busy, so that there is something to show.
"""

import argparse
import io
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import requests
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

HERE = Path(__file__).parent
IMAGES = [HERE.parent / "images" / name for name in ("cat.jpg", "coffee.jpg", "officer.jpg")]
CLIENTS = 8


class Picture(NamedTuple):
    """A screenshot `width` pixels wide, with the predictions for the first `images` of IMAGES.

    If `busy` is not 0, the live figures are open, for that many seconds before the images are added.
    """

    name: str
    width: int
    scheme: str
    images: int
    busy: int = 0


PICTURES = (
    Picture("page.png", 1180, "light", 2, busy=45),
    Picture("page-dark.png", 1180, "dark", 2),
    Picture("page-phone.png", 360, "light", 1),
)


def main() -> None:
    """Take all screenshots."""
    parser = argparse.ArgumentParser(description="Take the screenshots of the page.")
    parser.add_argument("url", help="the address of the service")
    url = parser.parse_args().url
    for picture in PICTURES:
        with clients(url, CLIENTS if picture.busy else 0):
            take(url, picture)


@contextmanager
def clients(url: str, count: int) -> Iterator[None]:
    """Keep the service busy with `count` clients."""
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, count)) as pool:
        for _ in range(count):
            pool.submit(keep_busy, url, stop)
        try:
            yield
        finally:
            stop.set()


def keep_busy(url: str, stop: threading.Event) -> None:
    """Post one or several images at random intervals."""
    while not stop.wait(random.expovariate(0.5)):
        files = [("image", random.choice(IMAGES).read_bytes()) for _ in range(random.choice([1, 1, 2, 3, 6, 12]))]
        requests.post(f"{url}/predict", files=files, timeout=60)


def take(url: str, picture: Picture) -> None:
    """Save a screenshot of the page."""
    name, width, scheme, images, busy = picture
    browser = start_browser()
    try:
        phone = width < 500
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        preference = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        browser.get(url)
        if busy:
            browser.find_element(By.CSS_SELECTOR, "#live summary").click()
            time.sleep(busy)
        browser.find_element(By.ID, "files").send_keys("\n".join(map(str, IMAGES[:images])))
        best = (By.CSS_SELECTOR, ".bars li:first-child")
        WebDriverWait(browser, 30).until(lambda _: len(browser.find_elements(*best)) == images)
        time.sleep(1)  # until the animation of the bars has ended
        save(browser, HERE / name, size)
    finally:
        browser.quit()


def start_browser() -> Chrome:
    """Return a headless Chromium."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium can't sandbox as root
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars", *sandbox):
        options.add_argument(argument)
    return Chrome(options, ChromeService("/usr/bin/chromedriver"))


def save(browser: Chrome, path: Path, size: dict[str, Any]) -> None:
    """Save the whole page, reduced to 256 colors for a small file."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": height})
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
