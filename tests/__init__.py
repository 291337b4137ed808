"""The test suite: one module for each module of the library, fixtures by theme in ``fix_*.py``."""
