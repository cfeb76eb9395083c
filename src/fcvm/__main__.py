"""``python -m fcvm``."""

import sys

from fcvm.cli.main import main

sys.exit(main())
