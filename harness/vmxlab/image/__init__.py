"""How a case gets into memory: the physical layout, the script the monitor runs, packing, boot files."""
