"""The code on a Markdown page, run in the order of reading.

- A ``python`` block is run, in one namespace with the page's other blocks.
- An ``output`` block is what the blocks before it have printed since the last one; ``...`` stands for anything.
- An HTML comment ``<!-- invisible python`` ... ``-->`` is run too: set-up that would distract the reader.
- A block right after ``<!-- not run: REASON -->`` is only to be read, as are blocks of any other language.
- A block right after ``<!-- needs: MODULE -->`` is run where that is installed; an invisible one says so in its own
  comment: ``<!-- needs: MODULE; invisible python`` ... ``-->``.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy as sa

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(
    r"^(?P<indent>[ ]*)(?:"
    r"(?P<fence>```+|:::+)[ ]*(?:\{code-block\}[ ]*)?(?P<language>[\w+-]+)[^\n]*\n(?P<code>.*?)^(?P=indent)(?P=fence)"
    r"|<!-- (?:needs: (?P<module>\w+); )?invisible python\n(?P<hidden>.*?)-->)",
    re.MULTILINE | re.DOTALL,
)
_NEEDS = re.compile(r"<!-- needs: (\w+) -->\s*\Z")
_NOT_RUN = re.compile(r"<!-- not run: [^\n]+ -->\s*\Z")
_CHECKER = doctest.OutputChecker()


@dataclass(frozen=True)
class Block:
    """A block of a page that is run, or that says what was printed."""

    language: str
    line: int
    text: str


def pages() -> list[Path]:
    """The README and the documentation's pages."""
    docs = ROOT / "docs"
    return [ROOT / "README.md", *sorted(page for page in docs.rglob("*.md") if "_build" not in page.parts)]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page that count."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        if _NOT_RUN.search(text, 0, match.start()) or not _has(match["module"] or _needed(text, match.start())):
            continue
        group = "hidden" if match["hidden"] is not None else "code"
        language = "python" if group == "hidden" else match["language"]
        if language in ("python", "output"):
            code = "".join(line.removeprefix(match["indent"]) for line in match[group].splitlines(keepends=True))
            yield Block(language, text.count("\n", 0, match.start(group)), code)


def _needed(text: str, position: int) -> str | None:
    match = _NEEDS.search(text, 0, position)
    return match[1] if match is not None else None


def _has(module: str | None) -> bool:
    return module is None or importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def run(page: Path) -> Iterator[dict[str, Any]]:
    """Run a page's blocks and check what they print; yields their namespace, and closes its engines afterwards."""
    # A real module: SQLAlchemy looks up in it what annotations name.
    module = ModuleType("page_" + re.sub(r"\W", "_", str(page.relative_to(ROOT))))
    sys.modules[module.__name__] = module
    namespace = vars(module)
    printed = io.StringIO()
    try:
        for block in blocks(page):
            if block.language == "output":
                _check(page, block, printed.getvalue())
                printed = io.StringIO()
                continue
            code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
        yield namespace
    finally:
        del sys.modules[module.__name__]
        for value in namespace.values():
            if isinstance(value, sa.Engine):
                value.dispose()


def _check(page: Path, block: Block, got: str) -> None:
    if not _CHECKER.check_output(block.text, got, doctest.ELLIPSIS):
        example = doctest.Example("", block.text)
        difference = _CHECKER.output_difference(example, got, doctest.ELLIPSIS)
        raise AssertionError(f"{page.relative_to(ROOT)}:{block.line}\n{difference}")
