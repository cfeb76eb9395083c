"""Compiles the agent, and fcvm, for the guest's Python, so that it need not be done at every boot.

Bytecode is of one Python version, and the guest's is seldom the host's. So the guest's own interpreter does it: setup has
taken it out of the image (``recipe.TOOLS``), with as much of its library as it needs to start.
"""

import importlib.util
import marshal
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fc_agent.structs import Struct
from fcvm.process import run
from fcvm.setup.assets import tool

# Both sides speak this version of marshal: all Pythons since 3.4.
MARSHAL_VERSION = 4

# PEP 552: hash-based, and never compared with the source.
UNCHECKED_HASH = 0b01

# Run by the guest's interpreter, which has no library to import from here: what it imports is frozen or built in.
COMPILER = """\
import marshal, sys
from _frozen_importlib_external import MAGIC_NUMBER
sources = marshal.load(sys.stdin.buffer)
codes = {name: marshal.dumps(compile(source, path, "exec", dont_inherit=True)) for name, path, source in sources}
marshal.dump((sys.implementation.cache_tag, MAGIC_NUMBER, codes), sys.stdout.buffer, int(sys.argv[1]))
"""


class Compiled(Struct):
    """Bytecode of one Python release: ``tag`` is in the names of its files (``cpython-313``), ``magic`` at their start."""

    tag: str
    magic: bytes
    codes: dict[str, bytes]

    def file(self, name: str, source: bytes) -> bytes:
        """The content of the .pyc file of module ``name``, which is never compared with its ``source``."""
        header = self.magic + UNCHECKED_HASH.to_bytes(4, "little") + importlib.util.source_hash(source)
        return header + self.codes[name]


def compile_all(sources: Sequence[tuple[str, str, bytes]], tools: Path, work: Path) -> Compiled:
    """The bytecode of Python sources.

    Arguments:
        sources: of each its name, its path in the guest (which tracebacks show), and its content.
        tools: the programs taken out of the guest's image.
        work: a directory for temporary files.

    Raises:
        ProcessError: the guest's interpreter does not run, or finds an error in a source.
    """
    script = work / "compiler.py"
    script.write_text(COMPILER)
    done = run(
        [*tool(tools, "python3"), "-s", "-S", script, str(MARSHAL_VERSION)],
        input=marshal.dumps(list(sources), MARSHAL_VERSION),
        env={"PYTHONHOME": str(tools / "pyhome"), "PYTHONHASHSEED": "0"},
    )
    return Compiled(*marshal.loads(done.stdout))


def precompile(archive: Path, place: str, tools: Path, work: Path) -> None:
    """Add the bytecode of every module in a Python zip archive, beside its source (which tracebacks show).

    Arguments:
        archive: replaced by the new one.
        place: where the archive will be in the guest.
        tools, work: as for ``compile_all``, and what it raises.
    """
    with zipfile.ZipFile(archive) as packed:
        entries = [(entry, packed.read(entry)) for entry in packed.infolist()]
    compiled = compile_all([(e.filename, f"{place}/{e.filename}", data) for e, data in entries], tools, work)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for entry, data in entries:
            packed.writestr(entry, data)
            info = zipfile.ZipInfo(f"{entry.filename}c", entry.date_time)
            info.create_system, info.external_attr = entry.create_system, entry.external_attr
            packed.writestr(info, compiled.file(entry.filename, data))
