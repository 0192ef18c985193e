"""Plain next-token prediction: the baseline of every objective."""

from __future__ import annotations

from typing import Any

from modicum.objectives.batch import Batch, require_labels
from modicum.registry import objective


@objective("ntp", laws={"labels_untouched", "identity"})
def ntp(batch: Batch, *, rng: Any = None) -> Batch:
    r"""Return the batch as it is.

    .. math::
        L(\theta) = -\frac{1}{n} \sum_t \log p_\theta(x_t \mid x_{<t})

    Args:
        batch: ``input_ids`` and ``labels``.
        rng: Unused; nothing is drawn.

    Returns:
        The same batch.

    Raises:
        ModicumError: There are no labels.

    Example:
        >>> batch = {"input_ids": [[1]], "labels": [[1]]}
        >>> ntp(batch) is batch
        True

    Cost:
        None.

    Reference:
        Bengio et al., "A Neural Probabilistic Language Model", JMLR 2003.
    """
    del rng
    require_labels(batch)
    return batch
