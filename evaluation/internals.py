"""What a network says beside its forecasts: which experts it asks, and words for the days that it has read.

Any network with the methods of `SpaceExplorePreTrainedModel` does; nothing here makes or changes a forecast.
"""

import numpy as np
import pandas as pd
import torch

from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries


@torch.inference_mode()
def expert_load(model, inputs: dict[str, torch.Tensor]) -> np.ndarray | None:
    """(L, E) shares of the choices that the experts of each layer get, over the unpadded steps of a batch; None of a
    network without experts.

    Args:
        model: a head in evaluation mode.
        inputs: a batch as its forward pass takes it.
    """
    logits = model(**inputs, output_router_logits=True).router_logits
    return model.expert_load(logits, inputs.get("attention_mask")).cpu().numpy() if logits else None


def words_of(model, series: EncodedSeries, cutoff: pd.Timestamp, context_length: int) -> list[dict]:
    """What the time-to-text extractor says of the last `context_length` steps to a cutoff: `start, end, word,
    probability`, oldest first; nothing if the network has none, or one that was never trained.

    Args:
        model: a head in evaluation mode.
        series: the ticker's history as the feature extractor encodes it.
        cutoff: the last date that may be read.
    """
    t2t = model.base_model.t2t
    if t2t is None or not t2t.num_batches_tracked:
        return []
    last = np.searchsorted(series.dates, np.datetime64(cutoff), side="right")
    steps = slice(max(last - context_length, 0), last)
    values, known = (torch.from_numpy(column[steps]).to(model.device) for column in (series.values, series.traded))
    return model.describe(values[None], known[None].long(), pd.to_datetime(series.dates[steps]))[0]
