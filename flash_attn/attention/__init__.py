"""How attention meets torch, from the public functions down to the backends.

functional   the public functions
autograd     their gradients in eager mode, as `torch.autograd.Function`s
internals    the functions below the public ones that other libraries call
calls        one forward and one backward call: to a backend, or through an op
arguments    what all of them do to their arguments
library      the attention ops of `torch.library` and their kernels
cache        the op of attention over a cache
fakes        shapes of the ops' results
gradients    the ops' gradients
batching     the ops under `torch.vmap`
flops        the ops under `torch.utils.flop_counter`
deferred     imports that wait for another module's, as that of `flops` does
registry     how an op is registered

Eager calls go from a public function straight to the backend. The ops are for everything that
needs to see a call: `torch.compile`, `torch.export`, function transforms, dispatch modes, tensor
subclasses and the profiler.
"""

from flash_attn.attention import batching, fakes, gradients  # noqa: F401
from flash_attn.attention.deferred import import_after

# The counter of torch imports Triton where that is installed, which takes 0.1 s.
import_after("torch.utils.flop_counter", "flash_attn.attention.flops")
