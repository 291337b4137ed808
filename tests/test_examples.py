"""The example programs, run as their readers run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

TIMELINE = Path(__file__).parents[1] / "examples" / "timeline.py"


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", program, *arguments],
        check=False,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def told(backend: str, engine: sa.Engine) -> str:
    """What the timeline program prints, with its columns closed up."""
    by_default = backend == "sqlite-memory"  # which has no URL to give: the program is told nothing
    output = run(TIMELINE, *([] if by_default else [engine.url.render_as_string(hide_password=False)]))
    assert sa.inspect(engine).get_table_names() == [], "the program cleans up after itself"
    return "\n".join(re.sub(r" {2,}", "  ", line).strip() for line in output.splitlines())


def test_timeline_tells_who_changed_what(told: str) -> None:
    """The demo says who changed what, when and why: creation, hidden change, correction, deletion and return."""
    for event in (
        "2 Mar 09:15  ada@sales  created Customer C-1042\nname  Grace Hopper\nemail  grace@navy.example\ndiscount  0\n"
        "rationale  Signed up at the spring fair\n",
        "9 Mar 18:40  grace@portal  changed Customer C-1042\npassword  changed (history does not hold its value)\n\n",
        "1 Apr 10:05  ada@sales  changed Subscription 1\nseats  5 → 20\nrationale  Agreed on the phone\n",
        "2 Apr 11:30  mary@finance  changed Customer C-1042\ndiscount  50 → 5\nrationale  A slip: 5 % was agreed\n"
        "ticket  FIN-311\n",
        "email  grace@navy.example → grace@eckert.example\nconfirmed_by  link in a mail\n",
        "30 Jun 23:00  nightly job  deleted Customer C-1042\nrationale  Contract ended\n",
        "30 Jun 23:00  nightly job  deleted Subscription 1\nrationale  Contract ended\n",
        "15 Sep 14:20  ada@sales  created Customer C-1042\n",
    ):
        assert event in told
    assert "3 Mar" not in told, "a change of an untracked column alone leaves no trace"
    assert not re.search("cobol|nanosecond|flow-matic", told), "no hidden value is in what history holds"


def test_timeline_tells_how_it_was(told: str) -> None:
    """The demo compares two states, and shows the record before, in and between its lives, and its history's rows."""
    assert "discount: 0 → 5\nemail: grace@navy.example → grace@eckert.example\n" in told
    assert "1 Feb 22:00  (no such customer)" in told
    assert "1 Apr 22:00  version 2: grace@navy.example, 50 %" in told
    assert "1 Aug 22:00  (no such customer)" in told
    assert "1 Oct 22:00  version 6: grace@univac.example, 0 %  the record itself" in told
    assert "Customer.password is hidden" in told
    rows = told[told.index("version  began") :].splitlines()
    assert rows[1] == "-1  NULL  2026-03-02 09:15  insert  NULL  ada@sales  Signed up at the spring fair"
    assert [row.split("  ")[0] for row in rows[1:]] == ["-1", "0", "1", "2", "3", "4", "5"]
    ended = [row.split("  ")[2] for row in rows[1:]]
    assert [row.split("  ")[1] for row in rows[1:]] == ["NULL", *ended[:-1]]
