"""The Flask adapter is imported when it is asked for, and says what it needs."""

import pickle
import subprocess
import sys

import pytest

import chrononaut
from chrononaut.exceptions import MissingExtraError

BLOCKED = """
import importlib.abc
import sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run(code: str, blocked: str = "") -> str:
    """Run code in an interpreter of its own, where a package is missing; return what it prints."""
    code = BLOCKED.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_core_imports_no_adapter() -> None:
    """Importing the library does not import Flask."""
    assert run("import chrononaut; print({'flask', 'flask_sqlalchemy', 'flask_login'} & set(sys.modules))") == "set()\n"


@pytest.mark.parametrize("blocked", ["flask", "flask_sqlalchemy"])
@pytest.mark.parametrize("module", ["chrononaut", "chrononaut.flask"])
def test_without_the_extra_the_error_says_what_to_install(blocked: str, module: str) -> None:
    """Where Flask is not installed, asking for the extension is an ImportError that names the extra."""
    output = run(
        f"""
try:
    from {module} import VersionedSQLAlchemy
except ImportError as error:
    import chrononaut
    assert isinstance(error, chrononaut.ChrononautException)
    print(error)
""",
        blocked,
    )
    assert "chrononaut[flask]" in output


def test_without_flask_login_the_extension_works() -> None:
    """Flask-Login is optional: without it there are no users."""
    code = """
from flask import Flask
from chrononaut import VersionedSQLAlchemy
app = Flask("app")
app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
db = VersionedSQLAlchemy(app)
with app.test_request_context():
    print(app.extensions["chrononaut"].user_id())
"""
    assert run(code, "flask_login") == "None\n"


def test_error_of_a_broken_dependency_is_passed_on() -> None:
    """That Flask itself fails to import is not mistaken for a missing extra."""
    code = """
try:
    from chrononaut import VersionedSQLAlchemy
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run(code, "werkzeug") == "werkzeug\n"


def test_lazy_name_is_public() -> None:
    """The extension stands in ``__all__``, is the same class in both places, and other names are missing as usual."""
    from chrononaut.flask import VersionedSQLAlchemy

    assert "VersionedSQLAlchemy" in chrononaut.__all__
    assert chrononaut.VersionedSQLAlchemy is VersionedSQLAlchemy
    with pytest.raises(AttributeError, match="no attribute 'VersionedSqlAlchemy'"):
        _ = chrononaut.VersionedSqlAlchemy


def test_missing_extra_error_pickles() -> None:
    """The error keeps its attributes through pickling."""
    error = pickle.loads(pickle.dumps(MissingExtraError("chrononaut.flask", "flask")))
    assert (error.feature, error.extra) == ("chrononaut.flask", "flask")
