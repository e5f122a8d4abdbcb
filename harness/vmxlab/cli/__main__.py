"""`python -m vmxlab.cli`, for where the program `vmxlab` is not on PATH."""

from __future__ import annotations

import sys

from vmxlab.cli import main

sys.exit(main())
