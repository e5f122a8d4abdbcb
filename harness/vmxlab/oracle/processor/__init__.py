"""L2 as the oracle runs it: registers, memory and instructions, with what is not known kept apart."""
