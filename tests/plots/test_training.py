"""The training figure draws what the log holds."""

import numpy as np
import pytest

from goatviz.plots import draw_training
from goatviz.results import TRAINING_LOG, make_result


def a_log():
    return make_result(
        TRAINING_LOG,
        {
            "loss": np.array([[2.0, np.nan, 1.0], [4.0, 3.0, 2.5]]),
            "learning_rate": np.array([[0.1, np.nan, 0.2], [0.3, 0.2, 0.1]]),
            "held_out": np.array([1.25, np.nan]),
            "held_out_standard_error": np.array([0.5, np.nan]),
        },
        coords={"run": ["goat", "<b>"], "step": [1, 3, 9]},
    )


def test_lines_are_the_log_and_skip_what_was_not_logged():
    figure = draw_training(a_log())
    losses = [t for t in figure.data if t.yaxis == "y"]
    rates = [t for t in figure.data if t.yaxis == "y2"]
    assert [t.name for t in losses] == ["goat (held out 1.2500 ± 0.5000)", "&lt;b&gt;"]
    assert losses[0].x.tolist() == [1, 3, 9][::2] and losses[0].y.tolist() == [2.0, 1.0]
    assert losses[1].y.tolist() == [4.0, 3.0, 2.5]
    np.testing.assert_allclose(rates[1].y, [0.3, 0.2, 0.1], rtol=1e-6)
    assert [t.showlegend for t in rates] == [False, False]
    assert {t.line.color for t in (losses[0], rates[0])} == {losses[0].line.color}
    assert figure.layout.xaxis2.title.text == "step"
    assert figure.layout.yaxis.title.text == "loss [nats]"


def test_other_results_are_refused():
    with pytest.raises(TypeError, match="expected a training_log Dataset, got dict"):
        draw_training({})
