"""The FUSE wire protocol over a byte stream. Standard library only; imports nothing of ``fcvm``."""
