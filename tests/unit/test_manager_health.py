"""Judgements of health: limits, hysteresis, forecasts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.manager.health import (
    STALE_NS,
    TargetFacts,
    forecast,
    judge_link,
    judge_target,
    judge_vdsa,
    lag_now,
)
from dr_cloud.model.units import SECOND_NS

WELL = TargetFacts(
    subject="vpg/erp/dc1",
    replicating=True,
    interval_seconds=5,
    promised_seconds=24 * 3600,
    age_seconds=48 * 3600,
    lag_seconds=4,
    history_seconds=24 * 3600,
    forecast_seconds=None,
    problem="",
)


def raised(facts: TargetFacts, standing: frozenset[str] = frozenset()) -> set[str]:
    return {judgement.kind for judgement in judge_target(facts, standing) if judgement.raised}


def test_all_is_well():
    assert raised(WELL) == set()


@pytest.mark.parametrize(
    ("facts", "kinds"),
    [
        ({"lag_seconds": 10.1}, {"lag"}),
        ({"lag_seconds": None, "age_seconds": 61, "history_seconds": 0}, {"checkpoint"}),
        ({"lag_seconds": None, "age_seconds": 59, "history_seconds": 0}, set()),
        ({"problem": "the target refuses"}, {"replication"}),
        ({"history_seconds": 20 * 3600}, {"history"}),
        ({"history_seconds": 17 * 3600}, {"history", "history-critical"}),
        ({"history_seconds": 3600, "age_seconds": 3600}, set()),
        ({"history_seconds": 3600, "age_seconds": 3600, "forecast_seconds": 19 * 3600}, {"history"}),
        ({"replicating": False, "lag_seconds": 999, "problem": "x", "history_seconds": 0}, set()),
    ],
)
def test_what_is_raised(facts, kinds):
    """History under 85 % and 75 % of what was promised; a young journal is judged by its forecast."""
    assert raised(replace(WELL, **facts)) == kinds


@given(
    st.lists(st.floats(0, 30), min_size=1, max_size=40),
    st.floats(0.5, 60),
)
def test_an_alert_does_not_flicker(lags, interval):
    """Between the limit that clears and the limit that raises, it stays what it was."""
    stands = False
    for lag in lags:
        kinds = frozenset({"lag"}) if stands else frozenset()
        now = "lag" in raised(replace(WELL, lag_seconds=lag, interval_seconds=interval), kinds)
        if lag > 2 * interval:
            assert now
        elif lag <= 1.5 * interval:
            assert not now
        else:
            assert now == stands
        stands = now


def test_every_judgement_says_what_to_do():
    bad = replace(WELL, lag_seconds=None, problem="x", history_seconds=0)
    assert all(j.message and j.remedy for j in judge_target(bad, frozenset()) if j.raised)


def test_the_lag_grows_with_a_report_that_is_stale():
    assert lag_now(3.0, 0, STALE_NS - 1) == 3.0
    assert lag_now(3.0, 0, 60 * SECOND_NS) == 63.0
    assert lag_now(None, 0, 60 * SECOND_NS) is None


def test_links_and_vdsas():
    assert judge_link("site/x", True, 0, STALE_NS + 1).raised
    assert not judge_link("site/x", True, None, STALE_NS + 1).raised
    assert not judge_link("site/x", False, 0, STALE_NS + 1).raised
    assert judge_vdsa("host/x/y", True, False, "").message
    assert not judge_vdsa("host/x/y", False, False, "").raised


@given(st.floats(60, 1e7), st.floats(3600, 1e7), st.integers(0, 1 << 50), st.floats(0.001, 1e9))
def test_the_forecast_is_between_what_is_and_what_was_promised(history, promised, free, rate):
    found = forecast(history, promised, free, rate)
    assert found is not None
    assert min(history, promised) <= found <= promised
    assert forecast(history, promised, None, rate) is None
    assert forecast(1.0, promised, free, rate) is None
    assert forecast(history, promised, free, 0.0) == promised
