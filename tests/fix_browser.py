"""``browser``: a headless Chromium."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

PROGRAMS = ("chromium", "chromedriver")
PACKAGES = ("chromium", "chromium-driver")


@pytest.fixture(scope="session")
def chromium() -> tuple[str, str]:
    """The paths of Chromium and its driver; under CI they are installed if need be, and must be there."""
    if os.environ.get("CI") == "true":
        install()
    if missing():
        pytest.skip(
            f"{', '.join(missing())} not found: install {' and '.join(PACKAGES)}, or set CI=true to have it done"
        )
    browser, driver = (shutil.which(program) or "" for program in PROGRAMS)
    return browser, driver


def install() -> None:
    """Install what is missing; one worker does it, the others wait."""
    lock = Path(tempfile.gettempdir()) / "chrononaut-installs-chromium.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not missing():
            return
        as_root = [] if os.geteuid() == 0 else ["sudo"]
        apt_get = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run([*apt_get, *arguments], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert not missing(), f"{' and '.join(PACKAGES)} are installed, but not found"


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


@pytest.fixture
def browser(chromium: tuple[str, str]) -> Iterator[Chrome]:
    """A browser of the test's own, with a fresh profile."""
    binary, driver = chromium
    options = ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    made = Chrome(options, ChromeService(driver))
    try:
        made.implicitly_wait(20)
        yield made
    finally:
        made.quit()
