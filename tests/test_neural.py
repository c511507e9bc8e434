"""DLinear and PatchTST: what they find in planted signals, where they begin, what they never see."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import mean_pinball_loss
from statsmodels.tsa.seasonal import seasonal_decompose

from spaceexploreai.evaluation import neural
from spaceexploreai.evaluation.learned import split_tail
from spaceexploreai.evaluation.neural import NEURAL, Contexts, DLinear, PatchTST, QuantileForecaster
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries

HORIZONS, LENGTH, FEATURES = [1, 4], 16, 3
LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
BOTH = pytest.mark.parametrize("name", list(NEURAL))
CLASSES = pytest.mark.parametrize("network", [DLinear, PatchTST])


def make_windows(count=4000, slope=0.0, stretch=0.0, seed=0):
    """Windows of 20 tickers: the first feature's mean over the last days moves the mean, that of the second the
    logarithm of the spread; each mean has a standard deviation of 1."""
    generator = np.random.default_rng(seed)
    days = np.datetime64("2010-01-04") + np.arange(count) % (count // 20)
    windows = generator.normal(size=(count, LENGTH, FEATURES)).astype(np.float32)
    known = windows[:, -4:].mean(axis=1) * 2
    shocks = generator.normal(size=(count, len(HORIZONS)))
    targets = slope * known[:, :1] + np.exp(stretch * known[:, 1:2]) * shocks
    return days, windows, targets.astype(np.float32), known


@pytest.fixture
def thorough(monkeypatch):
    """So few windows are seen more often than those of a market."""
    monkeypatch.setattr(neural, "MAX_EPOCHS", 20)
    monkeypatch.setattr(neural, "LEARNING_RATE", 1e-2)


def train(name, days, windows, targets):
    return NEURAL[name](days, windows, targets, HORIZONS, LEVELS)


def forecast(trained, windows, scale=1.0):
    """In units of scale·sqrt(horizon)."""
    mean, quantiles = trained.forecast(windows, np.full(len(windows), scale, dtype=np.float32), LEVELS)
    return mean / np.sqrt(HORIZONS), quantiles / np.sqrt(HORIZONS)[:, None]


# --- the networks ---


def test_dlinear_is_its_formula():
    """Trend and remainder as of statsmodels' moving average, in the middle of the window; then two linear maps."""
    torch.manual_seed(0)
    network = DLinear(80, FEATURES, 4)
    with torch.no_grad():
        network.features.normal_()
        network.bias.normal_()
    window = np.random.default_rng(0).normal(size=(80, FEATURES)).cumsum(axis=0)
    padded = np.pad(window, ((12, 12), (0, 0)), mode="edge")
    trend = np.stack([seasonal_decompose(column, period=25).trend[12:-12] for column in padded.T], axis=1)
    weights = {name: value.detach().double().numpy() for name, value in network.named_parameters()}
    expected = weights["bias"].copy()
    for feature in range(FEATURES):
        through = weights["trend.weight"] @ trend[:, feature] + weights["trend.bias"]
        through += weights["remainder.weight"] @ (window - trend)[:, feature]
        expected += through * weights["features"][feature]
    with torch.no_grad():
        found = network(torch.tensor(window[None], dtype=torch.float32))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@CLASSES
def test_it_begins_as_ewma(network):
    """The quantiles of all training targets, whatever the window says."""
    targets = np.random.default_rng(0).gamma(2, size=(500, 2))
    model = QuantileForecaster(network(LENGTH, FEATURES, 12), targets, LEVELS).eval()
    outputs = model(torch.randn(7, LENGTH, FEATURES))["outputs"].detach()
    expected = np.concatenate([targets.mean(axis=0)[:, None], np.quantile(targets, LEVELS, axis=0).T], axis=1)
    np.testing.assert_allclose(outputs, np.tile(expected, (7, 1, 1)), rtol=1e-5)


@CLASSES
def test_every_step_and_feature_reaches_the_outputs(network):
    torch.manual_seed(0)
    model = QuantileForecaster(network(LENGTH, FEATURES, 12), np.zeros((9, 2)), LEVELS).eval()
    with torch.no_grad():
        for weight in model.network.parameters():
            weight += 0.1 * torch.randn_like(weight)
    past = torch.randn(1, LENGTH, FEATURES, requires_grad=True)
    model(past)["outputs"].square().sum().backward()
    assert (past.grad != 0).all()


def test_the_loss_is_squared_error_and_pinball():
    generator = np.random.default_rng(0)
    model = QuantileForecaster(DLinear(LENGTH, FEATURES, 12), generator.normal(size=(50, 2)), LEVELS)
    labels = generator.normal(size=(8, 2)).astype(np.float32)
    out = model(torch.randn(8, LENGTH, FEATURES), torch.from_numpy(labels))
    outputs = out["outputs"].detach().numpy()
    pinball = [
        mean_pinball_loss(labels[:, h], outputs[:, h, 1 + q], alpha=level)
        for h in range(2)
        for q, level in enumerate(LEVELS)
    ]
    assert out["loss"].item() == pytest.approx(np.mean((labels - outputs[..., 0]) ** 2) + np.mean(pinball), rel=1e-5)


@pytest.mark.parametrize("length", [5, 16, 40, 64])
@CLASSES
def test_any_context_length_will_do(network, length):
    assert network(length, 2, 6)(torch.randn(3, length, 2)).shape == (3, 6)


# --- training ---


@BOTH
def test_a_planted_slope_is_found_with_its_sign_and_size(name, thorough):
    days, windows, targets, _ = make_windows(count=5000, slope=0.7)
    _, new, _, known = make_windows(count=1000, slope=0.7, seed=1)
    mean, quantiles = forecast(train(name, days, windows, targets), new)
    for column in range(len(HORIZONS)):
        assert np.polyfit(known[:, 0], mean[:, column], 1)[0] == pytest.approx(0.7, abs=0.15)
        assert np.corrcoef(known[:, 0], mean[:, column])[0, 1] > 0.9
    np.testing.assert_allclose((quantiles - mean[..., None]).mean(axis=(0, 1)), norm.ppf(LEVELS), atol=0.15)


@BOTH
def test_noise_teaches_nearly_nothing(name):
    days, windows, targets, _ = make_windows(count=2000)
    mean, quantiles = forecast(train(name, days, windows, targets), make_windows(count=500, seed=1)[1])
    assert np.abs(mean).mean() < 0.1
    assert np.abs(quantiles - norm.ppf(LEVELS)).mean() < 0.15


def test_a_planted_volatility_is_found(thorough, monkeypatch):
    """By width alone; a straight line is not an exponential."""
    days, windows, targets, _ = make_windows(count=8000, stretch=0.3)
    _, new, _, known = make_windows(count=1000, seed=1)
    monkeypatch.setattr(neural, "LEARNING_RATE", 3e-2)
    _, quantiles = forecast(train("dlinear", days, windows, targets), new)
    width = (quantiles[..., -1] - quantiles[..., 0]).mean(axis=1) / (2 * norm.ppf(0.95))
    assert np.polyfit(known[:, 1], width, 1)[0] == pytest.approx(0.3, abs=0.1)


@BOTH
def test_training_is_reproducible_and_leaves_random_numbers_alone(name):
    days, windows, targets, _ = make_windows(count=1000, slope=0.3)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = forecast(train(name, days, windows, targets), windows[:50])
    assert torch.rand(1) == expected
    second = forecast(train(name, days, windows, targets), windows[:50])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@BOTH
def test_the_tail_chooses_and_the_purged_days_are_not_seen(name, monkeypatch):
    days, windows, targets, _ = make_windows(count=1000)
    fit, tail = split_tail(days, max(HORIZONS))
    seen = []
    examples = neural._Examples

    def spy(windows, targets, rows):
        seen.append(rows)
        return examples(windows, targets, rows)

    monkeypatch.setattr(neural, "_Examples", spy)
    train(name, days, windows, targets)
    np.testing.assert_array_equal(seen[0], np.flatnonzero(fit))
    np.testing.assert_array_equal(seen[1], np.flatnonzero(tail))


def test_the_epoch_that_serves_the_tail_is_kept(thorough):
    """There the slope turns round: no training is the best that can be chosen, and a long one the worst."""
    days, windows, targets, known = make_windows(slope=1.0)
    _, tail = split_tail(days, max(HORIZONS))
    targets[tail] -= 2 * known[tail, :1]
    trained = train("dlinear", days, windows, targets)
    short = np.polyfit(known[:, 0], forecast(trained, windows)[0][:, 0], 1)[0]
    targets[tail] += 2 * known[tail, :1]
    long = np.polyfit(known[:, 0], forecast(train("dlinear", days, windows, targets), windows)[0][:, 0], 1)[0]
    assert short < 0.7 * long


def test_the_number_of_windows_is_bounded(monkeypatch):
    monkeypatch.setattr(neural, "MAX_WINDOWS", 1000)
    monkeypatch.setattr(neural, "MAX_EPOCHS", 1)
    read = set()

    class Spy(list):
        def __getitem__(self, index):
            read.add(index)
            return super().__getitem__(index)

    days, windows, targets, _ = make_windows()
    train("dlinear", days, Spy(windows), targets)
    assert 800 < len(read) <= 1001


# --- forecasts ---


@pytest.fixture(scope="module")
def trained():
    days, windows, targets, _ = make_windows(count=2000)
    return train("dlinear", days, windows, targets)


def test_forecasts_have_the_unit_of_the_scale_and_do_not_cross(trained):
    with torch.no_grad():
        trained.model.network.features.normal_()  # so that raw outputs cross
    windows = make_windows(count=300, seed=2)[1]
    raw = trained.model(torch.from_numpy(windows))["outputs"].detach().numpy()
    assert (np.diff(raw[..., 1:], axis=-1) < 0).any()
    mean, quantiles = forecast(trained, windows)
    np.testing.assert_allclose(mean, raw[..., 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(quantiles, np.sort(raw[..., 1:], axis=-1), rtol=1e-5, atol=1e-6)
    assert (mean.shape, quantiles.shape) == ((300, 2), (300, 2, 5))
    for one, other in zip(forecast(trained, windows, scale=0.02), (mean, quantiles), strict=True):
        np.testing.assert_allclose(one, 0.02 * other, rtol=1e-5, atol=1e-7)


def test_other_levels_are_refused(trained):
    with pytest.raises(
        ValueError, match=r"trained at the levels \[0.05, 0.25, 0.5, 0.75, 0.95\], not at \[0.1, 0.9\]"
    ):
        trained.forecast(make_windows(count=40)[1], np.ones(40), [0.1, 0.9])


@BOTH
def test_mistakes_are_refused(name):
    days, windows, targets, _ = make_windows(count=800)
    with pytest.raises(ValueError, match="learned baselines need 100 steps"):
        train(name, days[::4], windows[::4], targets[::4])
    targets[17, 1] = np.nan
    with pytest.raises(ValueError, match="target nan in row 17, column 1"):
        train(name, days, windows, targets)


def test_contexts_are_windows_of_the_histories():
    """The last step is that of the place; zero where nothing is known and before the history begins."""
    values = np.random.default_rng(0).normal(size=(30, FEATURES)).astype(np.float32)
    values[12] = np.nan
    dates = np.arange("2020-01-01", "2020-01-31", dtype="datetime64[D]").astype("datetime64[ns]")
    one = EncodedSeries("AAA", dates, np.ones(30), values, np.ones(30, np.float32))
    contexts = Contexts([one, one._replace(values=-values)], np.array([[0, 20], [1, 20], [0, 3]]), 10)
    assert len(contexts) == 3
    np.testing.assert_array_equal(contexts[0], np.nan_to_num(values[11:21]))
    np.testing.assert_array_equal(contexts[1], -np.nan_to_num(values[11:21]))
    assert (contexts[2][:6] == 0).all()
    np.testing.assert_array_equal(contexts[2][6:], values[:4])
