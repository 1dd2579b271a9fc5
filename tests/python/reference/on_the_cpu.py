"""Where the reference computes."""

import functools

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


def on_the_cpu(function):
    """The function with tensors of other devices copied to the CPU and its results copied back.

    The reference consists of many small operations and looks at numbers on the way: on a GPU, all
    the more on one that several processes share, nearly all of its time would be waiting.
    """

    @functools.wraps(function)
    def computed_on_the_cpu(*args, **kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = next((x.device for x in tensors if not x.is_cpu), None)
        if device is None:
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.cpu(), (args, kwargs))
        with torch.device("cpu"):
            results = function(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda x: x.to(device), results)

    return computed_on_the_cpu
