"""Names and numbers by which the host side reaches a VM; in one small file, since `fcvm exec` counts milliseconds."""

VSOCK = "vsock.sock"  # Firecracker's vsock device, in the VM's directory
SESSION_PORT = 4998  # where the agent serves sessions (docs/architecture.md)
SESSION_TIMEOUT = 60.0  # seconds for one connection into the guest; an emulated one may be busy
POOL = ".pool-"  # beginning of a directory among those of VMs: the clones that a clone server keeps ready (snapshots/pool.py)
