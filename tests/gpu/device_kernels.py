"""For which constants the test kernels of `kernels/` are compiled and run: of each file a table.

Head dimensions are the columns of tiles: all that there are of those.
"""

import itertools

TYPES = ("DType::kBFloat16", "DType::kFloat16")
ACCESSES = ("Access::kWhole", "Access::kPadded", "Access::kElement")
FLAGS = ("false", "true")


def table(**values):
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


PTX = table(kType=TYPES)

COPIES = table(
    kType=TYPES[:1],
    kAccess=ACCESSES,
    kRows=("64",),
    kCols=("32", "48", "64", "80", "96", "128", "160", "192", "224", "256"),
    kThreads=("128",),
) + table(
    kType=TYPES[:1],
    kAccess=ACCESSES,
    kRows=("16", "32"),
    kCols=("48", "128"),
    kThreads=("32", "256"),
)
PRODUCTS = table(
    kType=TYPES,
    kAccess=ACCESSES[:1],
    kRows=("32",),
    kCols=("32", "48", "64", "80", "128", "256"),
    kThreads=("32",),
)

KEYS = table(
    kPaged=FLAGS,
    kAccess=ACCESSES,
    kRows=("16", "32"),
    kCols=("64",),
    kThreads=("64",),
    kGroups=("2",),
)

_BLOCKS = {"kM": ("1", "2"), "kN": ("4", "8")}
MASKS = table(
    kMasking=("Masking::kNone", "Masking::kCausal", "Masking::kWindow"),
    kSoftcap=FLAGS[:1],
    kAlibi=FLAGS[:1],
    **_BLOCKS,
)
TRANSFORMS = table(kMasking=("Masking::kNone",), kSoftcap=FLAGS, kAlibi=FLAGS, kM=("2",), kN=("4",))
BLOCKS = table(kMasking=("Masking::kNone",), kSoftcap=FLAGS[:1], kAlibi=FLAGS[:1], **_BLOCKS)

PARTS = table(kType=TYPES, kAccess=ACCESSES)

# Tables in the rows' dtype or float32; a unit is 16 bytes or one number.
ROTARY = [
    row
    for row in table(
        kType=(*TYPES, "DType::kFloat32"),
        kTable=(*TYPES, "DType::kFloat32"),
        kWidth=("1", "4", "8"),
        kInterleaved=FLAGS,
    )
    if row["kTable"] in (row["kType"], "DType::kFloat32")
    and row["kWidth"] in ("1", "4" if row["kType"] == "DType::kFloat32" else "8")
]

FILES = {
    "ptx": PTX,
    "tile": COPIES + PRODUCTS,
    "keys": KEYS,
    "scores": MASKS + TRANSFORMS + BLOCKS,
    "parts": PARTS,
    "rotary": ROTARY,
}


def name(constants):
    """Of a row, for people: the values without their types."""
    words = (f"{key[1:]}={value.rpartition('::k')[2]}" for key, value in constants.items())
    return "-".join(words).lower()
