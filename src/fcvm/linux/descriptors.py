"""How many descriptors this process may have: the usual soft limit is 1024."""

import resource


def allow_all() -> int:
    """Have as many as the hard limit allows; returns how many that are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
