"""Take the picture of the live page: python docs/images/take_screenshot.py (needs Chromium and the dev extra)."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from rankd.demo import MODELS
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig


def main(target: Path, width: int = 1280, height: int = 860, scheme: str = "light") -> None:
    """Open the packaged model's page, wait for a ranking, save the picture."""
    with Server(MODELS, ServeConfig(port=0)) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(server.url)
        page.wait_for_selector("#ranked tr")
        page.click("#rank")
        page.wait_for_timeout(300)
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main(
        Path(__file__).with_name("live-page.png") if len(sys.argv) < 2 else Path(sys.argv[1]), *map(int, sys.argv[2:4])
    )
