"""What a long job says while it runs: named steps with their size and time, on stderr.

    with progress.open() as shown:
        with shown.step("Guest image") as step:
            step.note("installing packages")
            step.update(done, total)           # bytes; total None when unknown

On a terminal it is a line with a bar; elsewhere plain lines, one when a step starts, one when it ends, and one a
minute in between. A step that is never opened shows nothing, so a job with nothing to do is silent. Thread safe.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TextIO

REPORT_EVERY = 60.0  # seconds between plain lines of one step


class Step(Protocol):
    """One running step."""

    def update(self, done: int, total: int | None = None) -> None:
        """``done`` bytes of ``total`` (None: unknown) are through; may be called as often as you like."""

    def note(self, text: str) -> None:
        """Say in a few words what is going on within the step."""


class Progress(Protocol):
    """Shows steps, one after another or nested."""

    def step(self, title: str) -> AbstractContextManager[Step]:
        """Show ``title`` as running until the block ends, well or not."""


def size(count: int) -> str:
    """``count`` bytes for a person, in decimal units: ``"338 MB"``."""
    value = float(count)
    units = ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.1f} {units[0]}" if value < 9.95 and units[0] != "B" else f"{value:.0f} {units[0]}"


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        yield _SilentStep()


class _SilentStep:
    def update(self, done: int, total: int | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Plain:
    """Lines of text, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        step = _PlainStep(title, self)
        self.line(f"{title} ...")
        try:
            yield step
        except BaseException:
            self.line(f"{title}: failed after {step.seconds():.1f} s")
            raise
        self.line(f"{title}: done, {step.summary()}")

    def line(self, text: str) -> None:
        with self._lock:
            print(text, file=self._stream, flush=True)


class _PlainStep:
    def __init__(self, title: str, owner: Plain) -> None:
        self._title = title
        self._owner = owner
        self._begun = self._reported = time.monotonic()
        self._done = 0
        self._note = ""

    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def summary(self) -> str:
        return (f"{size(self._done)}, " if self._done else "") + f"{self.seconds():.1f} s"

    def update(self, done: int, total: int | None = None) -> None:
        self._done = done
        self._report(f"{size(done)}" + (f" of {size(total)}" if total else ""))

    def note(self, text: str) -> None:
        self._note = text
        self._report(text)

    def _report(self, what: str) -> None:
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            self._owner.line(f"{self._title}: {what}, {self.seconds():.0f} s")


class Terminal:
    """Lines with a spinner, a bar and a clock, drawn by rich."""

    def __init__(self, display: Any) -> None:
        self._display = display

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        task = self._display.add_task(title, total=None, note="")
        step = _TerminalStep(self._display, task)
        begun = time.monotonic()
        try:
            yield step
        except BaseException:
            self._display.remove_task(task)
            raise
        done = f", {size(step.done)}" if step.done else ""
        self._display.remove_task(task)
        self._display.console.print(
            f"[green]done[/green] {title}[dim]{done}, {time.monotonic() - begun:.1f} s[/dim]", highlight=False
        )


class _TerminalStep:
    def __init__(self, display: Any, task: Any) -> None:
        self._display = display
        self._task = task
        self.done = 0

    def update(self, done: int, total: int | None = None) -> None:
        self.done = done
        self._display.update(self._task, completed=done, total=total, note=size(done))

    def note(self, text: str) -> None:
        self._display.update(self._task, note=text)


@contextmanager
def open(stream: TextIO | None = None) -> Iterator[Progress]:
    """The progress that suits ``stream`` (stderr by default): Terminal on a terminal where rich is installed, else Plain."""
    stream = stream or sys.stderr
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield Plain(stream)
        return
    try:
        from rich import console
        from rich import progress as rich
    except ImportError:
        yield Plain(stream)
        return
    columns = (
        rich.SpinnerColumn(),
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.TextColumn("[dim]{task.fields[note]}"),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(*columns, console=console.Console(file=stream), transient=True) as display:
        yield Terminal(display)
