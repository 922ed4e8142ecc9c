"""The seed of a model's sampling noise at inference, changed in place."""

from torch import nn

from sparsight.nn.frozen_sampler import FrozenSampler
from sparsight.nn.sampler import Sampler

__all__ = ["set_seed"]


def set_seed(model: nn.Module, seed: int) -> int:
    """Give every sampler of a model the seed of its noise at inference.

    For a converted model as for a frozen one, which need not be frozen again: what it returns
    afterwards is what freezing after the change would have returned. How stable a score is over
    seeds is the question that this answers.

    Args:
        model: a converted or frozen model, changed in place; not while another thread runs it. One
            that torch.compile wraps is compiled again at its next call; a program that torch.export
            made has the seed of its export.
        seed: any integer; 64 bits of it count. Samplers are made with 0.

    Returns:
        How many samplers draw noise, and so listen to the seed. 0 for a dense model, for
        `noise="none"`, and for perforated and gated layers: the pattern of a
        :class:`PerforatedSampler` is what its network was trained with, and stays.

    Raises:
        TypeError: `seed` is no integer.

    Example:
        >>> import torch
        >>> from sparsight.nn import SampledConv2d, ZeroFill
        >>> sampler = Sampler(3, bias=0.0, grid_stride=None)
        >>> conv = SampledConv2d(3, 8, 1, sampler=sampler, interpolation=ZeroFill()).eval()
        >>> x = torch.randn(1, 3, 20, 20)
        >>> first = conv(x)
        >>> set_seed(conv, 1), torch.equal(conv(x), first)
        (1, False)
        >>> set_seed(conv, 0), torch.equal(conv(x), first)
        (1, True)
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(
            f"set_seed: seed is {seed!r} of type {type(seed).__name__}, but must be an integer; "
            "pass for example seed=1."
        )
    count = 0
    for module in model.modules():
        if isinstance(module, Sampler):
            module.seed = seed
            count += module.noise != "none"
        elif isinstance(module, FrozenSampler) and module.inside:
            module.seed = seed
            count += module.kind != "none"
    return count
