"""A headless Chromium, driven by the WebDriver protocol."""

import base64
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver")

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name of an element's id in the protocol
ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        self._http = httpx2.Client(base_url=address, timeout=60)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {
            "capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        }
        self._session = self._call("POST", "/session", wanted)["sessionId"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, path, json=body).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["message"])
        return answer

    def _do(self, path: str, body: Any = None, method: str = "POST") -> Any:
        return self._call(method, f"/session/{self._session}{path}", body)

    def open(self, address: str) -> None:
        self._do("/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._do("/execute/sync", {"script": f"return ({script})", "args": list(arguments)})

    def find(self, selector: str) -> str:
        return str(self._do("/element", {"using": "css selector", "value": selector})[ELEMENT])

    def click(self, selector: str) -> None:
        self._do(f"/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._do(f"/element/{self.find(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._do("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Wait until a script returns something true."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"never came true: {script}"
            time.sleep(0.05)
        return found

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._do("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def windows(self) -> list[str]:
        return list(self._do("/window/handles", method="GET"))

    def switch(self, window: str) -> None:
        self._do("/window", {"handle": window})

    def complaints(self) -> list[str]:
        """What the browser says of errors and of things that the page's policy forbids."""
        return [entry["message"] for entry in self._do("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._do("/screenshot", method="GET")))

    def close(self) -> None:
        self._do("", method="DELETE")
        self._http.close()


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of our own."""
    assert DRIVER is not None
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/status").json()["value"]["ready"]:
                    break
            except httpx2.HTTPError:
                assert time.monotonic() < deadline, "chromedriver does not start"
                time.sleep(0.05)
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(10)
