"""Modules for DeepSpeed's inference registries."""
