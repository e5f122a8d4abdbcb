"""Range checks that every structure shares: refuse at once, name the value, the limit and the reason.

Nothing here rounds, masks or truncates. A structure that may hold an illegal value (a test may ask for one)
says so in its own docstring; what can't be encoded at all is always refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmxlab.errors import Misaligned, OutOfRange

PAGE_SIZE = 4096
"""Size and alignment in bytes of every region, bitmap and paging structure here."""

MAX_PHYSICAL_ADDRESS_WIDTH = 52
"""MAXPHYADDR is at most this on any processor (SDM Vol. 3A, 4.1.4)."""


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """One rule of the manual that a value breaks.

    `rule` is the rule and what is there instead, in words; `source` is where the manual has it;
    `bit` is the capability bit that would allow the value, such as "IA32_VMX_EPT_VPID_CAP[7]", or None where
    no processor allows it; `feature` is the name of that capability.
    """

    rule: str
    source: str
    bit: str | None = None
    feature: str | None = None

    def __str__(self) -> str:
        """The rule with its capability bit and source."""
        return f"{self.rule} [{self.source}{f'; {self.bit} is 0' if self.bit else ''}]"


def require_bits(what: str, value: int, bits: int) -> int:
    """`value` as an int, if it is an unsigned number of at most `bits` bits; else OutOfRange."""
    number = int(value)
    if not 0 <= number < 1 << bits:
        raise OutOfRange(what, number, f"it has {bits} bits, so 0 to {(1 << bits) - 1:#x}")
    return number


def require_aligned(what: str, value: int, alignment: int) -> int:
    """`value` as an int, if it is a multiple of `alignment` bytes; else Misaligned."""
    number = int(value)
    if number % alignment:
        raise Misaligned(what, number, f"it must be a multiple of {alignment:#x}")
    return number


def require_width(physical_address_width: int) -> int:
    """A MAXPHYADDR as CPUID.80000008H:EAX[7:0] may report it: 32 to 52 bits; else OutOfRange."""
    if not 32 <= physical_address_width <= MAX_PHYSICAL_ADDRESS_WIDTH:
        raise OutOfRange(
            "physical-address width", physical_address_width, "processors with VMX report 32 to 52 bits"
        )
    return physical_address_width


def require_page_address(
    what: str, address: int, width: int = MAX_PHYSICAL_ADDRESS_WIDTH, pages: int = 1
) -> int:
    """A physical address where `pages` pages can lie: a multiple of 4 KiB, all of them below 2**width."""
    number = int(address)
    if number < 0 or number + pages * PAGE_SIZE > 1 << width:
        raise OutOfRange(
            what,
            number,
            f"{pages} page{'s' if pages != 1 else ''} from there must end at or below {1 << width:#x} "
            f"(physical addresses have {width} bits)",
        )
    return require_aligned(what, number, PAGE_SIZE)
