"""Provides what VMs are started from: storage, kernel, guest image, initrd, Firecracker.

``find`` is on the path of every command and imports nothing heavy; ``ensure`` builds and fetches what is missing.
"""

from __future__ import annotations

from fcvm.config import Config
from fcvm.setup.assets import Assets, find
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.setup.progress import Progress


def ensure(config: Config, layout: Layout, progress: Progress, *, force: bool = False) -> Assets:
    """``build.ensure``, whose imports are heavy."""
    from fcvm.setup import build

    return build.ensure(config, layout, progress, force=force)


__all__ = ["Assets", "ensure", "find"]
