"""Known differences: where an engine does something else than the SDM says.

An entry is a finding, not an excuse: it names the section, what the manual says, what the engine does, and
the versions it was seen with. A test marked with its key is expected to fail on that engine, strictly: when
the difference goes away, the test fails until the entry is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownDifference:
    """One difference.

    `seen_with` says on which engines, and for each a regular expression for its version, from its start
    ("2.7", "linux-6.1.192+qemu-7.2.22+bochs-2.7").
    """

    seen_with: Mapping[str, str]
    section: str
    sdm: str
    """What the manual says."""
    engine_does: str

    def applies(self, engine: str, version: str) -> bool:
        """Whether this is about that engine in that version."""
        return engine in self.seen_with and re.match(self.seen_with[engine], version) is not None

    def __str__(self) -> str:
        engines = ", ".join(self.seen_with)
        return f"{engines}: {self.engine_does}; SDM {self.section}: {self.sdm}"


_BOCHS = {"bochs": r"2\.7\b"}

KNOWN_DIFFERENCES: Mapping[str, KnownDifference] = {
    "ept-ad-walk-without-read-bit": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, Table 28-7, note 1",
        sdm="with EPTP bit 6 a violation by a walk of L2's paging structures sets both bits 0 and 1",
        engine_does="it sets bit 1 only",
    ),
    "ept-exit-rf-clear": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 28.3.3",
        sdm="an EPT violation or misconfiguration outside event delivery saves RFLAGS.RF as 1",
        engine_does="RF is saved as it was, 0",
    ),
    "ept-guest-flag-update-not-checked": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 29.3.3.2",
        sdm="setting a flag in L2's paging structures is a data write, for which EPT must allow writes",
        engine_does="the flag is written to a page that EPT makes read-only, without an EPT violation",
    ),
    "ept-large-page-bit-12-not-reserved": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, Tables 29-2 and 29-4",
        sdm="bit 12 of an EPT entry that maps a page of 2 MiB or 1 GiB is reserved: EPT misconfiguration",
        engine_does="bit 12 is ignored, as if it were the PAT bit of ordinary paging; the page is accessed",
    ),
    "exception-exit-rf-clear": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 28.3.3",
        sdm="an exit for a fault saves RFLAGS.RF as delivery of the fault would have pushed it: 1",
        engine_does="RF is saved as it was, 0",
    ),
    "guest-rip-upper-bits": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.3.1.4",
        sdm=(
            "VM entry to 64-bit code fails unless bits 63:N of RIP are identical, N being the linear-"
            "address width"
        ),
        engine_does="the entry succeeds, and fetching the first instruction is #GP(0)",
    ),
    "invept-invvpid-type-upper-half": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 31.3, INVEPT and INVVPID",
        sdm="in 64-bit mode the type is a 64-bit operand, and one that is not supported is VMfail(28)",
        engine_does="bits 63:32 of the type are ignored",
    ),
    "rdrand-16-bit-operand-size": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, table 28-12",
        sdm="bits 12:11 of the instruction information are 0 for RDRAND and RDSEED with a 16-bit destination",
        engine_does="they are 1, as for a 32-bit destination",
    ),
    "vm-entry-with-shadow-vmcs": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 27.1",
        sdm="VMLAUNCH and VMRESUME are VMfailInvalid where the current VMCS is a shadow VMCS",
        engine_does="the shadow bit is not looked at: VMLAUNCH enters, VMRESUME is VMfailValid(5)",
    ),
    "vmcall-in-root-operation": KnownDifference(
        seen_with=_BOCHS,
        section="Vol. 3C, 31.3, VMCALL",
        sdm="VMCALL in VMX root operation, with a current VMCS and no SMM monitor, is VMfailValid(1)",
        engine_does="the emulator panics (VMCALL: not implemented), and the machine dies",
    ),
}
"""By key: what the marker `vmx_known_difference` names."""
