"""`python -m fastvi.cli`."""

import sys

from fastvi.cli import main

sys.exit(main())
