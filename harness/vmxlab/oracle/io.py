"""Which I/O instructions exit, and with which qualification (SDM Vol. 3C, 25.6.4, 26.1.3 and table 28-5).

Plain values in, plain values out. The bits of the bitmaps are looked up one port at a time: what
`IOBitmap.intercepts` says of a whole access is the structure's own opinion, and not used here.
"""

from __future__ import annotations

from vmxlab.errors import CaseError, OutOfRange
from vmxlab.sdm.controls import PrimaryControls
from vmxlab.structures import IOBitmap

IO_EXIT_SECTION = "Vol. 3C, 26.1.3, IN and OUT"
IO_QUALIFICATION_SECTION = "Vol. 3C, 28.2.1, table 28-5"

_USE_IO_BITMAPS = int(PrimaryControls.USE_IO_BITMAPS)
_UNCONDITIONAL_IO_EXITING = int(PrimaryControls.UNCONDITIONAL_IO_EXITING)

PORTS = 0x1_0000
SIZES = (1, 2, 4)


def io_exits(primary: int, io_bitmap: IOBitmap | None, port: int, size: int) -> bool:
    """Whether IN, OUT, INS or OUTS of `size` bytes at `port` causes a VM exit (SDM Vol. 3C, 26.1.3).

    `primary`: the primary processor-based controls as they are in the VMCS. `io_bitmap`: both bitmaps as
    they are in memory; only looked at where "use I/O bitmaps" is 1. That control goes before "unconditional
    I/O exiting"; with it an access exits if the bit of any port it covers is 1, or if it runs past FFFFH.

    Raises OutOfRange for a port or a size that no instruction has, CaseError where a bitmap is used and none
    is given.
    """
    if not 0 <= port < PORTS:
        raise OutOfRange("I/O port", port, "ports are 0 to 0xffff")
    _require_size(size)
    if not primary & _USE_IO_BITMAPS:
        return bool(primary & _UNCONDITIONAL_IO_EXITING)
    if io_bitmap is None:
        raise CaseError('"use I/O bitmaps" is 1, and there is no I/O bitmap to look at')
    return any(one >= PORTS or io_bitmap.intercepts(one) for one in range(port, port + size))


def io_qualification(
    port: int, size: int, *, is_in: bool, string: bool = False, rep: bool = False, immediate: bool = False
) -> int:
    """The exit qualification of an I/O instruction (SDM Vol. 3C, table 28-5); reserved bits are 0.

    `immediate`: the port is an operand of the instruction (IN AL, 60H), not in DX.
    """
    if not 0 <= port < PORTS:
        raise OutOfRange("I/O port", port, "ports are 0 to 0xffff")
    _require_size(size)
    return port << 16 | immediate << 6 | rep << 5 | string << 4 | is_in << 3 | size - 1


def _require_size(size: int) -> None:
    if size not in SIZES:
        raise OutOfRange("size of an I/O access", size, "IN, OUT, INS and OUTS move 1, 2 or 4 bytes")
