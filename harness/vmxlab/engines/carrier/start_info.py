"""What the kernel finds at its PVH entry: the start info, and the command line in it.

The layout is Xen's: public/arch-x86/hvm/start_info.h, docs/misc/pvh.pandoc. EBX holds the physical address of
the start info; it leads to the modules (the first one is the initramfs), the memory map, the command line.
"""

from __future__ import annotations

import struct

KIB = 1 << 10
MIB = 1 << 20

# Each parameter is in the kernel's Documentation/admin-guide/kernel-parameters.txt. The times that they save
# were measured in Bochs.
_PARAMETERS = (
    "console=ttyS0,115200",  # Bochs's first serial port is the log; the others belong to QEMU
    "quiet",  # each byte of a message is polled out through the emulated UART; warnings still come
    "nokaslr",  # nothing to hide from, and addresses in a log mean the same in each boot
    "mitigations=off",  # Bochs speculates nothing
    "tsc=reliable",  # no watching of the TSC against another clock, which emulated time gets wrong
    "tsc_early_khz=400000",  # no calibration against the PIT: it waits for emulated time to pass
    "no_timer_check",  # no test of the timer's interrupt, which spins for ten ticks
    "pci=off",  # and there is no PCI bus: no probing
    "lsm=capability",  # no other security module has a say at each ioctl of QEMU, which KVM_RUN is one of
    "clearcpuid=erms",  # REP MOVSB goes byte by byte in Bochs; without ERMS the kernel copies by quadwords
    "panic=-1",  # a panic resets at once, which ends Bochs and is noticed
    "rdinit=/init",  # our init
    "cryptomgr.notests=1",  # no self-tests of ciphers that nobody uses
    "random.trust_cpu=on",  # RDRAND seeds the random numbers: QEMU would wait for entropy
)

# Initialisations of what nothing here uses: they walk over all functions, all type information or all
# certificates of the kernel (initcall_blacklist= of the same document). A name that the kernel has not is
# ignored.
_LEFT_OUT = (
    "ftrace_check_for_weak_functions",
    "trace_eval_init",
    "init_kprobe_trace",
    "load_system_certificate_list",
    "cubictcp_register",
    "bpf_rstat_kfunc_init",
    "bpf_key_sig_kfuncs_init",
    "kfunc_init",
    "bpf_prog_test_run_init",
    "bpf_tcp_ca_kfunc_init",
)

COMMAND_LINE = " ".join([*_PARAMETERS, f"initcall_blacklist={','.join(_LEFT_OUT)}"])

_COMMAND_LINE_LIMIT = 2048
"""COMMAND_LINE_SIZE of x86, with the zero at its end."""

# start_info, version 1: magic, version, flags, number of modules; addresses of the module list, the command
# line, the RSDP (0: none) and the memory map; number of its entries; 0.
_START_INFO = struct.Struct("<4s3I4QII")
_MAGIC = struct.pack("<I", 0x336EC578)
_VERSION = 1
# A module: address, bytes, address of a command line of its own (0: none), 0.
_MODULE = struct.Struct("<4Q")
# An entry of the memory map: address, bytes, type (as in the E820 map; 1 is RAM), 0.
_MEMORY = struct.Struct("<QQII")
_RAM = 1


def memory_map(memory_mb: int) -> list[tuple[int, int]]:
    """(address, bytes) of the RAM of a PC with so much memory: below the VGA's window, and from 1 MiB on."""
    return [(0, 640 * KIB), (MIB, (memory_mb - 1) * MIB)]


def pack_start_info(
    address: int, *, initramfs: int, initramfs_bytes: int, memory_mb: int, command_line: str = COMMAND_LINE
) -> bytes:
    """The start info with all that it leads to, to be put at `address` (physical).

    `initramfs` is the physical address of the initramfs. Raises ValueError for a command line that is too
    long for the kernel, which would cut it silently.
    """
    text = command_line.encode("ascii") + b"\0"
    if len(text) > _COMMAND_LINE_LIMIT:
        raise ValueError(f"the command line has {len(text)} bytes; the kernel takes {_COMMAND_LINE_LIMIT}")
    ranges = memory_map(memory_mb)
    modules_at = address + _START_INFO.size
    memory_at = modules_at + _MODULE.size
    text_at = memory_at + len(ranges) * _MEMORY.size
    head = _START_INFO.pack(_MAGIC, _VERSION, 0, 1, modules_at, text_at, 0, memory_at, len(ranges), 0)
    module = _MODULE.pack(initramfs, initramfs_bytes, 0, 0)
    memory = b"".join(_MEMORY.pack(start, size, _RAM, 0) for start, size in ranges)
    return head + module + memory + text
