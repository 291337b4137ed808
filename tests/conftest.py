"""What every test can use: see the ``fix_*`` modules, one for each theme."""

import sqlalchemy as sa
from hypothesis import settings

pytest_plugins = (
    "tests.fix_postgresql",
    "tests.fix_mariadb",
    "tests.fix_engine",
    "tests.fix_async",
    "tests.fix_statements",
    "tests.fix_models",
    "tests.fix_flask",
    "tests.fix_browser",
    "tests.fix_alembic",
    "tests.fix_broken_history",
    "tests.fix_originals",
)

# The default is for every day; `--hypothesis-profile=thorough` is for a change to the core.
settings.register_profile("default", max_examples=150, deadline=None, print_blob=True)
settings.register_profile("thorough", max_examples=5000, deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_report_header() -> str:
    return f"sqlalchemy: {sa.__version__}"
