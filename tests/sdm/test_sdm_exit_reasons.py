"""Basic exit reasons and the exit-reason field."""

from __future__ import annotations

import pytest

from vmxlab.sdm.exit_reasons import (
    BUS_LOCK_BIT,
    ENTRY_FAILURE_BIT,
    ExitReason,
    basic_reason,
    describe_reason,
    is_entry_failure,
)

# From Appendix C, typed in again: reasons spread over the whole range, each neighbour of a gap among them.
PRINTED_NUMBERS = {
    "EXCEPTION_OR_NMI": 0,
    "EXTERNAL_INTERRUPT": 1,
    "TRIPLE_FAULT": 2,
    "OTHER_SMI": 6,
    "TASK_SWITCH": 9,
    "CPUID": 10,
    "GETSEC": 11,
    "HLT": 12,
    "RDTSC": 16,
    "VMCALL": 18,
    "VMCLEAR": 19,
    "VMXON": 27,
    "CONTROL_REGISTER_ACCESS": 28,
    "MOV_DR": 29,
    "IO_INSTRUCTION": 30,
    "RDMSR": 31,
    "WRMSR": 32,
    "ENTRY_FAILURE_GUEST_STATE": 33,
    "ENTRY_FAILURE_MSR_LOADING": 34,
    "MWAIT": 36,
    "MONITOR_TRAP_FLAG": 37,
    "MONITOR": 39,
    "PAUSE": 40,
    "ENTRY_FAILURE_MACHINE_CHECK": 41,
    "TPR_BELOW_THRESHOLD": 43,
    "EPT_VIOLATION": 48,
    "EPT_MISCONFIGURATION": 49,
    "PREEMPTION_TIMER": 52,
    "WBINVD": 54,
    "XSETBV": 55,
    "VMFUNC": 59,
    "PML_FULL": 62,
    "XRSTORS": 64,
    "SPP": 66,
    "TPAUSE": 68,
    "ENCLV": 70,
    "ENQCMD_PASID_TRANSLATION_FAILURE": 72,
    "BUS_LOCK": 74,
    "INSTRUCTION_TIMEOUT": 75,
    "SEAMCALL": 76,
    "TDCALL": 77,
    "RDMSRLIST": 78,
    "WRMSRLIST": 79,
    "UWRMSR": 81,
    "RDMSR_IMMEDIATE": 84,
    "WRMSRNS_IMMEDIATE": 85,
}


@pytest.mark.parametrize(("name", "number"), PRINTED_NUMBERS.items())
def test_a_reason_has_the_number_that_the_manual_prints(name: str, number: int) -> None:
    assert ExitReason[name] == number


def test_unassigned_numbers_below_the_last_reason_are_no_reasons() -> None:
    assert set(range(86)) - set(ExitReason) == {35, 38, 42, 71, 82, 83}


def test_the_basic_reason_is_the_low_half_of_the_field() -> None:
    assert basic_reason(30) is ExitReason.IO_INSTRUCTION
    assert basic_reason(ENTRY_FAILURE_BIT | 33) is ExitReason.ENTRY_FAILURE_GUEST_STATE
    assert basic_reason(BUS_LOCK_BIT | 12) is ExitReason.HLT


@pytest.mark.parametrize("number", [35, 200, 0xFFFF])
def test_an_unknown_reason_stays_a_number(number: int) -> None:
    reason = basic_reason(ENTRY_FAILURE_BIT | number)
    assert reason == number
    assert not isinstance(reason, ExitReason)


def test_bit_31_tells_a_failed_entry_from_an_exit() -> None:
    assert is_entry_failure(0x8000_0021)
    assert not is_entry_failure(0x21)


@pytest.mark.parametrize(
    ("full", "text"),
    [
        (12, "HLT"),
        (0x8000_0021, "ENTRY_FAILURE_GUEST_STATE (VM-entry failure)"),
        (200, "reason 200"),
        (1 << 27 | 1, "EXTERNAL_INTERRUPT (incident to enclave mode)"),
        (1 << 30 | 1 << 17 | 12, "HLT (unassigned bits 0x40020000)"),
    ],
)
def test_a_field_is_put_in_words(full: int, text: str) -> None:
    assert describe_reason(full) == text
