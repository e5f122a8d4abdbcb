"""The engine kvm-in-bochs: what it costs to start it, to give it the next image, and to run a case."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from bench_sweep import bench_sweep

from vmxlab import Case, IOBitmap, Lab
from vmxlab.engines.base import Machine
from vmxlab.engines.kvm_in_bochs import KvmInBochsEngine
from vmxlab.image.compiler import compile_cases
from vmxlab.image.frames import pack_payload
from vmxlab.image.monitor import load_monitor
from vmxlab.image.rom import pack_rom

Line = Callable[[str, str, str], None]


def three_exits() -> Case:
    """IN, CPUID, HLT."""
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x60, True)
    return Case(io_bitmap=bitmap, program="in al, 0x60; cpuid; hlt")


def seconds_to_first_byte(open_machine: Callable[[], Machine]) -> tuple[float, Machine]:
    """Open a machine and wait for the first byte of its serial line."""
    start = time.perf_counter()
    machine = open_machine()
    if not machine.serial.recv(1):
        raise SystemExit(f"the machine ended:\n{machine.postmortem()}")
    return time.perf_counter() - start, machine


def bench_carrier(line: Line, folder: Path, *, quick: bool) -> None:
    """All of it, on one carrier after the other."""
    engine = KvmInBochsEngine()
    state = engine.availability()
    if not state.ok:
        print(f"engine: kvm-in-bochs can't run here: {state.problem}")
        return
    engine.prepare(print)
    print(f"engine: kvm-in-bochs {engine.availability().version}")
    _bench_machines(line, folder, engine, 2 if quick else 5)
    _bench_cases(line, 5 if quick else 30)


def _bench_machines(line: Line, folder: Path, engine: KvmInBochsEngine, runs: int) -> None:
    plain, other = folder / "plain.rom", folder / "other.rom"
    plain.write_bytes(pack_rom(load_monitor()))
    with Lab("bochs") as lab:
        (case,) = compile_cases([three_exits()], lab.target)
    other.write_bytes(pack_rom(load_monitor(), pack_payload([case.units])))
    starts, news, resets, peak_kib = [], [], [], 0
    for _ in range(runs):
        seconds, machine = seconds_to_first_byte(lambda: engine.open(plain, log_dir=folder))
        starts.append(seconds)
        machine.stop()
        for rom, times in ((plain, resets), (other, news), (other, resets), (plain, news)):
            seconds, machine = seconds_to_first_byte(lambda rom=rom: engine.open(rom, log_dir=folder))
            times.append(seconds)
            machine.stop()
        status = Path(f"/proc/{machine.pid}/status").read_text(encoding="ascii").split()
        peak_kib = max(peak_kib, int(status[status.index("VmHWM:") + 1]))
        engine.close()

    def median(times: list[float]) -> str:
        return f"{statistics.median(times):.2f} s"

    line(f"start to the inner guest's first byte (median of {runs})", median(starts), "under 20 s")
    line(f"the next image, by a new QEMU (median of {2 * runs})", median(news), "under 4 s")
    line(f"the next image, by a reset (median of {2 * runs})", median(resets), "under 1 s")
    harness_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    line("memory of Bochs, and of the harness", f"{peak_kib >> 10} + {harness_mb} MiB", "under 2 GiB")


def _bench_cases(line: Line, count: int) -> None:
    with Lab("kvm-in-bochs") as lab:
        lab.run(three_exits())
        times = []
        for _ in range(count):
            start = time.perf_counter()
            run = lab.run(three_exits())
            times.append(time.perf_counter() - start)
            assert len(run.exits) == 3
        line(
            f"a live case of three exits (median of {count})",
            f"{statistics.median(times) * 1e3:.0f} ms",
            "under 300 ms",
        )
        print(f"KVM counted {lab.nested_entries()} VM entries in {count + 1} cases of three exits")
        bench_sweep(line, lab, quick=True)  # all of it takes a quarter of an hour
