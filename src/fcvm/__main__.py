"""``python -m fcvm``."""

from fcvm.cli.main import entry

entry()
