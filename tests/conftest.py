"""What every test can use: see the ``fix_*`` modules, one for each theme."""

import sqlalchemy as sa

pytest_plugins = (
    "tests.fix_postgresql",
    "tests.fix_mariadb",
    "tests.fix_engine",
    "tests.fix_statements",
    "tests.fix_models",
)


def pytest_report_header() -> str:
    return f"sqlalchemy: {sa.__version__}"
