"""How Sphinx builds the documentation; warnings are errors."""

import warnings
from importlib import metadata
from urllib.error import URLError
from urllib.request import Request, urlopen

from sqlalchemy.exc import SAWarning

project = "chrononaut"
author = "the chrononaut authors"
copyright = author
release = metadata.version("chrononaut")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "chrononaut"
nitpicky = False

# Autodoc looks at the mixins outside of any mapped class, of which SQLAlchemy warns.
warnings.filterwarnings("ignore", "Unmanaged access of declarative attribute", category=SAWarning)

autodoc_member_order = "bysource"
autodoc_typehints = "description"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3


def _reachable(url: str) -> bool:
    try:
        with urlopen(Request(url + "objects.inv", method="HEAD"), timeout=5):
            return True
    except (URLError, OSError):
        return False


# A build without network leaves the links to other projects out; any other warning still fails it.
intersphinx_mapping = {
    name: (url, None)
    for name, url in {
        "python": "https://docs.python.org/3/",
        "sqlalchemy": "https://docs.sqlalchemy.org/en/20/",
        "flask": "https://flask.palletsprojects.com/en/stable/",
        "flask_sqlalchemy": "https://flask-sqlalchemy.readthedocs.io/en/stable/",
        "alembic": "https://alembic.sqlalchemy.org/en/latest/",
    }.items()
    if _reachable(url)
}
