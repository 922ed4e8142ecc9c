"""What sampling costs, as a differentiable share of the model's multiply-adds."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.nn.record import RecordedDecision, SamplingRecord

__all__ = ["sampling_loss"]


def sampling_loss(
    decisions: SamplingRecord | Sequence[RecordedDecision],
    *,
    weights: Literal["macs", "published", "uniform"] = "macs",
    budget: float | None = None,
    total_macs: int | None = None,
) -> Float[Tensor, ""]:
    """The expected share of multiply-adds that the model computes, or its distance to a budget.

    With p_i the mean probability of decision i and m_i the dense multiply-adds it gates, the share
    is::

        E = sum_i m_i p_i / sum_i m_i                        of the gated multiply-adds
        E = (total - sum_i m_i + sum_i m_i p_i) / total      of all, if `total_macs` is given

    Add it to the task loss, times a factor: the paper uses 0.02 to 0.3. With a budget the result is
    (E - budget)^2, which pulls from both sides: a model below its budget has compute left to use.

    Args:
        decisions: a record, or its `decisions`; of one or several calls.
        weights: "macs" (default) weighs a decision by what it gates. "published" is the mean over
            blocks of 0.25 p_1 + 0.75 p_2, as in the published code; see `block_share` of
            :class:`RecordedDecision` for other layouts and blocks. "uniform" is the plain mean of
            p_i over the decisions.
        budget: the share aimed at, in (0, 1]; of the gated multiply-adds, or of all if `total_macs`
            is given. Default None: no aim, the share itself is the loss.
        total_macs: dense multiply-adds of the whole model over the recorded batches, for example
            ``measure.count_macs(model, x).dense``. Only with weights="macs".

    Returns:
        float32 scalar in [0, 1].

    Raises:
        ValueError: if nothing was recorded, if gradients are enabled but none of the probabilities
            has one, if `budget` is outside (0, 1] or below what the model costs ungated, or if
            `total_macs` is less than what is gated.

    Gradient: to the samplers' heads, through the probabilities. Noise, grid and temperature do not
    enter, so that what runs is slightly more than E: the grid adds up to 1/grid_stride^2.

    Example:
        >>> from sparsight.nn import RBFInterpolation, SampledConv2d, Sampler, record_sampling
        >>> layer = SampledConv2d(
        ...     3, 8, 1, sampler=Sampler(3, bias=0.0), interpolation=RBFInterpolation()
        ... )
        >>> with record_sampling(layer) as record:
        ...     features = layer(torch.randn(1, 3, 16, 16))
        >>> loss = features.square().mean() + 0.1 * sampling_loss(record)
        >>> sampling_loss(record).item()
        0.5

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, equation 7, and their code, which weighs the
    two masks of a bottleneck 0.25 and 0.75 (weights="published"). We weigh by the multiply-adds
    that a decision gates, which is where these numbers come from, and add the budget.
    """
    if isinstance(decisions, SamplingRecord):
        decisions = decisions.decisions
    if weights not in ("macs", "published", "uniform"):
        raise ValueError(
            f"sampling_loss: weights is {weights!r}, but must be 'macs', 'published' or 'uniform'; "
            "pass 'macs' to weigh by cost."
        )
    if not decisions:
        raise ValueError(
            "sampling_loss: the record is empty, but at least one decision is needed; call the "
            "model inside `with record_sampling(model) as record:` before the loss, and clear the "
            "record after it."
        )
    if torch.is_grad_enabled() and not any(d.probability.requires_grad for d in decisions):
        raise ValueError(
            f"sampling_loss: none of the {len(decisions)} recorded probabilities has a gradient, "
            "but training needs one; record the converted (not the frozen) model with gradients "
            "enabled and its heads' requires_grad on, or evaluate the loss under torch.no_grad()."
        )
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(
            f"sampling_loss: budget is {budget}, but must be a share in (0, 1]; "
            "pass for example 0.4 for 40 % of the multiply-adds."
        )
    if total_macs is not None and weights != "macs":
        raise ValueError(
            f"sampling_loss: total_macs came with weights={weights!r}, but a share of the whole "
            "model needs weights='macs'; drop one of the two."
        )

    gated = sum(d.macs for d in decisions)
    if weights == "uniform":
        shares = [1 / len(decisions)] * len(decisions)
    elif weights == "published":
        num_blocks = sum(d.block_share for d in decisions)
        shares = [d.block_share / num_blocks for d in decisions]
    elif gated == 0:
        raise ValueError(
            "sampling_loss: the recorded decisions gate 0 multiply-adds, but weights='macs' needs "
            "some; use weights='uniform' for samplers that gate nothing."
        )
    else:
        shares = [d.macs / gated for d in decisions]
    means = torch.stack([d.probability.float().mean() for d in decisions])
    expected = (means * means.new_tensor(shares)).sum()
    if total_macs is not None:
        if total_macs < gated:
            raise ValueError(
                f"sampling_loss: total_macs is {total_macs}, but the recorded decisions alone gate "
                f"{gated}; give the dense multiply-adds of the whole model over the whole record, "
                "and clear the record after every step."
            )
        ungated_share = 1 - gated / total_macs
        if budget is not None and budget <= ungated_share:
            raise ValueError(
                f"sampling_loss: budget is {budget}, but {ungated_share:.3f} of the multiply-adds "
                "are not gated by any sampler; ask for more than that, or sample more layers."
            )
        expected = ungated_share + (gated / total_macs) * expected
    return expected if budget is None else (expected - budget) ** 2
