"""`--map`: directories and files of the host in a VM. What carries and serves them is ``fuse_pipe``.

``spec`` reads the option, ``server`` is the process that serves a VM's volumes, ``service`` keeps it running.
"""
