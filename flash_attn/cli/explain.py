"""Say which CUDA kernels a call would launch, and how, on any architecture. Needs no GPU."""

from flash_attn import _core
from flash_attn.cli.compile import architecture

_OPERATIONS = {"forward": 0, "backward": 1, "kvcache": 2}


def add_arguments(parser):
    parser.add_argument("operation", choices=_OPERATIONS, nargs="?", default="forward")
    parser.add_argument("--arch", type=architecture, default=90, help="architecture, e.g. sm_90")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seqlen-q", type=int, default=4096, help="of the longest sequence")
    parser.add_argument("--seqlen-k", type=int, help="of the longest sequence, or of the cache")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--heads-k", type=int, help="as many as --heads without this option")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=int, nargs=2, default=(-1, -1), metavar=("LEFT", "RIGHT"))
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--alibi", action="store_true")
    parser.add_argument("--s-aux", action="store_true", help="attention sinks")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--varlen", action="store_true", help="sequences given by cu_seqlens")
    parser.add_argument("--page-size", type=int, default=0)
    parser.add_argument("--new-keys", type=int, default=0, help="kvcache: keys to append")
    parser.add_argument("--rotary-dim", type=int, default=0, help="kvcache: rotate q and new keys")
    parser.add_argument("--num-splits", type=int, default=0, help="0: chosen")


def explain(arguments) -> str:
    """The device, the workspace and the launches of the call, as text.

    Raises:
        RuntimeError: the call would be refused, or the architecture is not known.
    """
    heads_k = arguments.heads if arguments.heads_k is None else arguments.heads_k
    seqlen_k = arguments.seqlen_q if arguments.seqlen_k is None else arguments.seqlen_k
    return _core.cuda_explain(
        arguments.arch,
        _OPERATIONS[arguments.operation],
        arguments.dtype == "bf16",
        arguments.batch,
        arguments.seqlen_q,
        seqlen_k,
        arguments.heads,
        heads_k,
        arguments.head_dim,
        arguments.causal,
        *arguments.window,
        arguments.softcap,
        arguments.dropout,
        arguments.alibi,
        arguments.s_aux,
        arguments.deterministic,
        arguments.varlen,
        arguments.page_size,
        arguments.new_keys,
        arguments.rotary_dim,
        arguments.num_splits,
    )


def run(arguments):
    try:
        print(explain(arguments), end="")
    except RuntimeError as error:
        print(error)
        return 1
    return 0
