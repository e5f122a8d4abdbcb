"""The section "By hand" of README.md: it is typed, and what comes back is what stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMPT = "vmx> "
MOST_LINES = 10


def transcript() -> str:
    """The section's example."""
    section = (ROOT / "README.md").read_text().partition("\n## By hand\n")[2].partition("\n## ")[0]
    return re.findall(r"^```\n(.*?)^```$", section, re.M | re.S)[0]


def typed(text: str) -> list[str]:
    """All that a person types: a command of the shell, then lines at the prompt."""
    return re.findall(r"^(?:\$|vmx>) (.*)$", text, re.M)


def without_record_contents(text: str) -> str:
    """Records may get more to say; what people read stays as it is."""
    return re.sub(r"^@(\w+) .*$", r"@\1", text, flags=re.M)


def test_readme_gets_to_an_io_exit_in_ten_typed_lines():
    start = transcript().partition("exit: IO_INSTRUCTION")[0]
    assert typed(start)[0] == "make console"
    assert len(typed(start)) <= MOST_LINES
    assert re.search(r"^console: .*\n\t.*vmxlab console", (ROOT / "Makefile").read_text(), re.M)


def test_what_readme_types_by_hand_gives_what_readme_shows(folder):
    shell, *lines = typed(transcript())
    done = subprocess.run(
        [sys.executable, "-m", "vmxlab.cli", "console", "--engine", "bochs"],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    shown = transcript().removeprefix(f"$ {shell}\n")
    assert without_record_contents(done.stdout) == without_record_contents(shown) + PROMPT + "\n"


def test_cases_of_a_file_can_be_loaded_beside_the_baseline(folder):
    Path("cases.py").write_text("from vmxlab import Case\nmine = Case(program='cpuid; hlt', name='mine')\n")
    done = subprocess.run(
        [sys.executable, "-m", "vmxlab.cli", "console", "--engine", "bochs", "cases.py"],
        input="cases\nload mine\nlaunch\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "    0  baseline\n    1  mine\n" in done.stdout
    assert "exit: CPUID (10): leaf 0x0, subleaf 0x0\n" in done.stdout
