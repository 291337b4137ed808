"""``browser``: a headless Chromium."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

PROGRAMS = ("chromium", "chromedriver")
PACKAGES = ("chromium", "chromium-driver")


@pytest.fixture(scope="session")
def chromium() -> tuple[str, str]:
    """The paths of Chromium and its driver; under CI they are installed if need be, and must be there."""
    if missing() and os.environ.get("CI") == "true":
        run = [] if os.geteuid() == 0 else ["sudo"]
        # Several workers may get here at once: each waits for the others.
        apt_get = [*run, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=600"]
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run([*apt_get, *arguments], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        assert not missing(), f"{' and '.join(PACKAGES)} are installed, but not found"
    if missing():
        pytest.skip(
            f"{', '.join(missing())} not found: install {' and '.join(PACKAGES)}, or set CI=true to have it done"
        )
    browser, driver = (shutil.which(program) or "" for program in PROGRAMS)
    return browser, driver


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
