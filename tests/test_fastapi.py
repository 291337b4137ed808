"""The FastAPI example, served by uvicorn, with many clients at once."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from tests.fix_async import DRIVERS

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(driver: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of the application, running in a process of its own on an empty database."""
    if driver == "aiosqlite":  # has one writer at a time, so the others must be patient
        url, reset = sa.make_url(f"sqlite+aiosqlite:///{tmp_path / 'app.db'}?timeout=60"), None
    else:
        url, reset = request.getfixturevalue(f"{DRIVERS[driver]}_database")
        url = url.set(drivername=f"{url.get_backend_name()}+{driver}")
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "examples.fastapi_app.app:app", "--port", "0"],
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False)},
            stdout=output,
            stderr=output,
        )
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.wait()
        if reset is not None:
            reset()
    assert "Traceback" not in log.read_text()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Wait until the server says where it listens."""
    while "Uvicorn running on " not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    return log.read_text().partition("Uvicorn running on ")[2].split()[0]


async def test_concurrent_clients_are_told_apart(server: str) -> None:
    """Each change is recorded with the client that made it; a stale one is refused, and leaves nothing."""
    limits = httpx.Limits(max_connections=25)
    async with httpx.AsyncClient(base_url=server, timeout=120, limits=limits) as client:

        async def work(number: int) -> int:
            mine = {"X-User": f"user {number}"}
            data = {"title": f"title {number}", "text": "one"}
            document = (await client.post("/documents", json=data, headers=mine)).raise_for_status().json()
            url = f"/documents/{document['id']}"
            for text in ("two", "three"):
                data |= {"text": text, "reason": f"reason {number} {text}"}
                (await client.put(url, json=data, headers=mine)).raise_for_status()
            return int(document["id"])

        ids = await asyncio.gather(*(work(number) for number in range(25)))
        for number, key in enumerate(ids):
            response = await client.get(f"/documents/{key}/history", headers={"X-User": "reader"})
            rows = response.raise_for_status().json()
            assert [(row["version"], row["title"], row["text"]) for row in rows] == [
                (0, f"title {number}", "one"),
                (1, f"title {number}", "two"),
            ]
            assert [row["change_info"] for row in rows] == [
                {
                    "user_id": f"user {number}",
                    "remote_addr": "127.0.0.1",
                    "extra": {"rationale": f"reason {number} {text}"},
                }
                for text in ("two", "three")
            ]


async def test_racing_clients_lose_no_history(server: str) -> None:
    """Of clients that change one document at once, each is recorded or refused."""
    headers = {"X-User": "somebody"}
    async with httpx.AsyncClient(base_url=server, timeout=120, headers=headers) as client:
        data = {"title": "t", "text": "start"}
        url = f"/documents/{(await client.post('/documents', json=data)).json()['id']}"
        responses = await asyncio.gather(
            *(client.put(url, json={**data, "text": f"text {number}", "version": 0}) for number in range(20))
        )
        assert {response.status_code for response in responses} <= {200, 409}
        assert [response.status_code for response in responses].count(200) == 1
        rows = (await client.get(f"{url}/history")).json()
        assert [row["text"] for row in rows] == ["start"]
        ended = datetime.fromisoformat(rows[0]["until"])
        before = await client.get(url, params={"at": (ended - timedelta(microseconds=1)).isoformat()})
        assert before.json()["text"] == "start"
        after = await client.get(url, params={"at": ended.isoformat()})
        assert after.json()["version"] == 1
        assert (await client.get(url, params={"at": "2001-01-01T00:00:00Z"})).status_code == 404
        assert (await client.get(url, params={"at": "2001-01-01T00:00:00"})).status_code == 422
