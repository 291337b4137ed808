"""``python -m chrononaut``: the same as the command ``chrononaut``."""

from __future__ import annotations

import sys

from chrononaut.cli import main

if __name__ == "__main__":
    sys.exit(main())
