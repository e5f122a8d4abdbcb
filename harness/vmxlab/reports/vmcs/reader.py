"""Which reader a text is for."""

from __future__ import annotations

from pathlib import Path

from vmxlab.errors import CaseError
from vmxlab.reports.vmcs import kvm_dump, monitor_log, pairs
from vmxlab.reports.vmcs.text import VmcsText

_READABLE = "field names and values as JSON or TOML, KVM's dump of a VMCS, or a serial log of this project"
_LONGEST = 64 << 20

_READERS = (
    (monitor_log.is_meant, monitor_log.read),
    (kvm_dump.is_meant, kvm_dump.read),
    (pairs.is_meant, pairs.read),
)


def read_vmcs_text(text: str) -> list[VmcsText]:
    """Every VMCS in a text. Raises CaseError for a text that holds none."""
    for is_meant, read in _READERS:
        found = read(text) if is_meant(text) else []
        if found:
            return found
    raise CaseError("there is no VMCS in it", advice=f"it is read as {_READABLE}")


def read_vmcs_file(path: Path) -> list[VmcsText]:
    """Every VMCS in a file. Raises CaseError for a file that can't be read, or holds none."""
    try:
        size = path.stat().st_size
        if size > _LONGEST:
            raise CaseError(f"{path} has {size} bytes", advice=f"cut it down to {_LONGEST >> 20} MiB at most")
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise CaseError(f"{path} can't be read: {error.strerror}") from error
    try:
        return read_vmcs_text(text)
    except CaseError as error:
        raise CaseError(f"{path}: {error.message}", advice=error.advice) from error
