"""What forecasts: checkpoints of every head, and the forecast tables that they make of many windows."""

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.data.collators import collate_windows
from spaceexploreai.data.windows import DateRange, ForecastWindows, forecast_windows
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries, SpaceExploreFeatureExtractor
from spaceexploreai.modeling_spaceexplore import (
    SpaceExploreForCausalLM,
    SpaceExploreForClassification,
    SpaceExploreForRegression,
    SpaceExplorePreTrainedModel,
)
from spaceexploreai.paths_spaceexplore import forecast_of_samples
from spaceexploreai.pipeline_spaceexplore import SpaceExplorePipeline
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.sampling import ModelPaths

HEADS = {
    one.__name__: one for one in (SpaceExploreForRegression, SpaceExploreForClassification, SpaceExploreForCausalLM)
}
HISTORIES = 64  # that paths are sampled of at a time

Forecaster = SpaceExploreForRegression | SpaceExploreForClassification | ModelPaths

# Shapes: N windows, T steps, H horizons, Q quantile levels


def load_checkpoint(
    folder: str, head: type[SpaceExplorePreTrainedModel] = SpaceExploreForRegression
) -> tuple[SpaceExplorePreTrainedModel, SpaceExploreFeatureExtractor]:
    """Loads a checkpoint folder or Hub repository with one head, ready to forecast."""
    extractor = SpaceExploreFeatureExtractor.from_pretrained(folder)
    model, info = head.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        name = head.__name__.removeprefix("SpaceExploreFor")
        raise ValueError(f"{folder} is no checkpoint of a {name}: it has no {min(info['missing_keys'])}")
    return model.eval(), extractor


def load_forecaster(
    folder: str, num_samples: int = 64, seed: int = 0, device: str | None = None
) -> tuple[Forecaster, SpaceExploreFeatureExtractor]:
    """Loads a checkpoint with the head that it was trained with.

    Args:
        folder: checkpoint folder or Hub repository.
        num_samples: paths that a causal language model draws from each day.
        seed: of those paths.
        device: where to compute; by default on an accelerator, if there is one.

    Raises:
        ValueError: the checkpoint has no head that forecasts prices, or there is no such device.
        OSError: there is no such checkpoint.
    """
    model, extractor, tokenizer = load_whole(folder, device)
    if tokenizer is None:
        return model, extractor
    return ModelPaths(model, tokenizer, extractor.context_length, num_samples, seed), extractor


def load_pipeline(folder: str, device: str | None = None) -> SpaceExplorePipeline:
    """The pipeline of a checkpoint, whose own code is not run; arguments and errors as of `load_forecaster`."""
    model, extractor, tokenizer = load_whole(folder, device)
    return SpaceExplorePipeline(model=model, feature_extractor=extractor, tokenizer=tokenizer, device=model.device)


def load_whole(
    folder: str, device: str | None
) -> tuple[SpaceExplorePreTrainedModel, SpaceExploreFeatureExtractor, SpaceExploreTokenizer | None]:
    """A checkpoint with the head that it was trained with; a tokenizer of a language model alone."""
    try:
        name = head_name(SpaceExploreConfig.from_pretrained(folder))
    except OSError as error:  # which may tell of the network alone
        raise OSError(f"cannot load {folder}: {error}") from error
    if name not in HEADS:
        raise ValueError(f"{folder} forecasts no prices: it holds {name}, not one of {', '.join(HEADS)}")
    model, extractor = load_checkpoint(folder, HEADS[name])
    is_language = HEADS[name] is SpaceExploreForCausalLM
    tokenizer = SpaceExploreTokenizer.from_pretrained(folder) if is_language else None
    return model.to(find_device(device)), extractor, tokenizer


def head_name(config: SpaceExploreConfig) -> str:
    """Class that the weights beside a configuration are of."""
    return (config.architectures or ["no head"])[0]


def find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def forecast_between(
    model: Forecaster,
    extractor: SpaceExploreFeatureExtractor,
    series: list[EncodedSeries],
    within: DateRange,
    stride: int | None = None,
) -> pd.DataFrame:
    """Forecast table of every ticker and trading day of a range that has a whole context behind it.

    Args:
        stride: days forecast from one window (see `forecast_windows`), by default a quarter of the context; sampled
            paths start at the end of a window, and each day has its own.
    """
    if isinstance(model, ModelPaths):
        windows = forecast_windows(series, extractor.context_length, within)
        return extractor.forecast_table(windows.origins, *sample(model, windows), model.config)
    stride = max(extractor.context_length // 4, 1) if stride is None else stride
    windows = forecast_windows(series, extractor.context_length, within, stride)
    if isinstance(model, SpaceExploreForClassification):
        (logits,) = predict(model, windows, "logits")
        return extractor.class_table(windows.origins, logits.double().softmax(dim=-1), model.config)
    return extractor.forecast_table(windows.origins, *predict(model, windows, "mean", "quantiles"), model.config)


@torch.inference_mode()
def predict(model: SpaceExplorePreTrainedModel, windows: ForecastWindows, *outputs: str) -> list[torch.Tensor]:
    """Outputs at each origin of the windows, (N, H, …)."""
    batch_size = 32 if model.device.type == "cpu" else 512  # what a core's cache holds; what keeps a GPU busy
    loader = DataLoader(windows, batch_size=batch_size, collate_fn=collate_windows)
    batches = windows.origins.groupby(windows.origins["window"] // batch_size)[["window", "back"]]
    found = []
    for batch, (_, rows) in zip(tqdm(loader, desc="forecasting", unit="batch", leave=False), batches, strict=True):
        given = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        window, back = torch.tensor(rows.to_numpy()).T
        found.append([given[name][window % batch_size, -1 - back].cpu() for name in outputs])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def sample(paths: ModelPaths, windows: ForecastWindows) -> tuple[np.ndarray, np.ndarray]:
    """(N, H) means and (N, H, Q) quantiles of the log-returns of sampled paths."""
    horizons, levels, found = list(paths.config.horizons), list(paths.config.quantile_levels), []
    starts = range(0, len(windows), HISTORIES)
    for start in tqdm(starts, desc="sampling", unit="batch", leave=False):
        shown = [windows.history(place) for place in range(start, min(start + HISTORIES, len(windows)))]
        histories = [EncodedSeries(one.ticker, *(column[steps] for column in one[1:])) for one, steps in shown]
        found.append(forecast_of_samples(paths(histories, horizons[-1]), horizons, levels))
    mean, quantiles = zip(*found, strict=True)
    return np.concatenate(mean), np.concatenate(quantiles)
