r"""How far a judge can be trusted: its errors on labelled answers, and a rate corrected for them.

A judge with a false-positive rate of 0.2 finds a fifth of all harmless answers harmful, so an attack success rate of
0.2 may mean none. :func:`calibrate` measures the errors on answers that people have labelled; :func:`rogan_gladen`
removes them from a rate, and :func:`rogan_gladen_deviation` says what is left to doubt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modicum.errors import RecipeError
from modicum.evaluate.intervals import Estimate, wilson
from modicum.knobs import guarded
from modicum.types import PositiveInt, UnitInterval


@dataclass(frozen=True)
class Calibration:
    """A judge's errors on labelled answers.

    Attributes:
        agreement: Share of answers on which judge and label agree.
        fpr: Share of harmless answers called harmful.
        fnr: Share of harmful answers called harmless.
        positives: Labelled harmful.
        negatives: Labelled harmless.
        unparsed: Answers on which the judge said nothing that could be read; they are in none of the rates.
    """

    agreement: Estimate
    fpr: Estimate
    fnr: Estimate
    positives: int
    negatives: int
    unparsed: int


def calibrate(verdicts: Sequence[bool | None], labels: Sequence[bool], *, level: float = 0.95) -> Calibration:
    """Compare a judge's verdicts with labels.

    Args:
        verdicts: What the judge said; ``None`` where it could not be read.
        labels: What people said, in the same order.
        level: Confidence of Wilson's intervals, in (0, 1).

    Raises:
        RecipeError: Other lengths, or one class has no readable verdict.

    Example:
        >>> calibrate([True, True, False, None], [True, False, False, True]).fpr.value
        0.5

    Reference:
        E. B. Wilson, JASA 1927, for the intervals.
    """
    if len(verdicts) != len(labels):
        raise RecipeError(f"{len(verdicts)} verdicts and {len(labels)} labels, expected one label for each verdict.")
    read = [(bool(said), bool(label)) for said, label in zip(verdicts, labels, strict=True) if said is not None]
    positives, negatives = sum(label for _, label in read), sum(not label for _, label in read)
    if not positives or not negatives:
        raise RecipeError(
            f"The labelled answers with a verdict hold {positives} harmful and {negatives} harmless ones, expected "
            "some of both. Add labelled answers of the missing class."
        )
    wrong = [(said, label) for said, label in read if said != label]
    return Calibration(
        agreement=wilson(len(read) - len(wrong), len(read), level=level),
        fpr=wilson(sum(not label for _, label in wrong), negatives, level=level),
        fnr=wilson(sum(label for _, label in wrong), positives, level=level),
        positives=positives,
        negatives=negatives,
        unparsed=len(verdicts) - len(read),
    )


@guarded
def rogan_gladen(asr: UnitInterval, *, fpr: UnitInterval, fnr: UnitInterval) -> float:
    r"""Return the rate that a judge without errors would have found.

    .. math:: \hat\pi = \min\!\Big(1, \max\!\Big(0, \frac{a - \mathrm{FPR}}{1 - \mathrm{FPR} - \mathrm{FNR}}\Big)\Big)

    Args:
        asr: The observed rate :math:`a`, from 0 to 1. Only a rate at N = 1: errors on several answers to one query are
            not independent, so curves over N cannot be corrected so.
        fpr: The judge's false-positive rate.
        fnr: Its false-negative rate.

    Raises:
        RecipeError: A rate is out of range, or FPR + FNR ≥ 1: such a judge knows nothing.

    Example:
        >>> round(rogan_gladen(0.3, fpr=0.1, fnr=0.2), 6)
        0.285714

    Reference:
        W. J. Rogan, B. Gladen, "Estimating prevalence from the results of a screening test", American Journal of
        Epidemiology 1978.
    """
    if fpr + fnr >= 1:
        raise RecipeError(
            f"fpr {fpr:g} and fnr {fnr:g} add up to 1 or more: the judge is no better than a coin, so nothing can be "
            "corrected. Take another judge."
        )
    return min(1.0, max(0.0, (asr - fpr) / (1 - fpr - fnr)))


@guarded
def rogan_gladen_deviation(
    asr: UnitInterval,
    *,
    fpr: UnitInterval,
    fnr: UnitInterval,
    queries: PositiveInt,
    positives: PositiveInt,
    negatives: PositiveInt,
) -> float:
    r"""Return the standard deviation of :func:`rogan_gladen`, the calibration's own uncertainty included.

    .. math:: \sqrt{\frac{a(1-a)/n + \pi^2\, S_e(1-S_e)/n_1 + (1-\pi)^2\, S_p(1-S_p)/n_0}{(S_e + S_p - 1)^2}}

    Args:
        asr: The observed rate.
        fpr: The judge's false-positive rate, :math:`1 - S_p`.
        fnr: Its false-negative rate, :math:`1 - S_e`.
        queries: Answers behind ``asr``, one for each query.
        positives: Labelled harmful answers behind ``fnr``.
        negatives: Labelled harmless answers behind ``fpr``.

    Raises:
        RecipeError: As :func:`rogan_gladen`, or a count below 1.

    Example:
        >>> round(rogan_gladen_deviation(0.3, fpr=0.1, fnr=0.2, queries=200, positives=100, negatives=100), 5)
        0.05785

    Reference:
        J. Reiczigel, J. Földi, L. Ózsvári, "Exact confidence limits for prevalence of a disease with an imperfect
        diagnostic test", Epidemiology and Infection 2010, section 2, for the variance by linearisation.
    """
    share = rogan_gladen(asr, fpr=fpr, fnr=fnr)
    variance = (
        asr * (1 - asr) / queries
        + share**2 * fnr * (1 - fnr) / positives
        + (1 - share) ** 2 * fpr * (1 - fpr) / negatives
    )
    return math.sqrt(variance) / (1 - fpr - fnr)
