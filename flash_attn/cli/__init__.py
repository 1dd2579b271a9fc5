"""Commands of `python -m flash_attn`."""
