"""The container's health: the image's HEALTHCHECK or an HTTP request, asked for again and again.

There is no systemd that could run Podman's timers. Until the first success the check is asked often, so that a service is
found healthy as soon as it is; failures make it unhealthy only when the start period and ``retries`` intervals are over.
"""

import select
import threading
import time
from collections.abc import Callable
from typing import Any

from fc_agent import exec as runtime
from fc_agent.container import Container
from fc_agent.podman import PodmanError
from fc_agent.protocol import HealthPlan
from fc_agent.session import LaunchError, Request
from fc_agent.structs import Struct

# Podman's defaults, in seconds
INTERVAL, TIMEOUT, RETRIES, START_PERIOD = 30.0, 30.0, 3, 0.0
HTTP_INTERVAL, HTTP_TIMEOUT = 5.0, 5.0
EAGER = 0.5  # seconds between checks until the first success, at most
KEPT = 500  # bytes of a check's output

Check = Callable[[float], tuple[bool, str]]


class Schedule(Struct):
    """When to check, in seconds."""

    interval: float
    timeout: float
    retries: int
    start_period: float


class Monitor:
    """Checks a container's health on a thread of its own until ``stop``; ``report`` gets every change of status."""

    def __init__(self, container: Container, report: Callable[[str, str], None]) -> None:
        self._container = container
        self._report = report
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin; without anything to check the container is healthy because it runs."""
        if self._container.plan.health.kind == "ready":
            self._report("healthy", "")
            return
        threading.Thread(target=self._run, daemon=True, name="health").start()

    def stop(self) -> None:
        """No more reports."""
        self._stop.set()

    def _run(self) -> None:
        plan = self._container.plan.health
        if plan.kind == "http":
            check: Check | None = http_check(plan.url or "http://localhost/")
            schedule = _schedule(plan, Schedule(HTTP_INTERVAL, HTTP_TIMEOUT, RETRIES, START_PERIOD))
        else:
            check, schedule = self._image_check(plan, self._image())
        if self._stop.is_set():
            return
        if check is None:
            self._report("healthy", "")
            return
        self._report("starting", "")
        self._watch(check, schedule)

    def _image(self) -> dict[str, Any]:
        """What the image says of itself; until Podman tells, nobody knows whether it has a check, let alone passes it."""
        while not self._stop.is_set():
            try:
                return self._container.image()
            except PodmanError as error:
                self._report("starting", f"the image's health check is not known: {error.message}")
                self._stop.wait(HTTP_INTERVAL)
        return {}

    def _image_check(self, plan: HealthPlan, image: dict[str, Any]) -> tuple[Check | None, Schedule]:
        default = Schedule(INTERVAL, TIMEOUT, RETRIES, START_PERIOD)
        config = (
            image.get("HealthCheck") or image.get("Healthcheck") or (image.get("Config") or {}).get("Healthcheck") or {}
        )
        command = health_command(config.get("Test"))
        if command is None:
            return None, default
        times = Schedule(
            _seconds(config.get("Interval"), INTERVAL),
            _seconds(config.get("Timeout"), TIMEOUT),
            int(config.get("Retries") or RETRIES),
            _seconds(config.get("StartPeriod"), START_PERIOD),
        )
        return lambda timeout: run_check(self._container, command, timeout), _schedule(plan, times)

    def _watch(self, check: Check, schedule: Schedule) -> None:
        started = time.monotonic()
        patience = schedule.start_period + schedule.retries * schedule.interval
        status, failures = "starting", 0
        while not self._stop.is_set():
            well, detail = check(schedule.timeout)
            failures = 0 if well else failures + 1
            if well:
                new = "healthy"
            elif status == "starting":
                new = "unhealthy" if time.monotonic() - started >= patience else "starting"
            else:
                new = "unhealthy" if failures >= schedule.retries else status
            if self._stop.is_set():
                return
            if new != status:
                status = new
                self._report(status, "" if well else detail)
            self._stop.wait(min(EAGER, schedule.interval) if status == "starting" else schedule.interval)


def _schedule(plan: HealthPlan, default: Schedule) -> Schedule:
    """What the user asked for, else ``default``."""
    return Schedule(
        default.interval if plan.interval is None else plan.interval,
        default.timeout if plan.timeout is None else plan.timeout,
        default.retries if plan.retries is None else plan.retries,
        default.start_period if plan.start_period is None else plan.start_period,
    )


def _seconds(nanoseconds: Any, default: float) -> float:
    return nanoseconds / 1e9 if nanoseconds else default


def health_command(test: Any) -> list[str] | None:
    """The argument vector of a HEALTHCHECK (Docker's image specification, ``Healthcheck.Test``); None if there is none."""
    if not isinstance(test, list) or not test or test[0] == "NONE":
        return None
    if test[0] == "CMD-SHELL":
        return ["/bin/sh", "-c", " ".join(test[1:])]
    return list(test[1:]) if test[0] == "CMD" else list(test)


def run_check(container: Container, command: list[str], timeout: float) -> tuple[bool, str]:
    """Run a check in the container: whether it ended with 0 in time, and the end of what it printed."""
    try:
        process = runtime.launch(container, Request(argv=command))
    except LaunchError as error:
        return False, error.message
    output = bytearray()
    end = time.monotonic() + timeout
    try:
        poll = select.poll()
        for descriptor in (process.ended, *process.outputs):
            poll.register(descriptor, select.POLLIN)
        while (left := end - time.monotonic()) > 0:
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            for descriptor in [fd for fd in process.outputs if fd in ready]:
                pieces = process.outputs[descriptor]()
                if pieces is None:
                    poll.unregister(descriptor)
                    del process.outputs[descriptor]
                for _, data in pieces or []:
                    output = (output + data)[-KEPT:]
            if process.ended in ready:
                code, message = process.exit()
                return code == 0, message or output.decode(errors="replace").strip()
        return False, f"no answer within {timeout:g} seconds"
    finally:
        process.kill()
        process.close()


def http_check(url: str) -> Check:
    """GET ``url``; a status below 400 is healthy."""
    import http.client  # slow to import, and rarely needed
    from urllib.parse import urlsplit

    def check(timeout: float) -> tuple[bool, str]:
        try:
            parts = urlsplit(url)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.hostname or "localhost", parts.port, timeout=timeout)
            try:
                connection.request("GET", path, headers={"User-Agent": "fcvm", "Connection": "close"})
                status = connection.getresponse().status
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            return False, str(error) or type(error).__name__
        return status < 400, f"HTTP status {status}"

    return check
