"""Processors to report on."""

from __future__ import annotations

import pytest

from vmxlab.sdm.msrs import Msr
from vmxlab.structures.capabilities import Capabilities

# Bochs 2.7, corei7_skylake_x, as the monitor reported it.
SKYLAKE_X = {
    Msr.IA32_FEATURE_CONTROL: 0x5,
    Msr.IA32_VMX_BASIC: 0xD8_1000_0000_002B,
    Msr.IA32_VMX_PINBASED_CTLS: 0x7F_0000_0016,
    Msr.IA32_VMX_PROCBASED_CTLS: 0xF7F9_FFFE_0401_E172,
    Msr.IA32_VMX_EXIT_CTLS: 0x7F_FFFF_0003_6DFF,
    Msr.IA32_VMX_ENTRY_CTLS: 0xFFFF_0000_11FF,
    Msr.IA32_VMX_MISC: 0x6004_01E0,
    Msr.IA32_VMX_CR0_FIXED0: 0x8000_0021,
    Msr.IA32_VMX_CR0_FIXED1: 0xFFFF_FFFF,
    Msr.IA32_VMX_CR4_FIXED0: 0x2000,
    Msr.IA32_VMX_CR4_FIXED1: 0x37_27FF,
    Msr.IA32_VMX_VMCS_ENUM: 0x34,
    Msr.IA32_VMX_PROCBASED_CTLS2: 0x217_7FFF_0000_0000,
    Msr.IA32_VMX_EPT_VPID_CAP: 0xF01_0633_4141,
    Msr.IA32_VMX_TRUE_PINBASED_CTLS: 0x7F_0000_0016,
    Msr.IA32_VMX_TRUE_PROCBASED_CTLS: 0xF7F9_FFFE_0400_6172,
    Msr.IA32_VMX_TRUE_EXIT_CTLS: 0x7F_FFFF_0003_6DFB,
    Msr.IA32_VMX_TRUE_ENTRY_CTLS: 0xFFFF_0000_11FB,
    Msr.IA32_VMX_VMFUNC: 0x1,
}


@pytest.fixture
def skylake() -> Capabilities:
    return Capabilities(SKYLAKE_X)
