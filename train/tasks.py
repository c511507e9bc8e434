"""What each head is trained on, where it starts, and what is measured on the validation dates."""

import math
from functools import cached_property, partial

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import PathCollator, collate_windows
from spaceexploreai.data.stocks import PathWindows, ReturnsWindows, StockData
from spaceexploreai.data.windows import IGNORE_INDEX
from spaceexploreai.evaluation.metrics import crps, crps_skill, direction_accuracy, mae
from spaceexploreai.evaluation.ranking import rank_ic
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreForCausalLM,
    SpaceExploreForClassification,
    SpaceExploreForRegression,
    SpaceExploreForTimeToText,
)
from spaceexploreai.t2t_spaceexplore import WORDS, word_labels
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.arguments import CommonArguments
from spaceexploreai.train.trainer import SpaceExploreTrainer, TimeToTextTrainer

# Shapes: N windows, S scored steps of each, H horizons, Q quantiles, V tokens, P patches, L steps of a patch, W words


class Task:
    """One head: its class, data, starting point and metrics.

    Args:
        config: of the network.
        data: windows to train on and to choose by.
        objective: our options of the run.

    Attributes:
        train, validation: map-style datasets.
        collate: examples to the arguments of the head.
    """

    head: type[PreTrainedModel]
    trainer: type[SpaceExploreTrainer] = SpaceExploreTrainer
    script = "train/sft.py"
    tokenizer: SpaceExploreTokenizer | None = None

    def __init__(self, config: SpaceExploreConfig, data: StockData, objective: CommonArguments):
        self.config, self.horizons = config, list(config.horizons)
        self.train, self.validation = data.train, data.validation
        self.collate = partial(collate_windows, length=data.extractor.context_length)
        self.targets = data.train.scaled_targets(self.horizons)  # (N, H)
        self.steps, self.dates, self.scale = scored_steps(data)

    @classmethod
    def fields(cls) -> dict:
        """What the head needs of a new network's configuration."""
        return {}

    def start(self, model: PreTrainedModel) -> None:
        """Puts the biases of a new head where they predict the marginal distribution of the targets."""

    def reduce(self, outputs, labels: torch.Tensor):
        """What is kept of a batch's outputs in evaluation."""
        raise NotImplementedError

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of the validation windows."""
        raise NotImplementedError

    def each_horizon(self, labels: np.ndarray):
        """Per horizon its column, name, and which of the (N, S) steps have a label, that label and its date."""
        labels = labels[:, -self.steps :]
        for column, horizon in enumerate(self.horizons):
            known = labels[..., column] != IGNORE_INDEX
            yield column, f"{horizon}d", known, labels[..., column][known].astype(np.float64), self.dates[known]

    def typical(self, column: int) -> np.ndarray:
        """(N, S) size of a typical move."""
        return self.scale * np.sqrt(self.horizons[column])


def scored_steps(data: StockData) -> tuple[int, np.ndarray, np.ndarray]:
    """How many steps S at the end of a validation window are scored at most, and their (N, S) dates and scales."""
    rows = data.validation.rows
    steps = int((rows[:, 2] + 1 - rows[:, 3]).max())
    dates = np.full((len(rows), steps), np.datetime64("NaT"), dtype="datetime64[ns]")
    scale = np.ones((len(rows), steps), dtype=np.float32)
    for row, (which, _, last, _) in enumerate(rows.tolist()):
        history = data.validation.series.steps(which, max(last + 1 - steps, 0), last + 1)
        dates[row, -len(history.dates) :], scale[row, -len(history.scale) :] = history.dates, history.scale
    return steps, dates, scale


class Regression(Task):
    head = SpaceExploreForRegression

    @property
    def levels(self) -> np.ndarray:
        return np.array(self.config.quantile_levels)

    def marginal(self) -> np.ndarray:
        """(H, Q) quantiles of the training targets: with the scale they are the EWMA baseline."""
        return np.quantile(self.targets, self.levels, axis=0).T.astype(np.float32)

    def start(self, model: SpaceExploreForRegression) -> None:
        model.start_from_marginal(torch.from_numpy(self.targets.mean(axis=0)), torch.from_numpy(self.marginal()))

    def reduce(self, outputs, labels):
        return tuple(output[:, -self.steps :] for output in outputs[:2])  # mean, quantiles

    def score(self, prediction):
        mean, quantiles = prediction.predictions
        marginal, metrics = self.marginal(), {}
        for column, name, known, y, dates in self.each_horizon(prediction.label_ids):
            expected, forecast = mean[..., column][known], quantiles[:, :, column][known]
            baseline = self.typical(column)[known][:, None] * marginal[column]
            error = crps(y, forecast, self.levels)
            metrics |= {
                f"crps_{name}": error,
                f"crps_skill_{name}": crps_skill(error, crps(y, baseline, self.levels)),
                f"mae_{name}": mae(y, expected),
                f"direction_{name}": direction_accuracy(y, expected),
                f"rank_ic_{name}": rank_ic(y, expected, dates),
            }
        return with_average(metrics, "crps_skill")


class Classification(Task):
    head = SpaceExploreForClassification

    def classes(self, labels: np.ndarray, move: np.ndarray) -> np.ndarray:
        band = self.config.flat_band * move
        return 1 + (labels > band).astype(int) - (labels < -band).astype(int)

    def frequencies(self) -> np.ndarray:
        """(H, 3) shares of the classes in the training targets."""
        classes = self.classes(self.targets, np.ones_like(self.targets))
        return np.stack([(classes == one).mean(axis=0) for one in range(self.config.num_labels)], axis=1)

    @torch.no_grad()
    def start(self, model: SpaceExploreForClassification) -> None:
        model.score.bias.copy_(torch.from_numpy(np.log(self.frequencies().clip(1e-6))).flatten())

    def reduce(self, outputs, labels):
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return logits[:, -self.steps :]

    def score(self, prediction):
        log_shares, metrics = np.log(self.frequencies().clip(1e-6)), {}
        log_probabilities = F.log_softmax(torch.from_numpy(prediction.predictions).float(), dim=-1).numpy()
        for column, name, known, y, dates in self.each_horizon(prediction.label_ids):
            true = self.classes(y, self.typical(column)[known])
            forecast = log_probabilities[:, :, column][known]
            loss = -forecast[np.arange(len(true)), true].mean()
            probabilities = np.exp(forecast)
            metrics |= {
                f"log_loss_{name}": loss,
                f"log_loss_skill_{name}": 1 - loss / -log_shares[column][true].mean(),
                f"accuracy_{name}": (forecast.argmax(axis=1) == true).mean(),
                f"base_rate_{name}": np.bincount(true, minlength=3).max() / len(true),
                f"rank_ic_{name}": rank_ic(y, probabilities[:, 2] - probabilities[:, 0], dates),
            }
        return with_average(metrics, "log_loss_skill")


class CausalLM(Task):
    """Next-day returns as tokens: at every step of the context, and along the path that followed."""

    head = SpaceExploreForCausalLM
    tokenizer = SpaceExploreTokenizer()

    def __init__(self, config, data, objective):
        super().__init__(config, data, objective)
        context_length, path_length = data.extractor.context_length, objective.path_length
        paths = partial(PathWindows, horizons=self.horizons, context_length=context_length, path_length=path_length)
        self.train, self.validation = paths(data.train), paths(data.validation)
        self.collate = PathCollator(self.tokenizer, context_length, path_length)

    @classmethod
    def fields(cls):
        return {"vocab_size": len(cls.tokenizer)}

    def reduce(self, outputs, labels):
        """(N, S, 2) log-loss of each token and the expected return in units of volatility; NaN where there is none."""
        logits = (outputs[0] if isinstance(outputs, tuple) else outputs)[:, :-1].float()
        targets = labels[:, 1:]
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        first = self.tokenizer.return_token_ids.start
        centers = torch.tensor(self.tokenizer.centers, device=logits.device, dtype=torch.float)
        expected = logits[..., first:].softmax(dim=-1) @ centers
        return torch.stack([loss, expected], dim=-1).masked_fill((targets == IGNORE_INDEX).unsqueeze(-1), torch.nan)

    def score(self, prediction):
        loss, expected = prediction.predictions[..., 0], prediction.predictions[..., 1]
        known = np.isfinite(loss) & (prediction.label_ids[:, 1:] != IGNORE_INDEX)
        tokens = prediction.label_ids[:, 1:][known]
        realised = self.tokenizer.decode_returns(tokens)
        loss = float(loss[known].mean())
        return {
            "log_loss": loss,
            "log_loss_skill": 1 - loss / float(-np.log(self.shares())[tokens].mean()),
            "direction": direction_accuracy(realised, expected[known]),
            "correlation": float(np.corrcoef(realised, expected[known])[0, 1]),
        }

    def shares(self) -> np.ndarray:
        """(V,) shares of the tokens among the training targets of one day, none of them zero."""
        one_day = self.targets[:, self.horizons.index(1)]
        tokens = self.tokenizer.encode_returns(one_day.astype(np.float64), 1.0)
        counts = np.bincount(tokens, minlength=len(self.tokenizer)) + 1.0
        return counts / counts.sum()


class TimeToText(Task):
    """The values of hidden patches, and the words of the visible ones: training of the extractor, `train/t2t.py`."""

    head = SpaceExploreForTimeToText
    trainer = TimeToTextTrainer
    script = "train/t2t.py"

    def __init__(self, config, data, objective):
        self.config, self.word_embeddings = config, objective.word_embeddings
        self.train, self.validation = ReturnsWindows(data.train), ReturnsWindows(data.validation)
        self.collate = partial(collate_windows, length=data.extractor.context_length)
        for name in ("train", "validation"):
            self.check_patches(name, getattr(self, name).rows)

    @property
    def stride(self) -> int:
        return self.config.t2t_patch_length - self.config.t2t_patch_overlap

    def check_patches(self, name: str, rows: np.ndarray) -> None:
        longest = int((rows[:, 2] - rows[:, 1]).max()) + 1
        length, ratio = self.config.t2t_patch_length, self.config.t2t_mask_ratio
        count = 1 + max(0, math.ceil((longest - length) / self.stride))
        if count == max(1, round(count * (1 - ratio))):
            raise ValueError(
                f"{longest} days, the longest window of {name}, leave nothing to hide: t2t_mask_ratio {ratio} of "
                f"{count} patches of t2t_patch_length {length}"
            )

    def start(self, model):
        if self.word_embeddings is not None:
            model.model.t2t.load_word_embeddings(self.word_embeddings)

    def reduce(self, outputs, labels):
        """(N, 4) number of hidden steps, and sum over them of the squared errors of the network, of zero, and of the
        mean of the visible steps; (N, P, W) log-probabilities of the words, NaN of hidden patches."""
        reconstruction, word_logits, visible, patches, real, hidden = outputs
        shown = (real & visible.unsqueeze(-1)).unsqueeze(-1)
        mean = (patches * shown).sum((1, 2), keepdim=True) / shown.sum((1, 2), keepdim=True)
        guesses = torch.stack([reconstruction, torch.zeros_like(patches), mean.expand_as(patches)]).float()
        errors = torch.where(hidden, (guesses - patches).square().mean(-1), 0.0).sum((2, 3))  # (3, N)
        log_probabilities = F.log_softmax(word_logits.float(), dim=-1)
        sums = torch.cat([hidden.sum((1, 2)).unsqueeze(0), errors]).T
        return sums, log_probabilities.masked_fill(~visible.unsqueeze(-1), torch.nan)

    def score(self, prediction):
        sums, log_probabilities = prediction.predictions
        count, *errors = sums.sum(axis=0, dtype=np.float64)
        network, zero, mean = (error / max(count, 1) for error in errors)
        words = self.words(prediction.label_ids)
        known = (words != IGNORE_INDEX) & np.isfinite(log_probabilities[..., 0])
        words, log_probabilities = words[known], log_probabilities[known].astype(np.float64)
        loss = -log_probabilities[np.arange(len(words)), words].mean()
        metrics = {
            "reconstruction": network,
            "reconstruction_of_zero": zero,
            "reconstruction_of_mean": mean,
            "reconstruction_skill": 1 - network / min(zero, mean),
            "word_log_loss": loss,
            "word_log_loss_skill": 1 - loss / -np.log(self.shares)[words].mean(),
            "word_accuracy": (log_probabilities.argmax(axis=1) == words).mean(),
            "word_base_rate": np.bincount(words, minlength=len(WORDS)).max() / max(len(words), 1),
        }
        return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}

    def words(self, returns: np.ndarray) -> np.ndarray:
        """(N, T) returns to (N, P) indices of words."""
        return word_labels(torch.from_numpy(returns), None, self.config.t2t_patch_length, self.stride).numpy()

    @cached_property
    def shares(self) -> np.ndarray:
        """(W,) shares of the words in the histories trained on, none of them zero."""
        counts, rows = np.ones(len(WORDS)), self.train.rows
        for which in np.unique(rows[:, 0]).tolist():
            own = rows[rows[:, 0] == which]
            returns = self.train.cut(which, own[:, 1].min(), own[:, 2].max() + 1)["returns"]
            words = self.words(returns[None])
            counts += np.bincount(words[words != IGNORE_INDEX], minlength=len(WORDS))
        return counts / counts.sum()


def with_average(metrics: dict[str, float], name: str) -> dict[str, float]:
    """Adds the mean over the horizons, by which a checkpoint can be chosen; without what is undefined, as is the rank
    correlation of a few tickers."""
    average = np.mean([metrics[key] for key in metrics if key.startswith(f"{name}_")])
    return {key: float(value) for key, value in {name: average, **metrics}.items() if np.isfinite(value)}


TASKS: dict[str, type[Task]] = {
    "regression": Regression,
    "classification": Classification,
    "causal_lm": CausalLM,
    "time_to_text": TimeToText,
}
