"""`make bench`: how fast it is, as ratios and per-second figures, with the engine's version.

Nothing here passes or fails: numbers depend on the machine and on what else it does. Each line says what was
measured, over how many runs, and the goal it is held against.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_sweep import bench_sweep
from carrier import bench_carrier

from vmxlab import Case, Field, IOBitmap, Lab, Msr, guest_ept
from vmxlab.cases.memory import PROGRAM
from vmxlab.console.records import encode_record, parse_log
from vmxlab.engines.choose import choose
from vmxlab.image.compiler import compile_cases
from vmxlab.image.frames import pack_payload
from vmxlab.image.layout import CASE_BASE, EPT_TABLES
from vmxlab.image.monitor import load_monitor
from vmxlab.image.rom import pack_rom

# At the reset vector, in 16-bit mode: mov dx, 0x3f8; mov al, 'x'; out dx, al; hlt; jmp to the hlt.
BAREST_CODE = bytes.fromhex("baf803b078eef4ebfd")
BAREST_ROM = bytes(0xFFF0) + BAREST_CODE.ljust(16, b"\0")


def line(what: str, value: str, goal: str) -> None:
    """One result."""
    print(f"{what:<58} {value:>22}   goal {goal}", flush=True)


def start_to(rom: bytes, wanted: bytes, folder: Path, engine_name: str) -> float:
    """Seconds from the start of the engine's process until `wanted` has come over the serial line.

    Where it is empty, until the first byte has come: which one that is depends on how the UART is set.
    """
    engine, why = choose(engine_name)
    path = folder / "bench.rom"
    path.write_bytes(rom)
    start = time.perf_counter()
    with engine.open(path, log_dir=folder, why=why) as machine:
        seen = b""
        while not seen or wanted not in seen:
            piece = machine.serial.recv(65536)
            if not piece:
                raise SystemExit(f"the machine ended:\n{machine.postmortem()}")
            seen += piece
            if not wanted:
                break
        return time.perf_counter() - start


def bench_start(lab: Lab, folder: Path, runs: int) -> None:
    """Start to first exit, against the barest ROM, in turn."""
    (case,) = compile_cases([Case(program="in al, 0x60; hlt")], lab.target)
    image = pack_rom(load_monitor(), pack_payload([case.units]))
    barest, first_exit = [], []
    for _ in range(runs):
        barest.append(start_to(BAREST_ROM, b"", folder, lab.engine.name))
        first_exit.append(start_to(image, b"@exit n=0x0", folder, lab.engine.name))
    ratio = statistics.median(a / b for a, b in zip(first_exit, barest, strict=True))
    low, high = statistics.median(barest) * 1e3, statistics.median(first_exit) * 1e3
    line(
        f"process start to first exit / barest ROM's byte ({runs} pairs)",
        f"{ratio:.2f} ({high:.0f} / {low:.0f} ms)",
        "at most 1.5",
    )


def small_cases(count: int) -> list[Case]:
    """Cases that differ as the cases of a suite do: in a bitmap and in the program."""
    cases = []
    for number in range(count):
        bitmap = IOBitmap.passthrough_all()
        bitmap.set_intercept(0x60, True)
        bitmap.set_intercept(number * 61 & 0xFFFF, True)
        cases.append(Case(io_bitmap=bitmap, program=f"in al, 0x60; mov eax, {number}; hlt"))
    return cases


def bench_image(lab: Lab, count: int) -> None:
    """One image with many cases: from `run_image` to the last record parsed; programs assembled before."""
    cases = small_cases(count)
    compile_cases(cases, lab.target)
    start = time.perf_counter()
    runs = lab.run_image(cases)
    seconds = time.perf_counter() - start
    exits = sum(len(run.exits) for run in runs)
    assert exits == 2 * count, f"{exits} exits of {2 * count}"
    line(
        f"one image with {count} cases, packed, booted, parsed",
        f"{count / seconds:.0f} cases/s",
        "at least 200",
    )


def bench_live(lab: Lab, count: int) -> None:
    """A case sent, run and read back on a machine that is up."""
    times = []
    for case in small_cases(count):
        start = time.perf_counter()
        run = lab.run(case)
        times.append(time.perf_counter() - start)
        assert len(run.exits) == 2
    line(
        f"a live case, sent, run, read back (median of {count})",
        f"{statistics.median(times) * 1e3:.1f} ms",
        "under 20 ms",
    )


def bench_live_commands(lab: Lab, count: int) -> None:
    """Commands of a live machine, each a round trip; without VMX those that need none."""
    vm = lab.live()
    commands: dict[str, Callable[[], object]] = {
        "RDMSR": lambda: vm.rdmsr(Msr.IA32_EFER),
        "16 bytes of memory": lambda: vm.memory[CASE_BASE : CASE_BASE + 16],
    }
    if vm.has_vmx:
        commands |= {
            "VMREAD": lambda: vm.vmread(Field.GUEST_RIP),
            "a program entered": lambda: vm.enter("hlt"),
            "a snapshot": vm.snapshot,
            "a step": lambda: (setattr(vm, "rip", PROGRAM), vm.step()),
        }
    for what, do in commands.items():
        do()
        line(
            f"live on {lab.engine.name}: {what} (median of {count})",
            f"{median_of(do, count) * 1e3:.1f} ms",
            "under 20 ms" if vm.has_vmx else "under 5 ms",
        )


def bench_import(runs: int) -> None:
    """`import vmxlab` in a fresh interpreter, less the interpreter's own start."""
    with_import = timed_process("import vmxlab", runs)
    without = timed_process("pass", runs)
    line(f"import vmxlab (median of {runs})", f"{(with_import - without) * 1e3:.0f} ms", "under 150 ms")


def timed_process(code: str, runs: int) -> float:
    """Median seconds of `python -c code`."""
    return median_of(lambda: subprocess.run([sys.executable, "-c", code], check=True), runs)


def median_of(do: Callable[[], object], runs: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        do()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bench_records(count: int) -> None:
    """Records of exits, parsed and checked."""
    exits = [
        encode_record(
            "exit", {"n": n, "reason": 0x1E, "qual": 0x600048, "len": 2, "rip": 0x8000 + n, "rax": n}
        )
        for n in range(count)
    ]
    log = "\r\n".join([*exits, ""]).encode("ascii")
    assert len(parse_log(log)[0]) == count
    seconds = median_of(lambda: parse_log(log), 5)
    line(f"{count} records parsed (median of 5)", f"{seconds * 1e3:.0f} ms", "under 100 ms")


def bench_structures(runs: int) -> None:
    """What a test does to its structures all the time."""
    bitmap = IOBitmap.passthrough_all()

    def build_ept() -> None:
        guest_ept().tables(EPT_TABLES)

    ports = median_of(lambda: bitmap.set_intercept_of_range(0, 0x10000, True), runs)
    tables = median_of(build_ept, runs)
    line(f"all 65,536 ports set by range (median of {runs})", f"{ports * 1e6:.1f} us", "microseconds")
    line(f"the default EPT built and laid out (median of {runs})", f"{tables * 1e3:.2f} ms", "under 1 ms")


def main() -> None:
    """Run all, or with --quick a shorter round of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="bochs")
    parser.add_argument("--quick", action="store_true", help="fewer runs of each")
    arguments = parser.parse_args()
    quick = arguments.quick
    print(f"Python {sys.version.split()[0]}")
    bench_import(3 if quick else 15)
    bench_records(10_000)
    bench_structures(50)
    with tempfile.TemporaryDirectory(prefix="vmxlab-bench-") as name, Lab(arguments.engine) as lab:
        print(f"engine: {lab.info.title()}")
        bench_start(lab, Path(name), 3 if quick else 15)
        bench_live(lab, 30 if quick else 300)
        bench_live_commands(lab, 30 if quick else 200)
        bench_image(lab, 100 if quick else 1000)
        bench_sweep(line, lab, quick=quick)
    with Lab("tcg") as lab:
        bench_live_commands(lab, 30 if quick else 200)
    with tempfile.TemporaryDirectory(prefix="vmxlab-bench-") as name:
        bench_carrier(line, Path(name), quick=quick)


if __name__ == "__main__":
    main()
