"""The Flask example as its users see it: a server process, and a real browser."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server(engine: sa.Engine, tmp_path: Path) -> Iterator[str]:
    """The address of the example's server, on the test's database."""
    command = [sys.executable, "-W", "error", "-m", "flask", "--app", "examples.flask_app", "run", "--port", "0"]
    environment = {
        **os.environ,
        "DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "PYTHONUNBUFFERED": "1",
    }
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield running_address(process, log)
    finally:
        process.terminate()
        process.wait(60)


def running_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    while True:
        try:
            ended: int | None = process.wait(0.05)
        except subprocess.TimeoutExpired:
            ended = None
        found = re.search(r"Running on (http://\S+)", log.read_text())
        if found:
            return found[1]
        assert ended is None, log.read_text()


def log_in(browser: Chrome, server: str, name: str) -> None:
    browser.get(f"{server}/login")
    browser.find_element(By.NAME, "email").send_keys(f"{name}@example.org")
    browser.find_element(By.NAME, "password").send_keys("demo")
    press(browser, "Log in")
    assert browser.find_element(By.ID, "user").text == f"{name}@example.org"


def press(browser: Chrome, button: str) -> None:
    follow(browser, browser.find_element(By.XPATH, f"//button[text()='{button}']"))


def follow(browser: Chrome, element: WebElement) -> None:
    """Click what leads to another page, and wait until it is there: nothing else tells it from the old one."""
    page = browser.find_element(By.TAG_NAME, "html")
    element.click()
    # The driver may be asked about the old page in the very moment in which it goes.
    wait = WebDriverWait(browser, 20, ignored_exceptions=[WebDriverException])
    wait.until(staleness_of(page))
    wait.until(lambda each: each.execute_script("return document.readyState") == "complete")


def fill(browser: Chrome, field: str, value: str) -> None:
    element = browser.find_element(By.NAME, field)
    element.clear()
    element.send_keys(value)


def edit(browser: Chrome, text: str, why: str) -> None:
    fill(browser, "text", text)
    fill(browser, "why", why)
    press(browser, "Save")


def last_ended(engine: sa.Engine) -> datetime:
    changed = sa.column("changed", sa.DateTime(timezone=True))
    latest = sa.select(sa.func.max(changed)).select_from(sa.table("article_history"))
    with engine.connect() as connection:
        ended: datetime = connection.execute(latest).scalar_one()
    return ended if ended.tzinfo else ended.replace(tzinfo=timezone.utc)


def texts(browser: Chrome, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


# A database in memory is not shared with the server's process.
@pytest.mark.backends("sqlite-file", "postgresql")
def test_users_see_their_own_changes_on_the_history_page(browser: Chrome, server: str, engine: sa.Engine) -> None:
    """Two users edit an article in turn; its history shows each change with who, when, where from, why, and how."""
    log_in(browser, server, "ada")
    follow(browser, browser.find_element(By.LINK_TEXT, "edit"))
    edit(browser, "Bees are small insects. They make honey and live in swarms.", "Bees do not live alone")

    assert browser.find_element(By.TAG_NAME, "h1").text == "History of Bees"
    assert texts(browser, ".who") == ["ada@example.org", "somebody"]
    assert texts(browser, ".why") == ["Bees do not live alone", "First content"]
    assert texts(browser, ".where") == ["127.0.0.1"]
    latest = browser.find_element(By.CSS_SELECTOR, ".change:first-of-type")
    assert latest.find_element(By.TAG_NAME, "del").text == "alone"
    gone, new = (latest.find_element(By.TAG_NAME, tag) for tag in ("del", "ins"))
    assert new.text == "in swarms"
    assert gone.value_of_css_property("background-color") != new.value_of_css_property("background-color")
    shown = latest.find_element(By.TAG_NAME, "time").get_attribute("datetime")
    assert shown is not None
    assert datetime.fromisoformat(shown) == last_ended(engine)

    press(browser, "Log out")
    log_in(browser, server, "mary")
    follow(browser, browser.find_element(By.LINK_TEXT, "edit"))
    edit(browser, "<b>Bees</b> make honey.", "Shorter")
    assert texts(browser, ".who") == ["mary@example.org", "ada@example.org", "somebody"]
    assert texts(browser, ".why") == ["Shorter", "Bees do not live alone", "First content"]
    assert "&lt;b&gt;" in browser.page_source


@pytest.mark.backends("sqlite-file", "postgresql")
def test_editor_who_is_too_late_is_told(browser: Chrome, server: str) -> None:
    """Who saves a form that was opened before somebody else saved does not overwrite that change."""
    log_in(browser, server, "ada")
    browser.get(f"{server}/articles/1")
    stale = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(f"{server}/articles/1")
    edit(browser, "Bees hum.", "First")
    assert texts(browser, ".why") == ["First", "First content"]
    browser.switch_to.window(stale)
    edit(browser, "Bees sting.", "Second")
    assert "Somebody else has changed this article" in browser.find_element(By.CLASS_NAME, "message").text
    browser.get(f"{server}/articles/1/history")
    assert texts(browser, ".why") == ["First", "First content"]


@pytest.mark.backends("sqlite-file", "postgresql")
def test_wrong_password_and_no_login(browser: Chrome, server: str) -> None:
    """Nobody edits without having logged in."""
    browser.get(f"{server}/articles/1")
    fill(browser, "email", "ada@example.org")
    fill(browser, "password", "wrong")
    press(browser, "Log in")
    assert "Nobody has this address" in browser.find_element(By.CLASS_NAME, "message").text
