"""The live machine: VMX instructions, memory, structures and VM entries from Python, one by one.

`machine` is what a person or a test holds. It stands on `link` (scripts out, runs back), `memory`,
`structures` (bitmaps and EPT, whose changes follow to the machine), `registers`, `stepping` and `snapshot`.
"""
