"""The FlagGems backend: Triton kernels for every accelerator that FlagGems reaches."""
