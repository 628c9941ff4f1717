"""`python -m fastvi`."""

import sys

from fastvi.cli import main

sys.exit(main())
