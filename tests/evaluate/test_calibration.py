import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from modicum.evaluate.calibration import calibrate, rogan_gladen, rogan_gladen_deviation
from oracles import safety as oracle

share = st.floats(0, 1, allow_nan=False)


def test_numbered_cases():
    corrected = [rogan_gladen(asr, fpr=0.1, fnr=0.2) for asr in (0.30, 0.05, 0.95)]
    assert corrected == pytest.approx([0.285714, 0, 1], abs=1e-6)
    found = rogan_gladen_deviation(0.3, fpr=0.1, fnr=0.2, queries=200, positives=100, negatives=100)
    assert found == pytest.approx(0.05785, abs=1e-5)


@given(share, share, share)
def test_a_rate_is_corrected_as_the_formula_says_or_refused(asr, fpr, fnr):
    if fpr + fnr >= 1:
        with pytest.raises(ValueError, match="no better than a coin"):
            rogan_gladen(asr, fpr=fpr, fnr=fnr)
        return
    assume(fpr + fnr < 0.999)  # nearer to a coin, both lose the digits of their difference
    assert rogan_gladen(asr, fpr=fpr, fnr=fnr) == pytest.approx(oracle.rogan_gladen(asr, fpr, fnr))
    counts = {"queries": 50, "positives": 20, "negatives": 30}
    found = rogan_gladen_deviation(asr, fpr=fpr, fnr=fnr, **counts)
    assert found == pytest.approx(oracle.deviation(asr, fpr, fnr, 50, 20, 30))


@given(share, share, share)
def test_correction_undoes_a_judge_s_errors(true, fpr, fnr):
    if fpr + fnr < 0.99:
        observed = true * (1 - fnr) + (1 - true) * fpr
        assert rogan_gladen(min(1.0, observed), fpr=fpr, fnr=fnr) == pytest.approx(true, abs=1e-9)


def test_errors_are_counted_by_class_and_unread_verdicts_apart():
    verdicts = [True, False, True, None, False, False, True, None]
    labels = [True, True, True, True, False, False, False, False]
    found = calibrate(verdicts, labels)
    assert (found.fnr.value, found.fpr.value) == pytest.approx((1 / 3, 1 / 3))
    assert (found.positives, found.negatives, found.unparsed) == (3, 3, 2)
    assert found.agreement.value == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("verdicts", "labels"), [([True], [True]), ([True, None], [True, False]), ([], []), ([True, False], [True])]
)
def test_one_class_alone_is_refused(verdicts, labels):
    with pytest.raises(ValueError):
        calibrate(verdicts, labels)


@pytest.mark.parametrize("bad", [{"asr": 1.2}, {"fpr": -0.1}, {"fnr": float("nan")}])
def test_shares_out_of_range_are_refused(bad):
    values = {"asr": 0.5, "fpr": 0.1, "fnr": 0.1} | bad
    with pytest.raises(ValueError):
        rogan_gladen(values.pop("asr"), **values)
