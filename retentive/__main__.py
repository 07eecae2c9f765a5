"""`python -m retentive`, the same as the command `retentive`."""

import sys

from retentive.cli import main

sys.exit(main())
