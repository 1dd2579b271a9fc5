"""Functions of the other kernels, compiled as Gluon for those of Hopper."""

from triton.experimental import gluon

from flash_attn.backends.flaggems.kernels import backward_prepare, backward_tiles, common, rows

alibi_slope = gluon.jit(common.alibi_slope.fn)
all_visible_keys = gluon.jit(common.all_visible_keys.fn)
any_seeing_queries = gluon.jit(common.any_seeing_queries.fn)
any_visible_keys = gluon.jit(common.any_visible_keys.fn)
clamped = gluon.jit(common.clamped.fn)
dropout_key = gluon.jit(common.dropout_key.fn)
finish_rows = gluon.jit(rows.finish_rows.fn)
keeps_of_counters = gluon.jit(common.keeps_of_counters.fn)
keys_of_sequence = gluon.jit(rows.keys_of_sequence.fn)
philox = gluon.jit(common.philox.fn)
program_order = gluon.jit(backward_tiles.program_order.fn)
rows_of_sequence = gluon.jit(common.rows_of_sequence.fn)
tanh_by_reciprocal = gluon.jit(common.tanh_by_reciprocal.fn)
workspace_row = gluon.jit(backward_prepare.workspace_row.fn)
