"""No URL serves a file of the project, and other HTTP methods are rejected."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from access_fixtures import Guarded, answer_of, raw
from harness import ROOT, need

pytest_plugins = ["access_fixtures"]

SPELLINGS = [
    "/{}", "//{}", "/./{}", "/a/../{}", "/%2e/{}", "/a/%2e%2e/{}", "/..%2f{}", "/%2e%2e%2f{}", "/a%2f..%2f{}",
    "/..%5c{}", "/..\\{}", "/%c0%ae%c0%ae/{}", "/%252e%252e/{}", "/..%252f{}", "/.%00./{}", "/../{}", "/../../{}",
    "/static/{}", "/static/../{}", "/static/%2e%2e/{}", "/images/{}", "/images/../{}", "/cgi-bin/../{}", "/~root/{}",
    "/{}/", "/{}.", "/{}%20", "/{}~", "/{}%00", "/{}%00.png", "/{}.bak", "/{}::$DATA", "/{};x", "/{}?x", "/{}/x",
]  # fmt: skip


def targets() -> list[tuple[str, list[str]]]:
    """Return every project file and some hidden files, each with many spellings of its path."""
    tracked = subprocess.check_output([need("git"), "-c", "safe.directory=*", "ls-files"], cwd=ROOT, text=True).split()
    hidden = [".env", ".git", ".git/config", ".git/HEAD", ".venv/pyvenv.cfg", ".ruff_cache/CACHEDIR.TAG", "bin"]
    absolute = [f"{each}{ROOT}/{{}}" for each in ("", "/", "/..", "/file:", "/static/")]
    return [(name, [spelling.format(name) for spelling in [*SPELLINGS, *absolute]]) for name in [*tracked, *hidden]]


def distinctive(name: str) -> bytes:
    """Return the longest line of a file, which identifies it in a response."""
    path = ROOT / name
    longest = max(path.read_bytes().splitlines(), key=len) if path.is_file() else b""
    return longest if len(longest) > 12 else b"no such line"


@pytest.mark.slow("sends thousands of requests")
def test_no_url_serves_a_project_file(guarded: Guarded) -> None:
    def leaks(name: str, address: str) -> str:
        request = f"GET {address} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        answer = raw(guarded.url, request)
        found = answer.split()[1] == b"200" or distinctive(name) in answer
        return f"{address}: {answer[:60]!r}" if found else ""

    asked = [(name, address) for name, addresses in targets() for address in addresses]
    with ThreadPoolExecutor(8) as pool:
        found = [each for each in pool.map(lambda each: leaks(*each), asked) if each]

    assert len(asked) > 1500
    assert found == []


@pytest.mark.parametrize("method", ["TRACE", "PUT", "DELETE", "PATCH", "PROPFIND", "MKCOL", "COPY", "CONNECT", "DEBUG"])
@pytest.mark.parametrize("path", ["/", "/predict", "/settings.py", "*"])
def test_other_methods_are_rejected(guarded: Guarded, method: str, path: str) -> None:
    request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()

    answer = raw(guarded.url, request)

    assert int(answer.split()[1]) in {400, 403, 404, 405, 501}
    assert b'"success"' in answer


@pytest.mark.parametrize("path", ["/", "/predict", "*"])
def test_options_lists_only_the_methods(guarded: Guarded, path: str) -> None:
    request = f"OPTIONS {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()

    status, headers = answer_of(guarded.url, request)

    assert status in {200, 400, 404}
    assert set(dict(headers).get("allow", "").split(", ")) <= {"", "GET", "HEAD", "POST", "OPTIONS"}
