"""Pages in headless Chromium, driven through its DevTools protocol: what they load, log, measure and look like."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
# With --remote-debugging-pipe, Chromium reads commands from descriptor 3, and writes answers into 4.
LAUNCHER = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(name), fcntl.F_DUPFD, 10) for name in sys.argv[1:3])
os.dup2(commands, 3), os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
LOUD = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


class Browser:
    """One window of a Chromium of its own, with a fresh profile. The browser ends with the ``with`` block."""

    def __init__(self) -> None:
        assert CHROMIUM, "there is no Chromium"
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        theirs, self.out = os.pipe()
        self.inward, answers = os.pipe()
        command = [sys.executable, "-c", LAUNCHER, str(theirs), str(answers), CHROMIUM, *OPTIONS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={self.profile}"],
            pass_fds=(theirs, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs)
        os.close(answers)
        self.received = b""
        self.number = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and all its processes."""
        os.close(self.out)
        os.close(self.inward)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def receive(self, limit: float = 60) -> dict[str, Any]:
        """Return the next message."""
        end = time.monotonic() + limit
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.inward], [], [], max(0, end - time.monotonic()))
            assert ready, f"Chromium has not answered for {limit} s"
            read = os.read(self.inward, 1 << 20)
            assert read, "Chromium has ended"
            self.received += read
        message, _, self.received = self.received.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def open(self, address: str, width: int = 1280, height: int = 1000) -> None:
        """Load a page in a window of this size, and wait until all that it names is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; of a promise, its result."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, limit: float = 20) -> Any:
        """Return the first value of an expression that counts as true."""
        end = time.monotonic() + limit
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} is still {value!r}"
            time.sleep(0.05)
        return value

    def requested(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        events = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in events]

    def complaints(self) -> list[str]:
        """Return the errors and warnings that are in the page's console."""
        said = [event["params"] for event in self.events if event["method"] in LOUD]
        return [
            json.dumps(entry)
            for entry in said
            if entry.get("type") in (None, "error", "warning", "assert")
            and entry.get("entry", {}).get("level") not in ("info", "verbose")
        ]

    def picture(self, file: Path) -> None:
        """Write a picture of the whole page."""
        height = self.evaluate("document.documentElement.scrollHeight")
        width = self.evaluate("window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 16000), "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(shot["data"]))
