"""A real headless Chromium, driven over its DevTools pipe: one page, any width, light or dark, screen or print.

No name resolves in it: a page that asks for something on the net must do without.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")


class Browser:
    """One page. `requests` holds the address of everything that the current document asked for."""

    def __init__(self, profile: Path):
        assert CHROMIUM
        to_browser, from_us = os.pipe()
        to_us, from_browser = os.pipe()
        quiet = ["--no-first-run", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
        quiet += ["--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        command = [CHROMIUM, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={profile}"]
        # The pipe's ends must be the descriptors 3 and 4, which only a shell can promise; dash knows but one digit.
        shell = ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash"]
        self._process = subprocess.Popen(
            [*shell, *command, "--remote-debugging-pipe"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._send, self._receive = os.fdopen(from_us, "wb", 0), os.fdopen(to_us, "rb")
        self._calls, self._session, self._loaded = 0, "", False
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one DevTools command."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._calls:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self._receive.read(1)) != b"\0":
            assert byte, "the browser ended"
            raw += byte
        message: dict[str, Any] = json.loads(raw)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._loaded = self._loaded or message.get("method") == "Page.loadEventFired"
        return message

    def open(self, page: Path | str, *, width: int = 1400, dark: bool = False, media: str = "screen") -> None:
        """Load a file or an address at this width in CSS pixels and wait until its images are there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.requests.clear()
        self._loaded = False
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not self._loaded:
            self._next()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, selector: str = "html") -> bytes:
        """The first element that the CSS selector finds, by default the whole page, as PNG."""
        box = self.ask(
            f"""(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height, scale: 1}}))(
            document.querySelector({json.dumps(selector)}).getBoundingClientRect())"""
        )
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=box)["data"])

    def pdf(self) -> bytes:
        """The page as printed on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69}
        return base64.b64decode(self.call("Page.printToPDF", **size)["data"])

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        self._process.wait(30)
        self._send.close()
        self._receive.close()
