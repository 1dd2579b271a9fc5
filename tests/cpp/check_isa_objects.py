"""Checks that the objects of different instruction sets share no code.

The linker merges weak functions of one name. If an object compiled for AVX-512 defined one outside
the namespace of its instruction set, that copy could end up serving every CPU. Usage:
check_isa_objects.py NM ISA=OBJECT ...
"""

import subprocess
import sys

WEAK = set("VvWwuD")


def main() -> int:
    nm, *pairs = sys.argv[1:]
    failures = []
    for pair in pairs:
        isa, path = pair.split("=", 1)
        listing = subprocess.run(
            [nm, "-C", "--defined-only", path], check=True, capture_output=True, text=True
        ).stdout
        for line in listing.splitlines():
            kind, _, symbol = line[17:].partition(" ")
            if kind in WEAK and f"::{isa}::" not in symbol and not symbol.startswith("DW.ref."):
                failures.append(f"{isa}: {symbol} ({kind})")
    print("\n".join(failures) or f"{len(pairs)} objects share no code")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
