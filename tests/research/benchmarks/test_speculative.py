"""Speculative decoding beside plain decoding: what is counted, and how a speed-up is read off."""

import pytest

from research.benchmarks.speculative import PLAIN, Timing, compare, speed_up
from research.sampling.drafts import NGramDraft
from research.sampling.speculative import Draft, SpeculativeSpec
from tests.models.tiny import ONE_LAYER, make_params, make_tokens
from tests.research.sampling.tiny import GREEDY, make_spec, scalars

pytestmark = pytest.mark.slow


def test_every_prompt_is_timed_with_every_contender() -> None:
    params = make_params(ONE_LAYER)
    contenders = {
        "itself": Draft(params, SpeculativeSpec(ONE_LAYER, 3)),
        "ngram": Draft(None, SpeculativeSpec(NGramDraft(), 2)),
    }
    found = compare(
        params,
        list(make_tokens(ONE_LAYER, 3, 6)),
        contenders,
        scalars(),
        config=ONE_LAYER,
        spec=make_spec(8, method=GREEDY),
    )
    assert list(found) == [PLAIN, "itself", "ngram"]
    for timing in found.values():
        assert timing.tokens == (8, 8, 8)
        assert len(timing.seconds) == 3 and min(timing.seconds) > 0
    assert found[PLAIN].metrics == {}
    # All three prompts together: two forward passes each, every proposal right.
    assert found["itself"].metrics == {
        "sampler/target_forwards": 6.0,
        "sampler/acceptance_rate": 1.0,
        "sampler/tokens_per_forward": 4.0,
    }


def test_a_speed_up_is_a_ratio_of_rates() -> None:
    """Of the medians, and the median of what each prompt says."""
    timings = {
        PLAIN: Timing((1.0, 2.0, 4.0), (8, 8, 8), {}),
        "other": Timing((0.5, 0.5, 4.0), (8, 4, 8), {}),
    }
    assert timings[PLAIN].rate() == 4.0
    assert speed_up(timings[PLAIN], timings["other"]) == (pytest.approx(8.0 / 4.0), pytest.approx(2.0))
    timings["other"] = Timing((0.25, 2.0, 1.0), (8, 8, 8), {})
    assert speed_up(timings[PLAIN], timings["other"]) == (pytest.approx(8.0 / 4.0), pytest.approx(4.0))
