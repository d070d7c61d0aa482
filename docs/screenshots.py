"""Makes the pictures of the page, in light, in dark and on a phone.

Of a service that is running:

    .venv/bin/python docs/screenshots.py http://localhost:8080

It needs Chromium and its driver, and keeps the service busy meanwhile, so that the figures have something to show.
"""

import argparse
import io
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

HERE = Path(__file__).parent
IMAGES = [HERE.parent / "models/digits" / name for name in ("seven.jpg", "two.webp", "three.png")]
PICTURES = [("page.png", 1180, "light", 2), ("page-dark.png", 1180, "dark", 1), ("page-phone.png", 360, "light", 1)]
CLIENTS = 8
BUSY = 45  # seconds that the figures have to get going


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description="Make the pictures of the page.")
    parser.add_argument("url", help="where the service is")
    url = parser.parse_args().url
    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(CLIENTS):
            pool.submit(keep_busy, url, stop)
        try:
            for picture in PICTURES:
                take(url, *picture)
        finally:
            stop.set()


def keep_busy(url: str, stop: threading.Event) -> None:
    """Post images at uneven intervals, one at a time or several."""
    while not stop.wait(random.expovariate(0.5)):
        files = [("image", random.choice(IMAGES).read_bytes()) for _ in range(random.choice([1, 1, 2, 3, 6, 12]))]
        requests.post(f"{url}/predict", files=files, timeout=60)


def take(url: str, name: str, width: int, scheme: str, images: int) -> None:
    """Save a picture of the page, `width` pixels wide, with the predictions of so many images."""
    browser = start_browser()
    try:
        phone = width < 500
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        preference = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        browser.get(url)
        time.sleep(BUSY)
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
    """Save the whole page, in as many colours as a small file has."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": height})
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
