"""`python -m lvdm` is the command `lvdm`."""

import sys

from lvdm.cli import main

sys.exit(main())
