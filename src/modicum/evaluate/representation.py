r"""How a model sees prompts from inside: does an attacked prompt look like a harmful one, or like a harmless one?

Refusal training can learn a shortcut: harmful and harmless requests separate in the hidden states, but a harmful
request in a wrapper lies among the harmless ones. The bound of domain adaptation says why that matters:
:math:`\epsilon_{\mathrm{OOD}} \le \epsilon_{\mathrm{ID}} + d(p_{\mathrm{ID}}, p_{\mathrm{OOD}}) + \lambda`. The
publication draws pictures; the numbers here are our choice.

Reference:
    H. Wang, Z. Qin, L. Shen, X. Wang, D. Tao, M. Cheng, "Safety Reasoning with Guidelines", 2025, arXiv:2502.04040;
    S. Ben-David et al., "A theory of learning from different domains", Machine Learning 2010.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.evaluate.held_out import held_out
from modicum.evaluate.logistic import auroc, fit
from modicum.vocabulary import check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_prompt(model: PreTrainedModel, length: int) -> None:
    """Raise an UnsupportedError for a prompt of so many tokens that a model cannot read."""
    remedy = "Shorten it, or leave out the wrapper that lengthens it."
    check_positions(model, length, f"A prompt of {length} tokens exceeds", remedy)


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    position: Literal["prompt_end", "think_first", "answer_start"] = "prompt_end",
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Return the hidden states at one token of each prompt, after every block.

    The language-model head is not run.

    Args:
        model: A causal language model.
        input_ids: Token ids, (n, length), padded on either side.
        attention_mask: 1 at tokens, 0 at padding, (n, length).
        position: Which token the rows end with, which is the one that is read. ``prompt_end``: the rendered prompt with
            its generation header. ``think_first``: the prompt and the first generated token. ``answer_start``: the
            prompt and the generated reasoning, up to the token before the answer.
        layers: Which states, from 0 (embeddings) to the number of blocks; all when not given.

    Returns:
        float32 of shape (layers, n, width).

    Raises:
        RecipeError: A row has no token, a layer does not exist or the position is unknown.
        UnsupportedError: The rows exceed the model's positions.

    Cost:
        One forward pass without logits.

    Reference:
        A. Zou et al., "Representation Engineering", 2023, arXiv:2310.01405, reads the last token of a prompt.
    """
    if position not in ("prompt_end", "think_first", "answer_start"):
        raise RecipeError(f"position is {position!r}, expected 'prompt_end', 'think_first' or 'answer_start'.")
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise RecipeError(
            f"input_ids has the shape {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)}, "
            "expected one mask for each of some rows of ids."
        )
    check_prompt(model, input_ids.shape[1])
    attention_mask = attention_mask.to(torch.int64)
    counts = attention_mask.sum(-1)
    if not bool((counts > 0).all()):
        raise RecipeError(f"Row {int((counts == 0).nonzero()[0])} has no token, so there is no state to read.")
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    body = getattr(model, "base_model", model)
    states = body(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    wanted = range(len(states)) if layers is None else layers
    if bad := [layer for layer in wanted if not -len(states) <= layer < len(states)]:
        raise RecipeError(f"There is no layer {bad[0]}, expected 0 to {len(states) - 1}.")
    length = attention_mask.shape[1]
    last = length - 1 - attention_mask.flip(-1).argmax(-1)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    return torch.stack([states[layer][rows, last].float() for layer in wanted])


class Projection(NamedTuple):
    """Principal components of known prompts.

    Attributes:
        mean: Of the prompts that were fitted, (d,).
        components: One in each row, (k, d), of unit length; harmful prompts have the higher mean on each.
    """

    mean: Tensor
    components: Tensor


def fit_pca(h_harmful: Tensor, h_helpful: Tensor, *, n_components: int = 2) -> Projection:
    """Return the principal components of harmful and harmless prompts of the kind that training saw.

    Attacked prompts are projected with them and never take part in the fit, so adding some moves nothing.

    Args:
        h_harmful: Hidden states, (n, d).
        h_helpful: Hidden states, (m, d).
        n_components: How many, at most min(n + m - 1, d).

    Raises:
        RecipeError: There are too few prompts, or a state is not finite.

    Example:
        >>> harmful = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
        >>> pca = fit_pca(harmful, -harmful, n_components=1)
        >>> [[round(abs(x), 6) for x in row] for row in pca.components.tolist()]
        [[1.0, 0.0]]

    Reference:
        A. Zou et al., 2023, arXiv:2310.01405, for the projection and its sign.
    """
    harmful, helpful = _sets(h_harmful, h_helpful)
    both = torch.cat([harmful, helpful])
    mean = both.mean(0)
    most = min(len(both) - 1, both.shape[1])
    if not 1 <= n_components <= most:
        raise RecipeError(f"n_components is {n_components}, expected 1 to {most} with {len(both)} prompts.")
    _, _, vh = torch.linalg.svd(both - mean, full_matrices=False)
    components = vh[:n_components]
    gap = (harmful.mean(0) - helpful.mean(0)) @ components.T
    return Projection(mean, components * torch.where(gap < 0, -1.0, 1.0).to(torch.float64)[:, None])


def project(h: Tensor, pca: Projection) -> Tensor:
    """Return the coordinates of hidden states (n, d) on the components, (n, k).

    Example:
        >>> pca = Projection(torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.0]]))
        >>> project(torch.tensor([[3.0, 1.0]]), pca).tolist()
        [[2.0]]
    """
    _, rows = _sets(pca.components, h)
    return ((rows - pca.mean) @ pca.components.to(rows).T).to(pca.mean.dtype)


def proxy_a_distance(h_a: Tensor, h_b: Tensor, *, folds: int = 5, generator: torch.Generator, l2: float = 1.0) -> float:
    r"""Return how well a linear classifier tells two sets apart: 0 not at all, 2 perfectly.

    .. math:: d_A = \max(0,\ 2\,(1 - 2\,\mathrm{err}))

    with the balanced error of held-out folds.

    Args:
        h_a: Hidden states, (n, d).
        h_b: Hidden states, (m, d).
        folds: Parts that are held out in turn, from 2 to the smaller set.
        generator: Draws the folds, by index.
        l2: Penalty of the classifier.

    Raises:
        RecipeError: There are fewer rows of a set than folds, or a state is not finite.

    Example:
        >>> a = torch.linspace(0, 1, 20)[:, None]
        >>> proxy_a_distance(a, a + 9, generator=torch.Generator().manual_seed(0))
        2.0

    Cost:
        One classifier for each fold.

    Reference:
        S. Ben-David et al., "Analysis of representations for domain adaptation", NeurIPS 2006. The clamp, the balanced
        error and the scaling by one number are our choice.
    """
    x, labels = _scaled(*_sets(h_a, h_b))
    said = held_out(x, labels, folds=folds, generator=generator, l2=l2)
    return distance_of_error(_balanced_error(said > 0, labels))


def distance_of_error(error: float) -> float:
    """Return the proxy A-distance of a balanced error.

    Example:
        >>> [distance_of_error(error) for error in (0.0, 0.1, 0.25, 0.5, 0.6)]
        [2.0, 1.6, 1.0, 0.0, 0.0]

    Reference:
        S. Ben-David et al., NeurIPS 2006.
    """
    if not 0 <= error <= 1:
        raise RecipeError(f"The error is {error}, expected a share from 0 to 1.")
    return max(0.0, 2 * (1 - 2 * error))


def centroid_gap(h_harmful: Tensor, h_helpful: Tensor, h_ood: Tensor, *, ridge: float = 0.01) -> float:
    r"""Return how much nearer attacked prompts lie to the harmful ones than to the harmless ones.

    .. math:: \lVert \mu_{\mathrm{OOD}} - \mu_{\mathrm{helpful}} \rVert_\Sigma
              - \lVert \mu_{\mathrm{OOD}} - \mu_{\mathrm{harmful}} \rVert_\Sigma

    in the space whitened by the pooled covariance within the known classes and a ridge,
    :math:`\Sigma + \rho\,(\mathrm{tr}\Sigma/d) I`.

    Args:
        h_harmful: Known harmful prompts, (n, d).
        h_helpful: Known harmless prompts, (m, d).
        h_ood: Attacked prompts, (k, d).
        ridge: :math:`\rho`; with more dimensions than prompts the covariance is singular without it.

    Returns:
        Positive where attacked prompts look harmful.

    Raises:
        RecipeError: The covariance is singular and ``ridge`` is 0, or a set is empty, of another width or not finite.

    Example:
        >>> harmful = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, -1.0]])
        >>> round(centroid_gap(harmful, -harmful, torch.tensor([[0.5, 0.0]])), 6)
        1.407195

    Reference:
        P. C. Mahalanobis, 1936, for the distance; its use here is our choice.
    """
    *known, attacked = _sets(h_harmful, h_helpful, h_ood)
    if not ridge >= 0:
        raise RecipeError(f"ridge is {ridge}, expected 0 or more.")
    centers = [h.mean(0) for h in known]
    within = torch.cat([h - center for h, center in zip(known, centers, strict=True)])
    covariance = within.T @ within / len(within)
    d = len(covariance)
    covariance += ridge * covariance.trace() / d * torch.eye(d, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise RecipeError(
            f"The covariance of {len(within)} prompts in {d} dimensions is singular. Raise ridge above {ridge}."
        )
    to_harmful, to_helpful = (
        torch.linalg.solve_triangular(factor, (attacked.mean(0) - center)[:, None], upper=False).norm()
        for center in centers
    )
    return float(to_helpful - to_harmful)


class Transfer(NamedTuple):
    """How a probe of known prompts does on attacked ones.

    Attributes:
        auroc: Harmful against harmless goals in the same wrappers.
        recall: Share of the harmful ones that it finds.
        false_alarms: Share of the harmless ones that it takes for harmful.
    """

    auroc: float
    recall: float
    false_alarms: float


def probe_transfer(
    h_harmful: Tensor, h_helpful: Tensor, h_ood_harmful: Tensor, h_ood_benign: Tensor, *, l2: float = 1.0
) -> Transfer:
    """Train a probe on known prompts, and test it on attacked ones with harmful and harmless goals.

    Without harmless goals in the same wrappers a probe would be praised for knowing a wrapper.

    Args:
        h_harmful: Known harmful prompts, (n, d).
        h_helpful: Known harmless prompts, (m, d).
        h_ood_harmful: Harmful goals in wrappers, (k, d).
        h_ood_benign: Harmless goals in the same wrappers, (l, d).
        l2: Penalty of the probe.

    Raises:
        RecipeError: A set is empty, of another width or not finite.

    Example:
        >>> known = torch.tensor([[1.0], [2.0]])
        >>> probe_transfer(known, -known, known + 1, -known - 1).recall
        1.0

    Reference:
        The test is our choice; the bound it stands for is that of S. Ben-David et al., Machine Learning 2010.
    """
    bad, good, *attacked = _sets(h_harmful, h_helpful, h_ood_harmful, h_ood_benign)
    x, labels = _scaled(good, bad)
    center, scale = _standard(good, bad)
    probe = fit(x, labels, l2=l2)
    harmful, benign = (probe((h - center) / scale) for h in attacked)
    truth = torch.cat([torch.ones(len(harmful)), torch.zeros(len(benign))]).bool()
    return Transfer(
        auroc(torch.cat([harmful, benign]), truth),
        float((harmful > 0).double().mean()),
        float((benign > 0).double().mean()),
    )


class Predictability(NamedTuple):
    """How well a probe at the first generated token foretells the judged outcome."""

    auroc: float
    balanced_accuracy: float


def first_token_predictability(
    h_think_first: Tensor,
    outcomes: Tensor,
    *,
    folds: int = 5,
    generator: torch.Generator,
    l2: float = 1.0,
    groups: Sequence[Hashable] | None = None,
) -> Predictability:
    """Return how much of an outcome is settled before any reasoning is written.

    Args:
        h_think_first: Hidden states at the first generated token, (n, d).
        outcomes: Whether each answer was finally judged unsafe, (n,).
        folds: Parts that are held out in turn.
        generator: Draws the folds, by index.
        l2: Penalty of the probe.
        groups: What each row asks for. One request in several wrappers is one group, which is held out as a whole: else
            the probe would know it from the other wrappers.

    Raises:
        RecipeError: An outcome is rarer than there are folds, or there is not one for each row.

    Example:
        >>> h = torch.cat([torch.zeros(10, 1), torch.ones(10, 1)])
        >>> first_token_predictability(h, h[:, 0] > 0, generator=torch.Generator().manual_seed(0)).auroc
        1.0

    Reference:
        "Do Thinking Tokens Help with Safety?", 2026, arXiv:2606.25013.
    """
    said = foretold(h_think_first, outcomes, folds=folds, generator=generator, l2=l2, groups=groups)
    unsafe = torch.as_tensor(outcomes).to("cpu", torch.bool)
    return Predictability(auroc(said, unsafe), 1 - _balanced_error(said > 0, unsafe))


def foretold(
    h: Tensor,
    outcomes: Tensor,
    *,
    folds: int = 5,
    generator: torch.Generator,
    l2: float = 1.0,
    groups: Sequence[Hashable] | None = None,
) -> Tensor:
    """Return the log-odds of each outcome by a probe that never saw its row; see :func:`first_token_predictability`."""
    (states,) = _sets(h)
    unsafe = torch.as_tensor(outcomes).to("cpu", torch.bool)
    if unsafe.shape != states.shape[:1]:
        raise RecipeError(f"outcomes has the shape {tuple(unsafe.shape)}, expected one for each of {len(states)} rows.")
    center, scale = _standard(states[~unsafe], states[unsafe])
    return held_out((states - center) / scale, unsafe, folds=folds, generator=generator, l2=l2, groups=groups)


def _sets(*sets: Tensor, least: int = 1) -> list[Tensor]:
    """Return sets of hidden states in float64: finite matrices of one width, each with so many rows or more."""
    found = [torch.as_tensor(h).detach().to("cpu", torch.float64) for h in sets]
    for number, h in enumerate(found):
        if h.ndim != 2 or len(h) < least or not h.shape[1] or h.shape[1] != found[0].shape[1]:
            raise RecipeError(
                f"Set {number} of hidden states has the shape {tuple(h.shape)}, expected {least} rows or more, as wide "
                f"as the first set's {tuple(found[0].shape)[-1:]}."
            )
        if not bool(h.isfinite().all()):
            raise RecipeError(f"Set {number} of hidden states holds NaN or infinity, so the model overflowed there.")
    return found


def _standard(h_a: Tensor, h_b: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([h_a, h_b])
    center = both.mean(0)
    # One number for all columns: a scale for each would change with a rotation of the space.
    scale = (both - center).square().mean().sqrt()
    return center, scale.clamp_min(torch.finfo(torch.float64).tiny)


def _scaled(h_a: Tensor, h_b: Tensor) -> tuple[Tensor, Tensor]:
    center, scale = _standard(h_a, h_b)
    labels = torch.cat([torch.zeros(len(h_a)), torch.ones(len(h_b))]).bool()
    return (torch.cat([h_a, h_b]) - center) / scale, labels


def _balanced_error(said: Tensor, labels: Tensor) -> float:
    return float(((~said[labels]).double().mean() + said[~labels].double().mean()) / 2)
