"""The agent's entry: PID 1 of a microVM or of the machine, as ``fcvm.role=`` on the kernel's command line says."""

from typing import NoReturn


def role() -> str:
    """``vm`` or ``machine``."""
    with open("/proc/cmdline") as file:
        words = [word.partition("=") for word in file.read().split()]
    return next((value for name, _, value in words if name == "fcvm.role"), "vm")


def main() -> NoReturn:
    """Become what this system is to be; never returns."""
    if role() == "machine":
        from fc_agent import machine

        machine.main()
        raise SystemExit(1)
    from fc_agent import init, linux

    begun = linux.uptime()
    init.main(lambda: _agent(begun))


def _agent(begun: float) -> None:
    from fc_agent.podman import Service

    service = Service()  # it takes longest to start, so it starts before we import the rest of us
    from fc_agent.agent import Agent

    Agent(service).run(begun)


if __name__ == "__main__":
    main()
