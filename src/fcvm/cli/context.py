"""What every command is given besides its own arguments."""

from fc_agent.structs import Struct
from fcvm.config import Config
from fcvm.storage.layout import Layout


class Context(Struct):
    """The settings in force and the data directory that they name."""

    config: Config

    @property
    def layout(self) -> Layout:
        return Layout(self.config.base_dir)
