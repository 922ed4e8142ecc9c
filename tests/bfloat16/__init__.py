"""Frozen layers in bfloat16. A package, so that its files share `rounding`."""
