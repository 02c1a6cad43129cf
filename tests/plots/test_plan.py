"""What the figure of a plan shows is what the slice holds."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from goatviz.analysis import plan_slice
from goatviz.figures import plot_plan
from goatviz.models import CausalLM, ModelConfig
from goatviz.plots import draw_plan
from goatviz.transport import solve_rows

HOSTILE = ["the", "the", "<s>", "</script>", "<b>", "日本"]


def trace(figure, name):
    """The one trace of a name, its arrays as plotly gets them."""
    (found,) = [each for each in figure.data if each.name == name]
    return found


def causal_plan(n):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return solve_rows(scores, mask=torch.ones(n, n, dtype=torch.bool).tril())


def test_maps_are_the_slice():
    result = plan_slice(causal_plan(20))
    figure = draw_plan(result)
    go.Figure(figure.to_dict())  # plotly knows every setting
    allowed = result["allowed"].values
    for name, field in (("score", "scores"), ("prior", "prior"), ("weight", "weights")):
        wanted = np.where(allowed, result[field].values, np.nan).astype(np.float32)
        np.testing.assert_array_equal(trace(figure, name).z, wanted)
    incoming = trace(figure, "incoming mass").y
    np.testing.assert_array_equal(incoming, result["incoming_mass"].values.astype(np.float32))


def test_pooling_conserves_mass():
    result = plan_slice(causal_plan(300), check=False)
    figure = draw_plan(result)
    for name in ("prior", "weight"):
        z = np.asarray(trace(figure, name).z)
        assert z.shape == (160, 160)
        np.testing.assert_allclose(np.nansum(z, axis=1), 1.0, atol=1e-5)
    assert np.sum(trace(figure, "incoming mass").y) == pytest.approx(1.0, abs=1e-5)
    assert any("Pooled from 300 × 300" in a.text for a in figure.layout.annotations)


def test_the_caption_carries_certificates_and_verdict():
    figure = plot_plan(causal_plan(8))
    caption = figure.layout.annotations[-1].text.replace("<br>", " ")
    for words in ("KKT residual", "duality gap", "POT", "semi-relaxed agrees", "balanced agrees"):
        assert words in caption
    unchecked = plot_plan(causal_plan(8), check=False).layout.annotations[-1].text
    assert "Not checked against POT" in unchecked.replace("<br>", " ")


def test_hostile_tokens_are_text():
    figure = plot_plan(causal_plan(6), tokens=HOSTILE, check=False)
    axes = [axis for axis in figure.select_yaxes() if axis.ticktext]
    axes += [axis for axis in figure.select_xaxes() if axis.ticktext]
    assert len(axes) == 7
    escaped = ["the", "the", "&lt;s&gt;", "&lt;/script&gt;", "&lt;b&gt;", "日本"]
    for axis in axes:
        shown = [escaped[at] for at in axis.tickvals]
        assert list(axis.ticktext) == shown and axis.tickvals[-1] == 5
    for name in ("score", "prior", "weight"):
        kind = np.asarray(trace(figure, name).x).dtype.kind
        assert kind == "i", "token texts must never be coordinates"
    assert (
        "</script>"
        not in figure.to_html(include_plotlyjs=False, full_html=False)
        .replace("</script>        </div>", "")
        .replace('"></script>', "")
        .split("Plotly.newPlot")[1]
        .split("</script>")[0]
    )


def test_a_model_draws_in_one_call():
    model = CausalLM(ModelConfig(vocab_size=8, training_length=32, num_layers=2))
    figure = plot_plan(model, torch.zeros(1, 12, dtype=torch.long), layer=1, head=1)
    assert "layer 1 (blocks.1.attention), head 1" in figure.layout.title.subtitle.text
    with pytest.raises(TypeError, match="must not be given|neither inputs nor options"):
        plot_plan(plan_slice(causal_plan(4)), layer=1)


def test_weights_alone_have_no_panels_of_what_nobody_knows():
    figure = plot_plan(torch.eye(4))
    assert [t.name for t in figure.data] == ["weight", "probability bar", "incoming mass"]
    caption = figure.layout.annotations[-1].text.replace("<br>", " ")
    assert "not known" in caption and "KKT" not in caption
