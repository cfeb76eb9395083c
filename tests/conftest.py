"""What all tests share."""

from hypothesis import settings

# A test machine is shared: how long one example takes says nothing. Derandomized: the same tests in every run.
settings.register_profile("fcvm", deadline=None, derandomize=True)
settings.load_profile("fcvm")
