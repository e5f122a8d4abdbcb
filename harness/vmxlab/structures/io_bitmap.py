"""The I/O bitmaps A and B: which port accesses of the guest cause VM exits (SDM Vol. 3C, 25.6.4 and 26.1.3).

Bitmap A has a bit for each port 0000H to 7FFFH, bitmap B for 8000H to FFFFH. They are two pages with an
address each, and one object here, because an access of two or four bytes may use bits of both.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmxlab.errors import OutOfRange
from vmxlab.structures.bitmap import Bitmap, words_for_runs
from vmxlab.structures.checks import PAGE_SIZE, require_page_address

PORTS = 0x1_0000
"""I/O ports have 16-bit addresses."""


class IOBitmap(Bitmap):
    """Both I/O bitmaps: 65,536 bits in 8 KiB, bit n for port n.

    `IOBitmap()` is `IOBitmap.passthrough_all()`. Mutable; `copy()` gives one of its own.
    """

    BITS = PORTS
    __slots__ = ()

    def set_intercept(self, port: int, intercept: bool) -> None:
        """Let accesses that touch `port` exit, or no longer; OutOfRange for a port over FFFFH."""
        self._bits[_port(port)] = bool(intercept)

    def set_intercept_of_range(self, port_base: int, count: int, intercept: bool) -> None:
        """The same for the `count` ports from `port_base` on; OutOfRange if any is over FFFFH."""
        base = _port(port_base)
        if not 0 <= count <= PORTS - base:
            raise OutOfRange("number of ports", count, f"from port {base:#x} on there are {PORTS - base:#x}")
        self._bits[base : base + count] = bool(intercept)

    def intercepts(self, port: int, size: int = 1) -> bool:
        """Whether an access of `size` bytes (1, 2 or 4) at `port` exits while "use I/O bitmaps" is 1.

        It does if the bit of any port it covers is 1, and always if it runs past port FFFFH, whatever the
        bits say (SDM Vol. 3C, 26.1.3). OutOfRange for another size or a port over FFFFH.
        """
        if size not in (1, 2, 4):
            raise OutOfRange("size of an I/O access", size, "IN, OUT, INS and OUTS move 1, 2 or 4 bytes")
        base = _port(port)
        return base + size > PORTS or self._bits.find(1, base, base + size) >= 0

    def intercepted_ports(self) -> Iterator[range]:
        """The ports whose bit is 1, as ranges in order, adjoining ones joined."""
        return (range(first, end) for first, end in self._runs(0, PORTS))

    @property
    def a(self) -> bytes:
        """The 4096 bytes of bitmap A, ports 0000H to 7FFFH."""
        return self._bits[: PORTS // 2].tobytes()

    @property
    def b(self) -> bytes:
        """The 4096 bytes of bitmap B, ports 8000H to FFFFH."""
        return self._bits[PORTS // 2 :].tobytes()

    def phys_addr(self, base: int) -> tuple[int, int]:
        """The fields I/O-bitmap A and B address for bitmaps laid out on two pages from `base`."""
        address = require_page_address("address of the I/O bitmaps", base, pages=2)
        return address, address + PAGE_SIZE

    def pages(self, base: int) -> list[tuple[int, bytes]]:
        """Both pages as (physical address, 4096 bytes), laid out from `base`, A first."""
        return list(zip(self.phys_addr(base), (self.a, self.b), strict=True))

    def __repr__(self) -> str:
        """How many ports exit, and the first ranges of them."""
        return f"<IOBitmap: {self._bits.count(1)} ports exit: {words_for_runs(self.intercepted_ports())}>"


def _port(port: int) -> int:
    if not 0 <= port < PORTS:
        raise OutOfRange("I/O port", port, "ports are 0 to 0xffff")
    return int(port)
