"""fcvm runs OCI containers with Podman inside Firecracker microVMs, and clones a running VM in about a millisecond."""

__version__ = "0.1.0"
