"""Talking to a machine: records, the pexpect session on the serial stream, runs, and the lab above them."""
