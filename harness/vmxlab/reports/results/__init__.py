"""The results of a session: what each test did, case by case, in a file that a report is made from.

facts    what is kept of a run: its records, and what they don't hold
file     the file: a line a test, along with the lines of a coverage file; written and read
logs     a bare serial log, read as if it were such a file
model    what both give: tests with their cases
"""
