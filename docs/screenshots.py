"""Makes the pictures of the page, in light, in dark and on a phone.

Of a service that is running:

    .venv/bin/python docs/screenshots.py http://localhost:8080

It needs Chromium and its driver. The service should have a model of ImageNet's classes, as bin/serve starts it. It is
kept busy while the figures are open, so that they have something to show.
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
    """A file of a page that is `width` pixels wide, with the predictions of so many images.

    Where `busy` is not 0, the figures are open, and have been for so many seconds.
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
    """Take them all."""
    parser = argparse.ArgumentParser(description="Make the pictures of the page.")
    parser.add_argument("url", help="where the service is")
    url = parser.parse_args().url
    for picture in PICTURES:
        with clients(url, CLIENTS if picture.busy else 0):
            take(url, picture)


@contextmanager
def clients(url: str, count: int) -> Iterator[None]:
    """Keep the service busy with so many clients."""
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, count)) as pool:
        for _ in range(count):
            pool.submit(keep_busy, url, stop)
        try:
            yield
        finally:
            stop.set()


def keep_busy(url: str, stop: threading.Event) -> None:
    """Post images at uneven intervals, one at a time or several."""
    while not stop.wait(random.expovariate(0.5)):
        files = [("image", random.choice(IMAGES).read_bytes()) for _ in range(random.choice([1, 1, 2, 3, 6, 12]))]
        requests.post(f"{url}/predict", files=files, timeout=60)


def take(url: str, picture: Picture) -> None:
    """Save a picture of the page."""
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
        time.sleep(1)  # until the bars have grown
        save(browser, HERE / name, size)
    finally:
        browser.quit()


def start_browser() -> Chrome:
    """Return a Chromium that has no window."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # root can't have one
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars", *sandbox):
        options.add_argument(argument)
    return Chrome(options, ChromeService("/usr/bin/chromedriver"))


def save(browser: Chrome, path: Path, size: dict[str, Any]) -> None:
    """Save the whole page, in as many colors as a small file has."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": height})
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
