"""What needs an NVIDIA GPU: real kernels against the definition. `make test-gpu` runs these alone.

Where there is no GPU each is skipped by name; `make test` leaves the folder out.
"""

import numpy as np
import pytest
import torch

from goatviz.analysis import implied_prior, sink_effect, sink_profile
from goatviz.analysis.signal import signal_correlation
from goatviz.attention import BACKENDS, LayerCache, prior_attention
from goatviz.models import CausalLM, ModelConfig, goat_prior
from goatviz.priors import ALiBiPrior, BucketPrior
from goatviz.tasks import Needle
from goatviz.training import Execution, OutOfTime, TrainConfig, train
from goatviz.transport import incoming_mass, row_statistics

LENGTH = 700
HALF = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def goat(heads=2):
    prior = goat_prior(heads, rank=4, sink_rank=4, training_length=256)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    return prior.cuda()


def draw(queries=LENGTH, *, dtype=torch.float32, gradients=False):
    shapes = ((4, queries, 55), (2, LENGTH, 55), (2, LENGTH, 64))
    drawn = [torch.randn(2, *shape, device="cuda").to(dtype) for shape in shapes]
    return [each.requires_grad_(gradients) for each in drawn]


def serves(name, dtype):
    """Skip a backend that cannot run here, or not with that dtype."""
    if (reason := BACKENDS[name].hindrance()) is not None:
        pytest.skip(f"{name}: {reason}")
    if dtype not in HALF and name in ("flash", "sdpa_flash", "sdpa_cudnn"):
        pytest.skip(f"{name} takes half precision")


def close(ours, wanted, dtype):
    assert ours.dtype == dtype
    error = (ours.double() - wanted.double()).norm() / wanted.double().norm()
    assert float(error) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("queries", [LENGTH, 64, 1])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_a_backend_is_the_definition(name, queries, dtype):
    serves(name, dtype)
    for prior in (goat(), ALiBiPrior(2).cuda(), None):
        tensors = draw(queries, dtype=dtype)
        if queries not in (LENGTH, 1) and name in ("sdpa_flash",):
            pytest.skip("PyTorch's FlashAttention takes no mask, which a part of the queries needs")
        with torch.no_grad():
            out = prior_attention(*tensors, prior=prior, impl=name)
            wanted = prior_attention(*tensors, prior=prior, impl="reference")
        close(out, wanted, dtype)


@pytest.mark.parametrize("name", ["sdpa", "sdpa_flash", "sdpa_efficient", "flex", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_definition(name, dtype):
    serves(name, dtype)
    prior, tensors = goat(), draw(dtype=dtype, gradients=True)
    leaves = [*tensors, *prior.parameters()]
    gradients = {}
    for impl in (name, "reference"):
        out = prior_attention(*tensors, prior=prior, impl=impl)
        gradients[impl] = torch.autograd.grad(out.float().square().sum(), leaves)
    for ours, wanted in zip(gradients[name][:3], gradients["reference"][:3], strict=True):
        close(ours, wanted, dtype)
    for ours, wanted in zip(gradients[name][3:], gradients["reference"][3:], strict=True):
        scale = float(wanted.double().norm()) + 1e-6
        assert float((ours.double() - wanted.double()).norm()) <= 5 * TOLERANCE[dtype] * scale


@pytest.mark.parametrize("settings", [{"window": 129}, {"softcap": 2.0}], ids=str)
def test_flex_has_windows_softcaps_and_buckets(settings):
    prior = BucketPrior(2).cuda()
    torch.nn.init.normal_(prior.table)
    tensors = draw()
    with torch.no_grad():
        out = prior_attention(*tensors, prior=prior, impl="flex", **settings)
        wanted = prior_attention(*tensors, prior=prior, impl="reference", **settings)
    close(out, wanted, torch.float32)


@pytest.mark.parametrize("impl", ["blockwise", "fused"])
def test_statistics_are_those_of_the_definition(impl):
    q, k, _ = draw()
    prior = goat().requires_grad_(False)
    rows = row_statistics(q, k, prior=prior, impl=impl)
    wanted = row_statistics(q, k, prior=prior, impl="reference")
    for name in ("log_normaliser", "entropy", "kl_to_prior", "expected_log_prior"):
        torch.testing.assert_close(
            getattr(rows, name).cpu().double(),
            getattr(wanted, name).cpu().double(),
            rtol=1e-3,
            atol=1e-3,
        )
    mass = incoming_mass(q, k, prior=prior, impl=impl)
    wanted = incoming_mass(q, k, prior=prior, impl="reference")
    torch.testing.assert_close(mass.cpu().double(), wanted.cpu().double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positions", ["goat", "rope", "alibi"])
def test_a_compiled_training_step_is_the_eager_step(positions):
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig(vocab_size=64, training_length=256, embed_dim=128, positions=positions)
    ).cuda()
    ids = torch.randint(64, (4, 256), device="cuda")

    def gradients(run):
        model.zero_grad(set_to_none=True)
        logits = run(ids)[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    wanted = gradients(model)
    for name, ours in gradients(torch.compile(model, fullgraph=True)).items():
        torch.testing.assert_close(ours, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def test_cached_decoding_is_the_full_pass():
    torch.manual_seed(0)
    layer = CausalLM(ModelConfig(vocab_size=64, training_length=64, embed_dim=128)).cuda().eval()
    layer = layer.blocks[0].attention
    x, cache = torch.randn(2, 200, 128, device="cuda"), LayerCache()
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split([100, *[1] * 100], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-4, atol=1e-4)


MEASURES = {
    "importance": lambda model, ids: sink_profile(model, ids, layers=[1]),
    "correlation": signal_correlation,
    "mean_increase": lambda model, ids: sink_effect(model, ids, per_layer=False),
    "sink": lambda model, ids: implied_prior(model, ids, layers=[1]),
}


@pytest.mark.parametrize("field", list(MEASURES))
@pytest.mark.parametrize("positions", ["goat", "rope", "alibi"])
def test_measures_are_those_of_a_cpu(positions, field):
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "num_layers": 2, "training_length": 64}
    model = CausalLM(ModelConfig(vocab_size=64, positions=positions, **sizes)).eval()
    ids = torch.randint(64, (4, 64))
    wanted = MEASURES[field](model, ids)[field].values
    ours = MEASURES[field](model.cuda(), ids.cuda())[field].values
    # Rounding may swap two ranks.
    tolerance = 5e-2 if field == "correlation" else 1e-3
    np.testing.assert_allclose(ours, wanted, rtol=1e-2, atol=tolerance)


@pytest.mark.parametrize("positions", ["goat", "rope", "alibi", "sinusoidal"])
def test_a_run_in_half_precision_is_stopped_and_goes_on(positions, tmp_path):
    task = Needle(length=64, value_length=4)
    config = TrainConfig(task=task, positions=positions, steps=6, batch_size=16, warmup=2)
    half = {"execution": Execution(device="cuda", mixed_precision="bf16"), "progress": False}
    whole = train(config, **half)
    state = {"state": tmp_path / "run.safetensors", "tensorboard": False}
    with pytest.raises(OutOfTime, match="stopped at step 1 of 6"):
        train(config, **half, **state, minutes=1e-9)
    resumed = train(config, **half, **state, resume=True)
    losses = ([entry["loss"] for entry in run.history] for run in (resumed, whole))
    np.testing.assert_allclose(*losses, rtol=1e-2)
