"""Chromium without a screen, driven by chromedriver: Debian's packages chromium and chromium-driver."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WAIT_S = 20

_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
)


def _programs() -> tuple[str, str]:
    """Browser and driver; the test is skipped where one is missing."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip(
            f"no {'Chromium' if browser is None else 'chromedriver'} here: "
            "apt-get install -y --no-install-recommends chromium chromium-driver (`make test` does it)"
        )
    return browser, driver


class Browser:
    """A page in a browser."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, page: Path) -> None:
        """Open a page from disk, and wait until it has its data. What was on the console before is gone."""
        self._driver.get_log("browser")
        self._driver.get("about:blank")  # or a change of the fragment alone would load nothing
        self._driver.get(page.as_uri())
        self.wait("return document.body.dataset.ready !== undefined")

    def use_dark(self, dark: bool) -> None:
        """Whether the person prefers a dark page."""
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    def resize(self, width: int, height: int = 900) -> None:
        """The size of the window's inside, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def js(self, script: str, *arguments: object) -> Any:
        """What a script returns."""
        return self._driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: object) -> Any:
        """Wait until a script returns something true, and give that. The browser itself looks again."""
        from selenium.common.exceptions import TimeoutException

        poll = f"""
            const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);
            const look = function () {{ {script} }};
            (function again() {{
                const found = look.apply(null, given);
                if (found) done(found); else setTimeout(again, 5);
            }})();"""
        try:
            return self._driver.execute_async_script(poll, *arguments)
        except TimeoutException:
            raise AssertionError(f"never true: {script}; console: {self.console()}") from None

    def texts(self, selector: str) -> list[str]:
        """The texts of the elements that are shown."""
        found: list[str] = self.js(
            "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility())"
            ".map((e) => e.innerText)",
            selector,
        )
        return found

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of an element."""
        self._element(selector).click()

    def type(self, text: str) -> None:
        """Keys, to whatever has the focus."""
        self._driver.switch_to.active_element.send_keys(text)

    def accessibility(self) -> list[dict[str, Any]]:
        """What a screen reader gets: the nodes of the page."""
        nodes: list[dict[str, Any]] = self._driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return nodes

    def printed(self) -> bytes:
        """The page on paper: base64 of a PDF."""
        content: str = self._driver.execute_cdp_cmd("Page.printToPDF", {})["data"]
        return content.encode()

    def console(self) -> list[str]:
        """What the page's console says since the last time, violations of the policy included."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._driver.get_log("browser")]

    def _element(self, selector: str) -> Any:
        from selenium.webdriver.common.by import By

        return self._driver.find_element(By.CSS_SELECTOR, selector)


@contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """A browser whose files are all in this folder; it is gone in the end."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is in the extra 'dev'")
    browser, driver = _programs()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    if os.getuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium does not start as root with it
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}
    service = webdriver.ChromeService(executable_path=driver, env=environment)
    running = webdriver.Chrome(options=options, service=service)
    try:
        running.set_script_timeout(WAIT_S)
        yield Browser(running)
    finally:
        running.quit()
