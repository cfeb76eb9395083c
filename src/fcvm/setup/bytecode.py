"""Compiles the agent for the guest's Python, so that it need not be compiled at every boot.

Bytecode is of one Python version, and the guest's is seldom the host's. So the guest's own interpreter does it: setup has
taken it out of the image (``recipe.TOOLS``), with as much of its library as it needs to start.
"""

import importlib.util
import marshal
import zipfile
from pathlib import Path

from fcvm.process import run

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
marshal.dump((MAGIC_NUMBER, codes), sys.stdout.buffer, int(sys.argv[1]))
"""


def precompile(archive: Path, place: str, tools: Path, work: Path) -> None:
    """Add the bytecode of every module in a Python zip archive, beside its source (which tracebacks show).

    Arguments:
        archive: replaced by the new one.
        place: where the archive will be in the guest.
        tools: the programs taken out of the guest's image.
        work: a directory for temporary files.

    Raises:
        ProcessError: the guest's interpreter does not run, or finds an error in a source.
    """
    with zipfile.ZipFile(archive) as packed:
        entries = [(entry, packed.read(entry)) for entry in packed.infolist()]
    sources = [(entry.filename, f"{place}/{entry.filename}", data) for entry, data in entries]
    script = work / "compiler.py"
    script.write_text(COMPILER)
    done = run(
        [tools / "ld.so", "--library-path", tools, tools / "python3", "-s", "-S", script, str(MARSHAL_VERSION)],
        input=marshal.dumps(sources, MARSHAL_VERSION),
        env={"PYTHONHOME": str(tools / "pyhome"), "PYTHONHASHSEED": "0"},
    )
    magic, codes = marshal.loads(done.stdout)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for entry, data in entries:
            packed.writestr(entry, data)
            compiled = zipfile.ZipInfo(f"{entry.filename}c", entry.date_time)
            compiled.create_system, compiled.external_attr = entry.create_system, entry.external_attr
            header = magic + UNCHECKED_HASH.to_bytes(4, "little") + importlib.util.source_hash(data)
            packed.writestr(compiled, header + codes[entry.filename])
