"""In the machine: takes fcvm's code from stdin and copies setup's assets from the host's files. See ``sync.py``.

Its text is the program (``python3 -c``), so it imports nothing of fcvm and little else. It runs as the machine's user.
The code comes as one JSON line, a list of ``[name, size, time of modification in ns]``, then all files' bytes.
"""

import json
import os
import sys

BLOCK = 4 << 20
CUT_OFF = "the code ended too soon"


def main(text: str) -> None:
    """Do the work that the JSON ``text`` describes; says on stdout what it is at."""
    work = json.loads(text)
    receive_code(work["code"])
    for source, target in work["files"]:
        copy_file(source, target)
    if not os.path.exists(work["assets"]):
        os.makedirs(os.path.dirname(work["assets"]), exist_ok=True)
        with open(work["assets"] + ".creating", "w") as file:
            file.write(work["content"])
        os.replace(work["assets"] + ".creating", work["assets"])


def receive_code(target: str) -> None:
    """Make the directory ``target`` of the files that come from stdin.

    The compiled modules of the directory before it are linked in: Python takes those whose source has not changed.
    """
    line = sys.stdin.buffer.readline()
    files = json.loads(line) if line.endswith(b"\n") else sys.exit(CUT_OFF)
    older = previous(os.path.dirname(target))
    temporary = own_name(target)
    for name, size, modified in files:
        path = f"{temporary}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        data = sys.stdin.buffer.read(size)
        if len(data) < size:
            sys.exit(CUT_OFF)
        with open(path, "wb") as file:
            file.write(data)
        os.utime(path, ns=(modified, modified))
    for directory, _, names in os.walk(older):
        if directory.endswith("__pycache__"):
            new = temporary + directory[len(older) :]
            if os.path.isdir(os.path.dirname(new)):
                os.makedirs(new, exist_ok=True)
                for name in names:
                    link_or_copy(f"{directory}/{name}", f"{new}/{name}")
    try:
        os.rename(temporary, target)
    except OSError:  # another process was faster
        remove(temporary)


def own_name(target: str) -> str:
    """A temporary name for ``target``, of ours alone. What is left under such names is removed."""
    directory, name = os.path.split(target)
    for entry in os.scandir(directory):
        if entry.name.startswith(f"{name}.creating"):
            remove(entry.path)
    return f"{target}.creating-{os.getpid()}"


def remove(path: str) -> None:
    """Remove a file or directory."""
    os.spawnvp(os.P_WAIT, "rm", ["rm", "-rf", path])


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name; files that root has compiled are not a user's to link."""
    try:
        os.link(source, target)
    except OSError:
        with open(source, "rb") as reading, open(target, "wb") as writing:
            writing.write(reading.read())


def previous(directory: str) -> str:
    """The code directory that was made last; empty if there is none."""
    os.makedirs(directory, exist_ok=True)
    found = [entry for entry in os.scandir(directory) if ".creating" not in entry.name and entry.is_dir()]
    return max(found, key=lambda entry: entry.stat().st_ctime).path if found else ""


def copy_file(source: str, target: str) -> None:
    """Copy a file that is named by its content, unless it is there."""
    if os.path.exists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    name = os.path.basename(target)
    temporary = own_name(target)
    with open(source, "rb") as reading, open(temporary, "wb") as writing:
        status = os.fstat(reading.fileno())
        while data := reading.read(BLOCK):
            writing.write(data)
            print(f"{name} {writing.tell() >> 20} of {status.st_size >> 20} MiB", flush=True)
    os.chmod(temporary, status.st_mode & 0o777)
    os.replace(temporary, target)


if __name__ == "__main__":
    main(sys.argv[1])
