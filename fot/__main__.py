"""``python -m fot``."""

import sys

from fot.cli import main

sys.exit(main())
