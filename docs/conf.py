"""How Sphinx builds the documentation; warnings are errors."""

import warnings
from importlib import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from sphinx.application import Sphinx
from sphinx.builders.text import TextBuilder
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


def _write_single_page(app: Sphinx, exception: Exception | None) -> None:
    """Write all pages as one plain text beside the HTML, for search and for language models: ``llms-full.txt``."""
    if exception is not None or app.builder.name != "html":
        return
    builder = TextBuilder(app, app.env)
    builder.secnumbers = {}
    parts = []
    for name in ["index", *app.env.toctree_includes["index"]]:
        if name == "explanation/benchmarks":
            continue  # tables that no plain text can hold
        page = app.env.get_and_resolve_doctree(name, builder)
        translator = builder.create_translator(page, builder)
        page.walkabout(translator)
        parts.append(translator.body.strip())
    Path(app.outdir, "llms-full.txt").write_text("\n\n\n".join(parts) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", _write_single_page)
