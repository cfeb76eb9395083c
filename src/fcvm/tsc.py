"""The CPU's time-stamp counter, and who emulates the CPU: questions that take instructions of their own."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fcvm.host import cpu_flags, read


def hypervisor() -> str:
    """The hypervisor's CPUID signature, such as ``"KVMKVMKVM"``; empty on bare metal and other CPUs than x86-64."""
    if "hypervisor" not in cpu_flags() or os.uname().machine != "x86_64":
        return ""
    # push rbx; mov eax, 0x40000000; cpuid; mov [rdi], ebx; mov [rdi+4], ecx; mov [rdi+8], edx; pop rbx; ret
    with _machine_code(bytes.fromhex("53 b8 00000040 0fa2 891f 894f04 895708 5b c3"), 12) as signature:
        return signature().rstrip(b"\0").decode(errors="replace")


def tsc_khz() -> int:
    """The frequency of this CPU's time-stamp counter in kHz, for ``tsc_early_khz`` of an emulated guest's kernel.

    Taken from our own command line, where the host above has put it; from the kernel, where the CPU's clock does not
    change; or measured against the system clock.
    """
    told = re.search(r"\btsc_early_khz=(\d+)", read("/proc/cmdline"))
    if told:
        return int(told[1])
    constant = "constant_tsc" in cpu_flags() and not os.path.exists("/sys/devices/system/cpu/cpu0/cpufreq")
    known = re.search(r"^cpu MHz\s*:\s*(\d+)\.(\d{3})", read("/proc/cpuinfo"), re.MULTILINE)
    if constant and known:
        return int(known[1] + known[2])
    return measure_tsc_khz()


def measure_tsc_khz(seconds: float = 0.1) -> int:
    """The frequency of the time-stamp counter in kHz, counted for this long."""
    # rdtsc; mov [rdi], eax; mov [rdi+4], edx; ret
    with _machine_code(bytes.fromhex("0f31 8907 895704 c3"), 8) as read_tsc:

        def sample() -> tuple[int, int]:
            """Clock (ns) and ticks; of several pairs the one taken closest together, as we may be interrupted."""
            samples = []
            for _ in range(8):
                before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
                ticks = int.from_bytes(read_tsc(), "little")
                after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
                samples.append((after - before, (before + after) // 2, ticks))
            return min(samples)[1:]

        begin, begin_ticks = sample()
        time.sleep(seconds)
        end, end_ticks = sample()
    return round((end_ticks - begin_ticks) * 1_000_000 / (end - begin))


@contextmanager
def _machine_code(code: bytes, size: int) -> Iterator[Callable[[], bytes]]:
    """Make a function of x86-64 machine code that fills the ``size`` bytes to which its first argument (rdi) points."""
    import ctypes
    import mmap

    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        anchor = ctypes.c_char.from_buffer(page)
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(anchor))
        result = ctypes.create_string_buffer(size)

        def call() -> bytes:
            function(ctypes.addressof(result))
            return result.raw

        try:
            yield call
        finally:
            del anchor  # the page cannot be closed while something points into it
