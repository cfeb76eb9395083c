"""What all tests share."""

import signal

from hypothesis import settings
from user_support import as_user, user  # noqa: F401

# A shell starts background jobs with these ignored, nohup with the last one, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A test machine is shared: how long one example takes says nothing. Derandomized: the same tests in every run.
settings.register_profile("fcvm", deadline=None, derandomize=True)
settings.load_profile("fcvm")
