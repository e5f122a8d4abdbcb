"""What a hypervisor gives the processor: regions, bitmaps, EPT, and what the processor says it can take.

Every structure is a value of its own, knows no address, and gives final bytes: `to_bytes()`, and
`pages(base)` for the pages that go into memory, each with its physical address. Any illegal value that a
test may want can be made, by name; whatever can't be written at all raises at once.

`VmxRegion`, `IOBitmap`, `MsrBitmap`, `MsrArea`, `VirtualApicPage`, `Ept` and the like are memory;
`EPTPointer` and `FeatureControl` are registers; `Capabilities` holds the capability MSRs. Names are
imported on first use, as in `vmxlab.sdm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmxlab.sdm.registers import MemoryType
    from vmxlab.structures.capabilities import CAPABILITY_MSRS, Capabilities
    from vmxlab.structures.capability_msrs import EptVpidCap, VmcsEnum, VmFunc, VmxBasic, VmxMisc
    from vmxlab.structures.checks import MAX_PHYSICAL_ADDRESS_WIDTH, PAGE_SIZE, BrokenRule
    from vmxlab.structures.control_capability import ControlCapability
    from vmxlab.structures.ept import Ept
    from vmxlab.structures.ept_entry import EptFault, PageSize
    from vmxlab.structures.ept_pointer import EPTPointer
    from vmxlab.structures.ept_translation import Translation
    from vmxlab.structures.eptp_list import EptpList
    from vmxlab.structures.feature_control import FeatureControl, FeatureControlFlags
    from vmxlab.structures.io_bitmap import IOBitmap
    from vmxlab.structures.msr_area import MsrArea, MsrEntry
    from vmxlab.structures.msr_bitmap import MsrBitmap
    from vmxlab.structures.pml import PageModificationLog
    from vmxlab.structures.posted_interrupts import PostedInterruptDescriptor
    from vmxlab.structures.region import VmxRegion
    from vmxlab.structures.sub_page import SubPagePermissionTable
    from vmxlab.structures.virtual_apic import VirtualApicPage, x2apic_msr
    from vmxlab.structures.virtualization_exception import VirtualizationExceptionInformation

__all__ = [
    "CAPABILITY_MSRS",
    "MAX_PHYSICAL_ADDRESS_WIDTH",
    "PAGE_SIZE",
    "BrokenRule",
    "Capabilities",
    "ControlCapability",
    "EPTPointer",
    "Ept",
    "EptFault",
    "EptVpidCap",
    "EptpList",
    "FeatureControl",
    "FeatureControlFlags",
    "IOBitmap",
    "MemoryType",
    "MsrArea",
    "MsrBitmap",
    "MsrEntry",
    "PageModificationLog",
    "PageSize",
    "PostedInterruptDescriptor",
    "SubPagePermissionTable",
    "Translation",
    "VirtualApicPage",
    "VirtualizationExceptionInformation",
    "VmFunc",
    "VmcsEnum",
    "VmxBasic",
    "VmxMisc",
    "VmxRegion",
    "x2apic_msr",
]

_MODULES = {
    "vmxlab.sdm.registers": ("MemoryType",),
    "vmxlab.structures.capabilities": ("CAPABILITY_MSRS", "Capabilities"),
    "vmxlab.structures.capability_msrs": ("EptVpidCap", "VmFunc", "VmcsEnum", "VmxBasic", "VmxMisc"),
    "vmxlab.structures.checks": ("MAX_PHYSICAL_ADDRESS_WIDTH", "PAGE_SIZE", "BrokenRule"),
    "vmxlab.structures.control_capability": ("ControlCapability",),
    "vmxlab.structures.ept": ("Ept",),
    "vmxlab.structures.ept_translation": ("Translation",),
    "vmxlab.structures.ept_entry": ("EptFault", "PageSize"),
    "vmxlab.structures.ept_pointer": ("EPTPointer",),
    "vmxlab.structures.eptp_list": ("EptpList",),
    "vmxlab.structures.feature_control": ("FeatureControl", "FeatureControlFlags"),
    "vmxlab.structures.io_bitmap": ("IOBitmap",),
    "vmxlab.structures.msr_area": ("MsrArea", "MsrEntry"),
    "vmxlab.structures.msr_bitmap": ("MsrBitmap",),
    "vmxlab.structures.posted_interrupts": ("PostedInterruptDescriptor",),
    "vmxlab.structures.pml": ("PageModificationLog",),
    "vmxlab.structures.region": ("VmxRegion",),
    "vmxlab.structures.sub_page": ("SubPagePermissionTable",),
    "vmxlab.structures.virtualization_exception": ("VirtualizationExceptionInformation",),
    "vmxlab.structures.virtual_apic": ("VirtualApicPage", "x2apic_msr"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module that has `name`, and keep the name here for next time."""
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
