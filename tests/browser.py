"""Chromium for the tests of the pages, and scripts that stand in for parts of the service."""

import base64
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Service, need, wait_until
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By

SEVEN, THREE, TWO = (ROOT / "models/digits" / name for name in ("seven.jpg", "three.png", "two.webp"))
# The Accept header of browsers.
BROWSERS = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
KEY = "the-key-of-2026-is-this"
LINE = "Welcome to the PyImageSearch Keras REST API!"  # the tutorial's answer to GET /
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
    """A browser tab, described by what a user sees in it."""

    def __init__(self, chrome: Chrome) -> None:
        self.chrome = chrome

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.chrome.execute_cdp_cmd(command, arguments)

    def open(self, url: str) -> None:
        self.url = url
        self.chrome.get(url)

    @contextmanager
    def at(self, url: str) -> Iterator[None]:
        """Open a page, and leave it before its service stops."""
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
        """The texts of each result's bars, once every image has an answer."""
        wait_until(self.all_answered, "every image has an answer")
        return [
            [bar.text for bar in result.find_elements(By.CSS_SELECTOR, ".bars li")] for result in self.all(".result")
        ]

    def all_answered(self) -> bool:
        return bool(self.all(".result")) and not self.all(".wait") and not self.all("[aria-busy]")

    def bring(self, event: str, *files: Path, names: Sequence[str] = ()) -> None:
        """Send the page a drop or paste event with these files; `names` replace their names."""
        contents = [base64.b64encode(file.read_bytes()).decode() for file in files]
        self.script(BRING, event, list(zip(names or [file.name for file in files], contents, strict=True)))

    def drag(self, *files: Path) -> None:
        """Drag files or folders from the disk over the page, as the browser itself does."""
        self.dragged = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
        for step in ("dragEnter", "dragOver"):
            self.cdp("Input.dispatchDragEvent", type=step, x=300, y=300, data=self.dragged)

    def drop(self, *files: Path) -> None:
        """Drag files or folders from the disk onto the page and drop them."""
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
        """The log entries since the last call."""
        entries: list[dict[str, Any]] = self.chrome.get_log(name)  # type: ignore[no-untyped-call]
        return entries

    def requested(self) -> list[str]:
        """The addresses requested since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def console(self) -> list[str]:
        """The console's messages since the last call, except those about errors from /predict."""
        refused = re.compile(r"\S+/predict(/\S+)? - Failed to load resource")
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
    """A new tab. Afterwards, the console must be empty and no other host contacted."""
    first = chrome.current_window_handle
    chrome.switch_to.new_window("tab")
    tab = Browser(chrome)
    tab.size(1200)
    tab.requested()
    tab.console()
    yield tab
    requested, console = tab.requested(), tab.console()
    chrome.close()
    chrome.switch_to.window(first)
    assert console == []
    assert [url for url in requested if not url.startswith((tab.url, "blob:", "data:"))] == []


def shares(service: Service, image: Path) -> list[str]:
    """The texts that the bars should show, from a separate request to the service."""
    found = service.predictions(image.read_bytes())
    return [f"{each['label']}\n{each['probability'] * 100:.1f}%" for each in found]


# Stands in for a slow service: /predict, with or without a model, answers once `release` is called.
HELD = """
const real = window.fetch;
let open;
const gate = new Promise((resolve) => (open = resolve));
window.release = open;
window.asked = 0;
window.fetch = async (address, ...rest) => {
  if (/^predict\\b/.test(address)) window.asked++, await gate;
  return real(address, ...rest);
};
"""


def about(**more: Any) -> dict[str, Any]:
    """What /stats says about a model that is running."""
    return {"classes": 1000, "description": IMAGENET, "version": "0123456789ab", "ready": True} | more


def stats(images: int, models: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A body of /stats with two servers for each running model; the first of `models` is the default model.

    The batches had 3 or 4 images. A tenth of the images took 0.1 to 0.2 s, the others 0.05 to 0.1 s.
    """
    models = {"lite": about()} if models is None else models
    running = [name for name, about in models.items() if isinstance(about, dict) and about.get("ready")]
    return {
        "queue_length": 1234, "requests": {"200": images}, **counters(images),
        "model_servers": {f"{name}-{i}": {"model": name} for name in running for i in range(2)},
        "default_model": next(iter(models), ""), "models": models,
    } | more  # fmt: skip


def counters(images: int) -> dict[str, Any]:
    """The part of /stats that counts images, for all models or for one."""
    slow = images // 10
    latency = {"0.05": 0, "0.1": images - slow, "0.2": images, "+Inf": images}
    batches = {"1": 0, "2": 0, "4": images, "32": images, "+Inf": images}
    return {
        "images": images,
        "latency": {"sum": images * 0.08, "count": images, "buckets": latency},
        "batch_size": {"sum": images * 3.5, "count": images, "buckets": batches},
    }


# Stands in for /stats: each poll gets window.answer, which a test may change.
STAND_IN = """
const real = window.fetch;
window.polls = 0;
window.answer = %s;
window.fetch = (address, ...rest) => address !== "stats" ? real(address, ...rest)
  : (window.polls++, Promise.resolve(new Response(JSON.stringify(window.answer))));
"""

# Stands in for a service with several models: /predict/NAME answers with the label "seen by NAME" once `release` is
# called. `posted` has the addresses.
EACH_MODEL = """
{
  const others = window.fetch;
  const gate = new Promise((resolve) => (window.release = resolve));
  window.posted = [];
  window.fetch = async (address, ...rest) => {
    if (!/^predict\\b/.test(address)) return others(address, ...rest);
    window.posted.push(address);
    await gate;
    const name = address.split("/")[1] ?? "lite";
    const predictions = [{ label: `seen by ${name}`, probability: 0.9 }];
    return new Response(JSON.stringify({ success: true, predictions }), { headers: { "X-Model": name } });
  };
}
"""

# Sends the photos for any model to the default one.
TO_DEFAULT = """
{
  const others = window.fetch;
  window.fetch = (address, ...rest) => others(address.replace(/^predict\\/.*/, "predict"), ...rest);
}
"""
