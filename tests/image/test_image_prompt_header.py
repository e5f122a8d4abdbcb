"""The header of the monitor's prompt has the names and the numbers that Python has."""

from __future__ import annotations

import subprocess

from vmxlab.image.layout import EPT_TABLES, VMCS_REGION, VMXON_REGION
from vmxlab.image.prompt_header import c_header
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import MemoryType
from vmxlab.structures.capability_msrs import EptVpidCap
from vmxlab.structures.ept_entry import LARGE, LEVEL_NAMES

PRINTED = {
    "VMCS_FIELD_NAMES": [(int(field), field.name) for field in Field],
    "MSR_NAMES": [(int(msr), msr.name) for msr in Msr],
    "EXIT_REASON_NAMES": [(int(reason), reason.name) for reason in ExitReason],
    "INSTRUCTION_ERROR_TEXTS": [(int(error), error.description) for error in InstructionError],
    "MEMORY_TYPE_NAMES": [(int(kind), kind.name) for kind in MemoryType],
    "EPT_LEVEL_NAMES": list(LEVEL_NAMES.items()),
    **{
        f"{controls.name}_CONTROL_NAMES": [(int(flag).bit_length() - 1, flag.name) for flag in controls.flags]
        for controls in ControlSet
    },
}
NUMBERS = {
    "VMXON_REGION": VMXON_REGION,
    "VMCS_REGION": VMCS_REGION,
    "EPT_TABLES": EPT_TABLES,
    "EPT_LARGE": LARGE,
    "EPT_VPID_CAP_INVEPT": EptVpidCap.invept.mask,
    "EPT_VPID_CAP_PAGE_1G": EptVpidCap.page_1g.mask,
}


def test_lists_and_numbers_in_c_are_those_of_python(tmp_path):
    (tmp_path / "prompt_facts.h").write_text(c_header())
    lists = "\n".join(f'puts("{name}"); {name}(PRINT)' for name in PRINTED)
    numbers = "\n".join(f'_Static_assert({name} == {value}ull, "{name}");' for name, value in NUMBERS.items())
    sets = f'_Static_assert(0 CONTROL_SETS(COUNT) == {len(ControlSet)}, "sets");'
    (tmp_path / "print.c").write_text(
        '#include <stdio.h>\n#include "prompt_facts.h"\n#include "prompt_facts.h"\n'
        '#define PRINT(value, text) printf("%llu %s\\n", (unsigned long long)(value), text);\n'
        f"#define COUNT(field, msr, true_msr, set) +1\n{numbers}\n{sets}\n"
        f"int main(void) {{ {lists} return 0; }}\n"
    )
    program = tmp_path / "print"
    build = ["gcc", "-Wall", "-Wextra", "-Werror", "-I", tmp_path, "-o", program, tmp_path / "print.c"]
    subprocess.run(build, check=True, timeout=60)
    printed = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout
    expected = []
    for name, entries in PRINTED.items():
        expected += [name, *(f"{value} {text}" for value, text in entries)]
    assert printed.splitlines() == expected
