"""What people look at: tables, decoded capabilities, what a case did, the code it ran.

Everything here takes data and gives text: lines, or a `Table` that a terminal, a file and a program each get
in their own way. Nothing here runs a machine.
"""
