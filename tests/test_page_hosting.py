"""The pages at other addresses: /docs, behind a proxy, called from other origins, and their HTTP headers."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests
from browser import BROWSERS, KEY, LINE, SEVEN, THREE, Browser, shares
from harness import ROOT, Service, assert_error, free_port, need, responds, run_apache, running, wait_until
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from web.pages import FILES, SCRIPTS

pytest_plugins = ["browser"]

# /docs


def test_docs_shows_every_operation_and_executes_one(service: Service, browser: Browser) -> None:
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
    # Swagger UI itself logs this, and then falls back to another component.
    assert all("Could not find component" in each for each in browser.console())
    browser.url = service.url


def open_operation(browser: Browser, tag: str, name: str) -> None:
    [block] = wait_until(lambda: browser.all(f"#operations-{tag}-{name}"), "the operation is there")
    block.find_element(By.CSS_SELECTOR, ".opblock-summary-control").click()
    wait_until(lambda: browser.all(".execute"), "it can be tried")


def execute(browser: Browser) -> str:
    """Execute the opened operation, and return the answer as the page shows it."""
    browser.all(".execute")[0].click()
    return str(wait_until(lambda: browser.text(".live-responses-table .response"), "an answer is there"))


# Behind a proxy, and called by pages of other origins


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
    """Serve the service below /ai/, with the line from docs/operations.md; yield the address."""
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


def test_page_and_docs_work_under_a_proxys_prefix(service: Service, browser: Browser, tmp_path: Path) -> None:
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
def other_origin() -> Iterator[str]:
    """Serve an empty page, and yield its origin."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Other origin</title><link rel=icon href=data:,>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", free_port()), Empty) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# What a page of another origin can read: status, JSON and headers, or an error if the browser blocks the answer.
POST_FROM_OTHER_ORIGIN = """
const [url, content, size, key, done] = arguments;
const form = new FormData();
const bytes = content ? Uint8Array.from(atob(content), (c) => c.charCodeAt(0)) : new Uint8Array(size);
form.append("image", new Blob([bytes]), "photo");
fetch(url + "/predict", { method: "POST", body: form, headers: key ? { Authorization: `Bearer ${key}` } : {} })
  .then(async (answer) => done([answer.status, await answer.json(),
    ["X-Request-ID", "Server-Timing", "Retry-After"].map((name) => answer.headers.get(name))]))
  .catch((error) => done([error.name]));
"""


def test_an_allowed_origin_can_read_predictions_and_errors(service: Service, chrome: Chrome) -> None:
    three, no_image = (base64.b64encode(data).decode() for data in (THREE.read_bytes(), b"No image."))

    def post(url: str, content: str = "", size: int = 0, key: str = KEY) -> Any:
        return chrome.execute_async_script(POST_FROM_OTHER_ORIGIN, url, content, size, key)

    with other_origin() as origin, run_apache(
        IMAGE_QUEUE=service.queue, CORS_ORIGINS=f"https://app.example,{origin}", API_KEYS=KEY, RATE_LIMIT="4/minute"
    ) as url:  # fmt: skip
        chrome.get(origin)
        status, body, headers = post(url, three)
        assert (status, body["predictions"][0]["label"]) == (200, "3")
        assert headers[0]
        assert "total;dur=" in headers[1]
        assert post(url, no_image)[:2] == [400, error_body("bad_image", service.post(b"No image."))]
        assert [post(url, three, key=wrong)[0] for wrong in ("", "another-key-than-that")] == [401, 401]
        assert post(url, size=17_000_000)[0] == 413
        assert post(url, three)[0] == 200
        status, body, headers = post(url, three)
        assert (status, body["error"]["code"]) == (429, "rate_limited")
        assert int(headers[2]) > 0
        assert post(service.url, three, key="") == ["TypeError"]  # CORS_ORIGINS is empty there
        chrome.get("about:blank")


def error_body(code: str, answer: requests.Response) -> Any:
    assert_error(answer, 400, code)
    return answer.json()


# HTTP


@pytest.mark.parametrize(
    ("accept", "page"),
    [(BROWSERS, True), ("text/html", True), ("text/html;q=0.2, */*;q=0.1", True), ("*/*", False), ("text/*", False),
     (None, False), ("text/plain, text/html;q=0.9", False), ("application/json", False), ("nonsense", False)],
)  # fmt: skip
def test_browsers_get_the_page_and_others_the_welcome_line(service: Service, accept: str | None, page: bool) -> None:
    answer = requests.get(service.url, headers={"Accept": accept}, timeout=10)

    assert answer.headers["Vary"] == "Accept"
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert ("<form" in answer.text) == page
    assert LINE in answer.text if page else answer.text == LINE


@pytest.mark.parametrize("address", ["/", *FILES])
def test_files_are_revalidated_by_etag(service: Service, address: str) -> None:
    first = requests.get(service.url + address, headers={"Accept": BROWSERS}, timeout=10)
    tag = {"If-None-Match": first.headers["ETag"], "Accept": BROWSERS}
    second = requests.get(service.url + address, headers=tag, timeout=10)

    assert (first.status_code, second.status_code, second.content) == (200, 304, b"")
    assert first.headers["Cache-Control"] == second.headers["Cache-Control"] == "no-cache"
    # Browsers apply the headers of a 304 to the page.
    policies = [answer.headers["Content-Security-Policy"] for answer in (first, second)]
    assert policies[0] == policies[1]
    assert policies[0].startswith("default-src 'none'")
    assert "unsafe" not in policies[0]


@pytest.mark.parametrize("address", ["/docs/", "/docs/swagger-ui.js", "/docs/LICENSE", "/static/page.js"])
def test_only_listed_files_are_served(service: Service, address: str) -> None:
    assert_error(requests.get(service.url + address, timeout=10), 404, "not_found")


def test_the_pages_have_no_inline_code_and_name_no_other_host() -> None:
    files = [path for path in (ROOT / "web/static").iterdir() if path.suffix in (".html", ".css", ".js")]
    assert len(files) >= len(SCRIPTS) + 5
    for path in files:
        name, text = path.name, path.read_text()
        assert not re.search(r"<style|style=|<script>|\bon\w+=\"|javascript:", text), name
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text), name
