"""FlashAttention-Plus: exact attention behind the interface of FlashAttention-2."""

from pkgutil import extend_path

# FlashAttention-4 (flash_attn.cute) may be installed beside this package.
__path__ = extend_path(__path__, __name__)

__version__ = "2.8.3+plus.0.1.0"

from flash_attn._core import ConstraintError
from flash_attn.backends import set_backend, use_backend
from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

_MODULES = ("FlashAttention", "FlashMHA")

__all__ = [
    "ConstraintError",
    *_MODULES,
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "set_backend",
    "use_backend",
]


def __getattr__(name: str):
    if name in _MODULES:  # functions alone do not need them
        from flash_attn.modules import mha

        return getattr(mha, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
