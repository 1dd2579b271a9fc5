"""Uniform registers that a compiled kernel may read before it has written them.

ptxas of CUDA 12.8, which Triton 3.6 brings for Hopper, sometimes computes the descriptor of a
product's operand from a uniform register that is set only later, or on another path: the product
then reads any shared memory, and no compiler says a word. Every register must have been written on
every path from the kernel's begin to where it is read; here that is looked up in the disassembly.
"""

import re

# Instructions of the uniform datapath whose first operand is not what they write.
_WRITES_NOTHING = {"UTMALDG", "UTMASTG", "UTMAREDG", "UTMAPF", "UTMACCTL", "UTMACMDFLUSH", "UBLKCP"}
_WRITES_UNIFORM = {"R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX"}


def _parse(sass):
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return instructions, labels


def _effects(instruction):
    """Registers that it reads and writes, the label that it may go to, and whether it may go on."""
    guard = re.match(r"@!?U?P\w+\s+", instruction)
    opcode, _, operands = instruction[guard.end() if guard else 0 :].partition(" ")
    name, *modifiers = opcode.split(".")
    operands = [x.strip() for x in operands.split(",")]
    reads, writes = set(), set()
    predicate = r"P\d" if name == "R2UR" else r"UP\d"
    if name != "UISETP" and len(operands) > 1 and re.fullmatch(predicate, operands[0]):
        del operands[0]  # the result as a predicate; the one as a register follows
    is_uniform = (name.startswith("U") and name not in _WRITES_NOTHING) or name in _WRITES_UNIFORM
    if is_uniform and (register := re.fullmatch(r"UR(\d+)", operands[0])):
        first = int(register[1])
        is_pair = name != "USHF" and ("64" in modifiers or "WIDE" in modifiers)
        writes |= {first, first + 1} if is_pair else {first}
        del operands[0]
    for operand in () if name == "MOV" else operands:  # MOV saves a register, set or not
        if described := re.search(r"gdesc\[UR(\d+)\]", operand):
            # Of the left operand, unless it is in registers, and of the right one.
            first = int(described[1])
            in_registers = re.fullmatch(r"R\d+(\.reuse)?", operands[1])
            reads |= set(range(first + 2 if in_registers else first, first + 4))
        else:
            reads |= {int(x) for x in re.findall(r"\bUR(\d+)\b", operand)}
    if name == "CALL":  # of a division: whatever it sets counts as set
        writes = set(range(64))
    target = re.search(r"\((\.L_x_\d+)\)", instruction) if name == "BRA" else None
    conditional = guard or re.match(r"!?U?P\d", operands[0])
    ends = name in ("EXIT", "RET", "BRA", "BRX") and not conditional
    return reads, writes, target and target[1], not ends


def unset(sass):
    """Instructions that read a uniform register which a path to them has not written."""
    instructions, labels = _parse(sass)
    assert instructions, "this is not what nvdisasm prints"
    effects = [_effects(x) for x in instructions]
    written = [None] * len(instructions)  # before each instruction, on every path to it
    waiting = [(0, frozenset())]
    while waiting:
        index, before = waiting.pop()
        if index >= len(instructions):
            continue
        known = before if written[index] is None else written[index] & before
        if known == written[index]:
            continue
        written[index] = known
        _, writes, target, goes_on = effects[index]
        if target in labels:
            waiting.append((labels[target], known | writes))
        if goes_on:
            waiting.append((index + 1, known | writes))
    return [
        text
        for text, (reads, *_), known in zip(instructions, effects, written, strict=True)
        if known is not None and reads - known
    ]
