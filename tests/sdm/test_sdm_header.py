"""The C header that the monitor is built with says what Python says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.header import c_header, constants
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR0, CR4, EFER, GENERAL_REGISTERS, RFLAGS

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def compile_with_header(tmp_path: Path, suffix: str, source: str, *options: str) -> str:
    """What gcc says of a source that starts with the header: nothing, if it takes it."""
    (tmp_path / "vmx_facts.h").write_text(c_header())
    path = tmp_path / f"test{suffix}"
    path.write_text(f'#include "vmx_facts.h"\n{source}\n')
    command = ["gcc", *options, "-I", str(tmp_path), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.stderr[:2000] if result.returncode else ""


@needs_gcc
def test_the_header_is_valid_c_by_itself_and_included_twice(tmp_path: Path) -> None:
    options = ["-fsyntax-only", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-ffreestanding"]
    assert compile_with_header(tmp_path, ".c", '#include "vmx_facts.h"\nint unused;', *options) == ""


@needs_gcc
def test_c_sees_every_value_that_python_has(tmp_path: Path) -> None:
    """Made from the enumerations directly, not from what the header writer iterates over."""
    expected = {f"VMCS_{field.name}": int(field) for field in Field}
    expected |= {f"MSR_{msr.name}": int(msr) for msr in Msr}
    expected |= {f"EXIT_REASON_{reason.name}": int(reason) for reason in ExitReason}
    expected |= {f"VMX_ERROR_{error.name}": int(error) for error in InstructionError}
    expected |= {f"APIC_{register.name}": int(register) for register in ApicRegister}
    for flags in (CR0, CR4, EFER, RFLAGS):
        expected |= {f"{flags.__name__}_{flag.name}": int(flag) for flag in flags}
    expected |= {f"GPR_{name.upper()}": index for index, name in enumerate(GENERAL_REGISTERS)}
    expected |= {f"SECONDARY_CONTROL_{flag.name}": int(flag) for flag in SecondaryControls}
    assertions = "\n".join(
        # A signed constant would be greater than -1.
        f'_Static_assert({name} == {value}ull && !({name} > -1), "{name}");'
        for name, value in expected.items()
    )
    assert compile_with_header(tmp_path, ".c", assertions, "-fsyntax-only", "-std=c11", "-Werror") == ""


@needs_gcc
def test_the_values_in_c_are_those_of_the_manual(tmp_path: Path) -> None:
    source = """
        _Static_assert(VMCS_GUEST_RIP == 0x681e, "");
        _Static_assert(VMCS_EPT_POINTER == 0x201a, "");
        _Static_assert(MSR_IA32_VMX_BASIC == 0x480, "");
        _Static_assert(EXIT_REASON_IO_INSTRUCTION == 30, "");
        _Static_assert(EXIT_REASON_ENTRY_FAILURE_BIT == 0x80000000u, "");
        _Static_assert(CR4_VMXE == 0x2000, "");
        _Static_assert(CR4_FRED == 0x100000000, "");
        _Static_assert(VMX_ERROR_ENTRY_INVALID_CONTROL_FIELDS == 7, "");
        _Static_assert(GPR_R15 == 15 && GPR_COUNT == 16, "");
        _Static_assert(INVEPT_GLOBAL == 2 && INVVPID_ALL_CONTEXTS == 2, "");
        _Static_assert(FEATURE_CONTROL_LOCKED == 1, "");
        _Static_assert(VECTOR_PF == 14, "");
        _Static_assert(APIC_DEFAULT_BASE + APIC_LVT_TIMER == 0xfee00320, "");
        _Static_assert((LVT_MASKED | LVT_TIMER_PERIODIC) == 3u << 16, "");
        _Static_assert(SVR_SOFTWARE_ENABLE == 0x100 && APIC_DIVIDE_BY_1 == 0xb, "");
        #if VMCS_GUEST_RIP != 0x681e
        #error "not usable in #if"
        #endif
    """
    options = ["-fsyntax-only", "-std=c11", "-Wall", "-Wextra", "-Werror"]
    assert compile_with_header(tmp_path, ".c", source, *options) == ""


@needs_gcc
def test_assembly_can_use_the_constants(tmp_path: Path) -> None:
    source = "mov $VMCS_HOST_RSP, %edx\nvmwrite %rsp, %rdx\nmov $MSR_IA32_EFER, %ecx\n.quad CR4_FRED"
    assert compile_with_header(tmp_path, ".S", source, "-c", "-o", str(tmp_path / "test.o")) == ""


def test_no_name_is_defined_twice() -> None:
    names = [name for _, name, _ in constants()]
    assert len(names) == len(set(names))
    assert (
        c_header().count("\n#define ") == len(names) + 7
    )  # the guard, two lists, two macros in two variants


def test_the_module_prints_the_header() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "vmxlab.sdm.header"], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == c_header()
    assert result.stderr == ""
