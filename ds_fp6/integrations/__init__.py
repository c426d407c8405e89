"""Hooks into other libraries: a package or module for each, listed in its ``HOOKS`` and ``REPAIRS`` tables."""
