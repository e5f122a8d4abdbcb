"""A VMCS as people have it, read from text: field names and values, KVM's dump, the monitor's log.

Every reader goes as far as the text goes. What it can't read is an `Oddity` with its line, and a field that a
text does not hold is not there: nothing is guessed.
"""

from __future__ import annotations

from vmxlab.reports.vmcs.reader import read_vmcs_file, read_vmcs_text
from vmxlab.reports.vmcs.text import Oddity, VmcsText

__all__ = ["Oddity", "VmcsText", "read_vmcs_file", "read_vmcs_text"]
