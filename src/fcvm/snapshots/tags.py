"""The names of snapshots; in a module of its own because the client of a clone server imports as little as it can."""

import re

from fcvm.errors import UsageError

TAG = r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}"
CREATING = ".creating"
REMOVING = ".removing"


def is_tag(name: str) -> bool:
    """Whether ``name`` can name a snapshot."""
    return re.fullmatch(TAG, name) is not None and not name.endswith((CREATING, REMOVING))


def check_tag(tag: str) -> str:
    """``tag`` if it can name a snapshot; raises UsageError."""
    if not is_tag(tag):
        raise UsageError(
            f"{tag!r} cannot name a snapshot.",
            hint="use letters, digits, '_', '.' and '-', beginning with a letter or digit, at most 63",
        )
    return tag


def tag_names(**_: object) -> list[str]:
    """The names of snapshots, for argcomplete."""
    from fcvm import config
    from fcvm.snapshots import store
    from fcvm.storage.layout import Layout

    return store.tags(Layout(config.load().base_dir))
