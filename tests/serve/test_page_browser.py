"""The live page in a real browser: headless Chromium picks a user, ranks, and sends an event."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from rankd.serve.lifecycle import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    """The live page, open; anything that the browser complains about fails the test."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI has to have Chromium")
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1280, "height": 860})
        complaints: list[str] = []
        opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(server.url)
        yield opened
        browser.close()
    assert [text for text in complaints if "404" not in text and "400" not in text] == []


def test_a_visitor_ranks_and_sends_an_event(page: Page, server: Server) -> None:
    expect(page.locator("#status")).to_contain_text("demo 1, climber in fp32")
    rows = page.locator("#ranked tr")
    expect(rows).to_have_count(20)
    expect(page.locator("#history li").first).to_be_visible()
    expect(page.locator("#timings")).to_contain_text("encode")
    shown = [float(text.strip(" %")) for text in page.locator("#ranked td.task:nth-child(4)").all_inner_texts()]
    assert shown[0] > shown[-1]

    page.fill("#user", "a visitor")
    page.press("#user", "Enter")
    expect(page.locator("#history-size")).to_have_text("none: ranked as a new user")
    expect(page.locator("#ranked")).not_to_contain_text("in history")
    before = page.locator("#ranked td.task").all_inner_texts()
    last = rows.last.locator("button")
    name = last.inner_text()
    page.select_option("#event", "like")
    last.click()
    expect(page.locator("#history li")).to_have_count(1)
    expect(page.locator("#history li").first).to_contain_text(name)
    expect(page.locator("#ranked")).to_contain_text("in history")
    stored = server.repository.get().features.stored_history("a visitor")
    assert stored is not None
    assert len(stored) == 1
    assert page.locator("#ranked td.task").all_inner_texts() != before


def test_own_candidates_and_a_message_for_what_cannot_be(page: Page) -> None:
    expect(page.locator("#ranked tr")).to_have_count(20)
    page.fill("#own", "no such film")
    page.press("#own", "Enter")
    expect(page.locator("#ranked tr")).to_have_count(21)
    expect(page.locator("#ranked tr").last).to_contain_text("unknown item")
    page.fill("#user", "")
    page.press("#user", "Enter")
    page.click("#rank")
    expect(page.locator("#error")).to_contain_text("$.user_id")
