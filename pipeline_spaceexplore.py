# Copyright 2026 The SpaceExploreAI contributors. Licensed under the MIT License.
"""Daily bars to a forecast in one call: `transformers.pipeline` of a checkpoint whose head forecasts prices."""

# Shapes: N tickers, K samples of each, H horizons, D days to the last of them, Q quantile levels

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines.base import ChunkPipeline

from .feature_extraction_spaceexplore import following_sessions, in_prices, quantile_columns
from .paths_spaceexplore import (
    brownian_paths,
    draw_shocks,
    forecast_of_samples,
    interpolate_horizons,
    interpolate_levels,
    sample_paths,
)

TASK = "time-series-forecasting"
# By name: a class that was loaded from a repository is not the package's own.
REGRESSION, CLASSIFICATION, LANGUAGE = HEADS = (
    "SpaceExploreForRegression",
    "SpaceExploreForClassification",
    "SpaceExploreForCausalLM",
)
UNITS = ("price", "log_return")
NUM_SAMPLES = 64  # that the table of a language model is made of when no paths are asked for
BATCH_SIZE = 16  # tickers at a time: more are no faster on a CPU
ONE_SERIES = "series"  # ticker of a table without that column


class Forecast(NamedTuple):
    """The forecast table, and the closes of sampled paths, if any: `ticker, sample, date, close`."""

    table: pd.DataFrame
    paths: pd.DataFrame | None


class SpaceExplorePipeline(ChunkPipeline):
    """
    Forecasts the trading days after the newest bar of each ticker.

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("time-series-forecasting", model=folder, trust_remote_code=True)
    >>> table = pipe(prices)
    >>> table, paths = pipe(prices, prediction_length=5, num_samples=100, seed=0)
    ```

    What a call takes, `pipeline` takes too, for all calls.
    """

    _load_feature_extractor = True
    _load_tokenizer = None  # a language model alone has one
    _load_image_processor = _load_video_processor = _load_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"batch_size": BATCH_SIZE, **kwargs})
        self.head = head_of(self.model)
        if self.head != LANGUAGE:
            self.tokenizer = None  # the library makes one of any configuration
        elif self.tokenizer is None:
            raise ValueError(f"{self.model.name_or_path} holds a language model and no tokenizer")
        self.model.eval()

    def __call__(self, prices: pd.DataFrame | list[pd.DataFrame], **options):
        """
        Args:
            prices (`pd.DataFrame`, or a list of them):
                Daily bars `ticker, date, open, high, low, close, volume` of one or many tickers, each oldest first;
                those of one series without the column `ticker`. Checked by the feature extractor.
            as_of (`str` or `pd.Timestamp`, *optional*):
                Newest date to use.
            unit (`str`, defaults to `"price"`):
                `"price"`, in the currency of the bars, or `"log_return"`, from the close at `cutoff`.
            prediction_length (`int`, *optional*):
                Forecast every trading day up to this one, and not the horizons of the model. What a regression does
                not say of a day is interpolated (`interpolate_horizons`).
            quantile_levels (`list[float]`, *optional*):
                Increasing levels in place of the model's, between whose outermost they lie; those of a language model
                between its outermost samples.
            num_samples (`int`, *optional*):
                Give as many paths too. Those of a language model are its own, and its table is of them. Those of a
                regression have each day the distribution of its table, and between days the dependence of a random
                walk (`brownian_paths`).
            seed (`int`, defaults to 0):
                Of the paths. Those of a ticker are the same whatever else is forecast.
            batch_size (`int`, defaults to 16):
                Tickers at a time.

        Return:
            The forecast table `ticker, cutoff, date, horizon, mean, q0.05 … q0.95, p_up`, of a classification
            `ticker, cutoff, date, horizon, p_down, p_flat, p_up, band`; with `num_samples` a `Forecast`. A list of
            them for a list.
        """
        if isinstance(prices, list) and not prices:
            raise ValueError("there are no prices: the list is empty")
        with torch.random.fork_rng(devices=[]):  # a DataLoader takes a number from the process's generator
            return super().__call__(prices, **options)

    def save_pretrained(self, save_directory: str | Path, **kwargs):
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        add_pipeline(self.model, save_directory)
        super().save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self, as_of=None, seed=None, unit=None, prediction_length=None, quantile_levels=None, num_samples=None
    ) -> tuple[dict, dict, dict]:
        start = {"as_of": as_of, "seed": seed}
        asked = {
            "unit": unit,
            "prediction_length": prediction_length,
            "quantile_levels": quantile_levels,
            "num_samples": num_samples,
        }
        start, asked = ({name: one for name, one in given.items() if one is not None} for given in (start, asked))
        return start | asked, {}, asked

    def preprocess(
        self, prices: pd.DataFrame, as_of: str | pd.Timestamp | None = None, seed: int = 0, **asked
    ) -> Iterator[dict]:
        """The newest context of each ticker, what its forecast starts from, and the shocks of its paths."""
        check_prices(prices)
        self.check(seed, **asked)
        prices = prices if "ticker" in prices.columns else prices.assign(ticker=ONE_SERIES)
        history = self.feature_extractor.history(prices, as_of)
        batch = self.feature_extractor.newest_contexts(history)
        newest = history.groupby("ticker", sort=False).tail(1)
        origins = newest[["ticker", "date", "close"]].rename(columns={"date": "cutoff"})
        for row, origin in enumerate(origins.assign(scale=batch["scale"][:, -1].numpy()).to_dict("records")):
            chunk = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            if self.head == LANGUAGE or "num_samples" in asked:
                size = asked.get("num_samples", NUM_SAMPLES), self.days(asked.get("prediction_length"))[-1]
                shocks = draw_shocks(seed, origin["ticker"], origin["cutoff"], *size)
                chunk["shocks"] = torch.from_numpy(shocks)[None]
            yield chunk | {"origin": origin, "is_last": row == len(origins) - 1}

    def _forward(self, model_inputs: dict) -> dict:
        inputs = {name: model_inputs.pop(name) for name in self.feature_extractor.model_input_names}
        if self.head == LANGUAGE:
            return model_inputs | {"paths": sample_paths(self.model, self.tokenizer, inputs, model_inputs["shocks"])}
        outputs = self.model(**inputs)
        if self.head == CLASSIFICATION:
            return model_inputs | {"probabilities": outputs.logits[:, -1].float().softmax(dim=-1)}
        return model_inputs | {"mean": outputs.mean[:, -1].float(), "quantiles": outputs.quantiles[:, -1].float()}

    def postprocess(
        self, model_outputs: list[dict], unit="price", prediction_length=None, quantile_levels=None, num_samples=None
    ) -> pd.DataFrame | Forecast:
        origins = pd.DataFrame([one.pop("origin") for one in model_outputs])
        outputs = {name: np.concatenate([one[name] for one in model_outputs]) for name in model_outputs[0]}
        if self.head == CLASSIFICATION:
            return self.feature_extractor.class_table(origins, outputs["probabilities"], self.model.config)
        table = self.table(origins, outputs, self.days(prediction_length), quantile_levels)
        if unit == "price":
            table = in_prices(table, origins["close"])
        if num_samples is None:
            return table
        return Forecast(table, self.paths(origins, outputs))

    def days(self, prediction_length: int | None) -> list[int]:
        """Those that are forecast."""
        return list(self.model.config.horizons if prediction_length is None else range(1, prediction_length + 1))

    def table(
        self, origins: pd.DataFrame, outputs: dict[str, np.ndarray], days: list[int], levels: list[float] | None
    ) -> pd.DataFrame:
        """The forecast table in log-returns. Its probabilities are of all levels that the model has."""
        config = self.model.config
        every = list(config.quantile_levels)
        mean, quantiles = self.law(outputs, days, every)
        of = SimpleNamespace(horizons=days, quantile_levels=every, target=config.target)
        table = self.feature_extractor.forecast_table(origins, mean, quantiles, of)
        if levels is None:
            return table
        _, quantiles = self.law(outputs, days, levels)
        columns = pd.DataFrame(quantiles.reshape(-1, len(levels)), columns=quantile_columns(levels))
        kept = table.drop(columns=quantile_columns(every))
        return pd.concat([kept.drop(columns="p_up"), columns, kept["p_up"]], axis=1)

    def law(
        self, outputs: dict[str, np.ndarray], days: list[int], levels: list[float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) means and (N, D, Q) quantiles of cumulative log-returns."""
        if self.head == LANGUAGE:
            return forecast_of_samples(outputs["paths"], days, levels)
        config = self.model.config
        given = outputs["mean"].astype(np.float64), outputs["quantiles"].astype(np.float64)
        mean, quantiles = interpolate_horizons(*given, config.horizons, days)
        return mean, interpolate_levels(quantiles, config.quantile_levels, levels)

    def paths(self, origins: pd.DataFrame, outputs: dict[str, np.ndarray]) -> pd.DataFrame:
        """Closes of every trading day."""
        shocks, levels = outputs["shocks"], self.model.config.quantile_levels
        tickers, samples, length = shocks.shape
        days = list(range(1, length + 1))
        if self.head == LANGUAGE:
            returns = outputs["paths"].cumsum(axis=2)
        else:
            returns = brownian_paths(self.law(outputs, days, levels)[1], levels, shocks)
        dates = following_sessions(self.feature_extractor.calendar, origins["cutoff"], days)
        return pd.DataFrame(
            {
                "ticker": origins["ticker"].repeat(samples * length).to_numpy(),
                "sample": np.tile(np.arange(samples).repeat(length), tickers),
                "date": dates.repeat(samples, axis=0).reshape(-1),
                "close": (origins["close"].to_numpy()[:, None, None] * np.exp(returns)).reshape(-1),
            }
        )

    def check(self, seed: int, **asked) -> None:
        """Refuses what cannot be forecast."""
        if self.head == CLASSIFICATION and asked:
            name, value = next(iter(asked.items()))
            raise ValueError(f"a classification forecasts no returns and takes no {name}, got {value!r}")
        last, samples = self.model.config.horizons[-1], asked.get("num_samples", NUM_SAMPLES)
        check_count("seed", seed, 0)
        check_count("num_samples", samples, 1)
        check_count("prediction_length", asked.get("prediction_length", last), 1, last, ", the model's last horizon")
        if asked.get("unit", UNITS[0]) not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {asked['unit']!r}")
        if "quantile_levels" in asked:
            ranks = [1 / (samples + 1), samples / (samples + 1)]
            known = ranks if self.head == LANGUAGE else self.model.config.quantile_levels
            check_levels(asked["quantile_levels"], known[0], known[-1])


def check_prices(prices: pd.DataFrame) -> None:
    if not isinstance(prices, pd.DataFrame):
        raise ValueError(f"prices must be a DataFrame of daily bars or a list of them, got {type(prices).__name__}")


def check_count(name: str, value: int, least: int, most: int | None = None, which: str = "") -> None:
    is_count = isinstance(value, int | np.integer) and least <= value and (most is None or value <= most)
    if not is_count:
        bound = f"at least {least}" if most is None else f"from {least} to {most}{which}"
        raise ValueError(f"{name} must be an integer, {bound}, got {value!r}")


def check_levels(levels: list[float], lowest: float, highest: float) -> None:
    if not isinstance(levels, list | tuple | np.ndarray) or not len(levels) or not (np.diff(levels) > 0).all():
        raise ValueError(f"quantile_levels must be a list of increasing numbers, got {levels!r}")
    columns = quantile_columns(levels)
    if len(set(columns)) < len(columns):
        raise ValueError(f"quantile_levels must differ in the columns' names, {', '.join(columns)}, got {levels!r}")
    for level in levels:
        if not lowest <= level <= highest:
            raise ValueError(f"quantile level {level:g} is not within {lowest:g} and {highest:g}, which are forecast")


def head_of(model: PreTrainedModel) -> str:
    """Which of `HEADS` a model is, and was when it was saved."""
    name = type(model).__name__
    saved = (model.config.architectures or [name])[0]
    if name not in HEADS:
        raise ValueError(f"{name} forecasts no prices: it is none of {', '.join(HEADS)}")
    if name != saved:  # its head would be a random one
        raise ValueError(f"{model.name_or_path} holds {saved}, and was loaded as {name}")
    return name


def add_pipeline(model: PreTrainedModel, folder: str | Path) -> None:
    """Lets `transformers.pipeline` find this one in a folder that the model is saved into next."""
    vars(model.config).pop("custom_pipelines", None)  # of the checkpoint that it was trained from
    if type(model).__name__ in HEADS:
        implementation = f"{Path(__file__).stem}.{SpaceExplorePipeline.__name__}"
        model.config.custom_pipelines = {TASK: {"impl": implementation, "pt": [model._auto_class]}}
        custom_object_save(SpaceExplorePipeline, folder)
