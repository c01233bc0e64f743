"""`python -m retune` is `retune`."""

import sys

from retune.cli import main

sys.exit(main())
