"""VMs that run VMs themselves: `fcvm podman run --inception`. See docs/nested.md.

``profile`` says what such a VM needs of the host and its kernel; ``disk`` makes the disk with fcvm on it.
"""
