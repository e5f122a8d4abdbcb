"""L2's general registers on a live machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from vmxlab.cases.reactions import SetRegister
from vmxlab.errors import CaseError
from vmxlab.image import script
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import GENERAL_REGISTERS


class LiveRegisters(Mapping[str, int]):
    """L2's general registers, "rax" to "r15": `vm.registers["rax"] = 5`.

    They are what the last exit left; what is set goes to the machine before the next command. RSP is the
    VMCS's GUEST_RSP: to read or to set it is a VMREAD or a VMWRITE.
    """

    def __init__(self, vmread: Callable[[Field], int], vmwrite: Callable[[Field, int], object]) -> None:
        self._vmread = vmread
        self._vmwrite = vmwrite
        self._values = dict.fromkeys((name for name in GENERAL_REGISTERS if name != "rsp"), 0)
        self._sent = dict(self._values)

    def __getitem__(self, name: str) -> int:
        """A register's value. CaseError for a name that there is none of."""
        if name == "rsp":
            return self._vmread(Field.GUEST_RSP)
        _check(name)
        return self._values[name]

    def __setitem__(self, name: str, value: int) -> None:
        """Set a register. OutOfRange for more than 64 bits."""
        SetRegister(name, value)
        if name == "rsp":
            self._vmwrite(Field.GUEST_RSP, value)
        else:
            self._values[name] = value

    def __iter__(self) -> Iterator[str]:
        """The names, in the SDM's order."""
        return iter(GENERAL_REGISTERS)

    def __len__(self) -> int:
        """Sixteen."""
        return len(GENERAL_REGISTERS)

    def __repr__(self) -> str:
        """Those that are not 0, without RSP, which only the machine knows."""
        words = [f"{name}={value:#x}" for name, value in self._values.items() if value]
        return f"<LiveRegisters {' '.join(words) or 'all 0'}>"

    # --- for the machine -------------------------------------------------------------------------------

    def units(self) -> list[bytes]:
        """What brings the machine up to date."""
        changed = {name: value for name, value in self._values.items() if self._sent[name] != value}
        return [script.registers(changed)] if changed else []

    def arrived(self) -> None:
        """The machine has what `units` gave."""
        self._sent = dict(self._values)

    def take(self, values: Mapping[str, int]) -> None:
        """What an exit, or a set-up, left."""
        self._values.update({name: value for name, value in values.items() if name != "rsp"})
        self._sent = dict(self._values)


def _check(name: str) -> None:
    if name not in GENERAL_REGISTERS:
        raise CaseError(
            f"there is no general register {name!r}", advice=f"one of {', '.join(GENERAL_REGISTERS)}"
        )
