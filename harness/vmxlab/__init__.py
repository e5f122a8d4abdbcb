"""vmxlab."""
