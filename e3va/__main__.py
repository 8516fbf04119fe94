"""``python -m e3va`` is the command ``e3va``."""

import sys

from e3va.cli import main

sys.exit(main())
