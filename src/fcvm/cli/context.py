"""What every command is given besides its own arguments."""

from __future__ import annotations

from fc_agent.structs import Struct
from fcvm.config import Config
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Arguments:
    """What a command line says, one attribute each, as argparse's own ``Namespace``."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the command line has no {name}")


class Context(Struct):
    """The settings in force and the data directory that they name."""

    config: Config

    @property
    def layout(self) -> Layout:
        return Layout(self.config.base_dir)
