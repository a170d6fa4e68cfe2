"""A headless Chromium driven through its DevTools pipe: no driver, no port, no package."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """Commands go to the browser's file descriptor 3 and come from 4, each ended by a NUL."""

    def __init__(self, profile: Path) -> None:
        command = [str(executable()), "--headless=new", "--no-sandbox", "--disable-gpu",
                   "--no-first-run", "--disable-dev-shm-usage", "--disable-extensions",
                   "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip
        to_read, self.to = os.pipe()
        self.back, back_write = os.pipe()
        # the shell puts the two pipes where the browser looks for them
        line = f'exec 3<&{to_read} 4>&{back_write}; exec "$0" "$@"'
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", line, *command], pass_fds=(to_read, back_write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(back_write)
        self.buffer, self.last, self.events = b"", 0, list[dict[str, Any]]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer.get("result", {}))
            self.events.append(answer)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            chunk = os.read(self.back, 1 << 20)
            if not chunk:
                raise RuntimeError("Chromium ended before it answered")
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(line))

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file as a screen of this width would, and wait until it stands."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        for _ in range(100):
            if (
                self.run("document.readyState") == "complete"
                and self.run("location.protocol") == "file:"
            ):
                return
            time.sleep(0.05)
        raise RuntimeError(f"{path} did not load")

    def run(self, javascript: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=javascript, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["text"])
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings on the console since the page was opened."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]["text"]))
            elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
                "error", "warning"):  # fmt: skip
                found.append(str(params["args"]))
            elif event.get("method") == "Log.entryAdded":
                found.append(str(params["entry"]["text"]))
        return found

    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])

    def screenshot(self, path: Path, **clip: float) -> Path:
        extra = {"clip": {"scale": 1, **clip}} if clip else {}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, **extra)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def close(self) -> None:
        self.session = None
        os.write(self.to, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        os.close(self.to)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.back)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    running = Browser(profile)
    try:
        yield running
    finally:
        running.close()
