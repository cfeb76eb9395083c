"""What Podman and crun say when a container or a command cannot start, as one sentence that names what is wrong."""

import re

# Parts of their messages (crun 1.x, Podman 5.x) -> what they mean; the group is the name of what is missing or wrong
MEANINGS = (
    (r"executable file [`'\"](.*?)[`'\"] not found", "There is no program {} in the container."),
    (r"the path [`'\"](.*?)[`'\"] exists but it is not executable", "{} in the container is not executable."),
    (r"workdir [`'\"](.*?)[`'\"] does not exist", "There is no directory {} in the container."),
    (r"chdir to [`'\"](.*?)[`'\"]: No such file or directory", "There is no directory {} in the container."),
    (r"unable to find user (\S+?):", "There is no user {} in the container."),
    (r"unable to find group (\S+?):", "There is no group {} in the container."),
)


def explain(message: str) -> str:
    """``message`` in our words if it is a known one, else without what their layers put around it."""
    for pattern, meaning in MEANINGS:
        if found := re.search(pattern, message):
            return meaning.format(found[1])
    text = re.sub(r"^crun: |: OCI (?:runtime|permission).*$", "", message).strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
