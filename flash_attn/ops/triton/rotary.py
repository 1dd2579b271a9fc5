"""The name under which other libraries import `apply_rotary`; nothing here needs Triton."""

from flash_attn.ops.rotary import apply_rotary

__all__ = ["apply_rotary"]
