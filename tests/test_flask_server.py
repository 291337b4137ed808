"""Many users at once, on a real server with many threads."""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, OpenerDirector, Request, build_opener

import pytest
from flask import Flask, request
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.serving import make_server

from chrononaut.flask import fetch_remote_addr, fetch_user_id
from tests.fix_flask import Site

USERS = 12
EDITS = 8
SHARED = 1


@contextlib.contextmanager
def serving(app: Flask) -> Iterator[str]:
    """Serve an application, each request in a thread of its own; yield the address."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Browser:
    """One user's browser: cookies of its own, and an address that the proxy tells."""

    def __init__(self, url: str, number: int) -> None:
        self.url = url
        self.address = f"192.0.2.{number}"
        self.opener: OpenerDirector = build_opener(HTTPCookieProcessor())

    def post(self, path: str, **form: str) -> int:
        """Send a form and return the status."""
        message = Request(self.url + path, urlencode(form).encode(), {"X-Forwarded-For": self.address})
        try:
            with self.opener.open(message, timeout=60) as answer:
                return int(answer.status)
        except HTTPError as error:
            with error:
                return error.code


# In memory there is one connection for all threads, so their transactions would not be their own.
# In memory there is one connection for each thread, and so a database.
@pytest.mark.backends("sqlite-file", "postgresql", "mariadb")
def test_no_change_is_ever_attributed_to_another_request(site: Site) -> None:
    """Users edit own notes and a shared one, all at once; each change has its own user, address and reason."""
    site.app.wsgi_app = ProxyFix(site.app.wsgi_app, x_for=1)  # type: ignore[method-assign]
    numbers = range(1, USERS + 1)
    with site.app.app_context():
        for number in numbers:
            site.db.session.merge(site.User(id=number, email=f"user{number}@example.org"))
            site.db.session.merge(site.Note(id=SHARED + number, text="0:first"))
        site.db.session.get(site.Note, SHARED).text = "0:first"
        site.db.session.commit()
        site.db.session.query(site.Note).first().versions()
    together = threading.Barrier(USERS, timeout=60)
    info = site.app.extensions["chrononaut"]

    def among_all(fetch: Callable[[], str | None]) -> str | None:
        # All requests that edit an own note are in the midst of their flush here, at the same time.
        if request.path != f"/notes/{SHARED}":
            together.wait()
            found = fetch()
            together.wait()
            return found
        return fetch()

    info.user_id = lambda: among_all(fetch_user_id)
    info.remote_addr = lambda: among_all(fetch_remote_addr)

    def work(number: int) -> None:
        browser = Browser(url, number)
        assert browser.post(f"/login/{number}") == 200
        for edit in range(EDITS):
            for note in (SHARED, SHARED + number):
                text = f"{number}:{edit}"
                while (status := browser.post(f"/notes/{note}", text=text, why=text)) != 200:
                    assert status == 409  # another user was faster: try again

    with serving(site.app) as url, ThreadPoolExecutor(USERS) as pool:
        list(pool.map(work, numbers))

    with site.app.app_context():
        for note_id in (SHARED, *(SHARED + number for number in numbers)):
            note = site.db.session.get(site.Note, note_id)
            states = [*note.versions(), note]
            begin = next(place for place, state in enumerate(states) if state.text == "0:first")
            authors: Counter[str] = Counter()
            for ended, following in zip(states[begin:], states[begin + 1 :], strict=False):
                author = following.text.split(":")[0]
                authors[author] += 1
                assert ended.change_info == {
                    "user_id": f"user{author}@example.org",
                    "remote_addr": f"192.0.2.{author}",
                    "extra": {"rationale": following.text},
                }
            own = numbers if note_id == SHARED else [note_id - SHARED]
            assert authors == {str(number): EDITS for number in own}
