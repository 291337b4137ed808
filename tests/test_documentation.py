"""The README and the documentation: what they show runs, and what is public is in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import chrononaut
import chrononaut.exceptions
import chrononaut.flask
import chrononaut.typing
import chrononaut.unsafe
from tests import pages

README = pages.ROOT / "README.md"


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of a page runs in the order of reading, and prints what the page says it prints."""
    monkeypatch.chdir(tmp_path)
    with pages.run(page):
        pass


def test_wrong_output_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that says something else than its code prints fails, and so does one whose code raises."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```output\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:5"), pages.run(page):
        pass
    page.write_text("<!-- invisible python\nx = 1\n-->\n\n```python\nprint(x)\n```\n\n```output\n1\n```\n")
    with pages.run(page):
        pass
    page.write_text("<!-- not run: an example -->\n```python\nnonsense\n```\n")
    with pages.run(page):
        pass
    page.write_text("```python\nnonsense\n```\n")
    with pytest.raises(NameError), pages.run(page):
        pass


def test_code_that_needs_what_is_not_installed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that needs a module is run if that can be imported, whether the block is visible or not."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    text = "<!-- needs: {0} -->\n```python\nprint(1)\n```\n\n<!-- needs: {0}; invisible python\nprint(2)\n-->\n"
    page.write_text(text.format("json") + "\n```output\n1\n2\n```\n")
    with pages.run(page):
        pass
    page.write_text(text.format("no_such_module") + "\n```python\nprint(3)\n```\n\n```output\n3\n```\n")
    with pages.run(page):
        pass


def test_readme_starts_with_a_short_program() -> None:
    """The README's program is complete, as the test above shows, and at most 25 lines long."""
    program = next(pages.blocks(README))
    assert len(program.text.splitlines()) <= 25


def test_readme_shows_the_rows_of_its_program() -> None:
    """The history rows in the README are those that its program leaves, but for the times, which only keep order."""
    columns, *documented = table(README)
    with pages.run(README) as namespace, namespace["engine"].connect() as connection:
        found = connection.execute(sa.text("SELECT * FROM appuser_history ORDER BY version"))
        assert list(found.keys()) == columns
        rows = [list(row) for row in found]
    assert [known(columns, row) for row in documented] == [known(columns, row) for row in rows]
    assert order_of_times(columns, documented) == order_of_times(columns, rows)


def table(page: Path) -> list[list[str]]:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= set("-: ")]


def known(columns: list[str], row: list[Any]) -> list[Any]:
    values = dict(zip(columns, ["NULL" if value is None else str(value) for value in row], strict=True))
    values["change_info"] = json.dumps(json.loads(values["change_info"]), sort_keys=True)
    return [value for name, value in values.items() if name not in ("began", "changed")]


def order_of_times(columns: list[str], rows: list[list[Any]]) -> list[int]:
    times = [str(row[columns.index(name)] or "NULL") for row in rows for name in ("began", "changed")]
    order = ["NULL", *sorted({time for time in times if time != "NULL"})]
    return [order.index(time) for time in times]


@pytest.mark.parametrize(
    "module",
    [chrononaut, chrononaut.exceptions, chrononaut.flask, chrononaut.typing, chrononaut.unsafe],
    ids=lambda m: m.__name__,
)
def test_every_public_name_is_in_the_reference(module: Any) -> None:
    """What a public module exports is documented in reference/api.md or reference/errors.md."""
    reference = "".join((pages.ROOT / "docs" / "reference" / name).read_text() for name in ("api.md", "errors.md"))
    documented = set(re.findall(r"auto(?:class|function|exception|data)::? chrononaut\.(?:\w+\.)*(\w+)", reference))
    assert set(module.__all__) - documented == set()
