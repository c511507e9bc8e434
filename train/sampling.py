"""Paths of daily returns, sampled from a causal language model."""

import numpy as np
import torch
from transformers import set_seed

from spaceexploreai.data.collators import collate_windows
from spaceexploreai.feature_extraction_spaceexplore import EncodedSeries
from spaceexploreai.modeling_spaceexplore import SpaceExploreForCausalLM
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer


class ModelPaths:
    """What a model says may follow: one path of log-returns for each history (see `stocks.SamplePaths`).

    Args:
        model: a causal language model.
        tokenizer: its own.
        context_length: steps T that it reads of a history.
        seed: of the draws.
        batch_size: histories at a time.
    """

    def __init__(
        self,
        model: SpaceExploreForCausalLM,
        tokenizer: SpaceExploreTokenizer,
        context_length: int,
        seed: int = 0,
        batch_size: int = 64,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context_length, self.batch_size = context_length, batch_size
        set_seed(seed)

    @classmethod
    def from_pretrained(cls, folder: str, context_length: int, seed: int = 0) -> "ModelPaths":
        """Of a checkpoint folder or Hub repository."""
        model = SpaceExploreForCausalLM.from_pretrained(folder)
        return cls(model, SpaceExploreTokenizer.from_pretrained(folder), context_length, seed)

    def __call__(self, histories: list[EncodedSeries], length: int) -> np.ndarray:
        """(N, length) daily log-returns after the last step of each history."""
        starts = range(0, len(histories), self.batch_size)
        return np.concatenate([self._sample(histories[start : start + self.batch_size], length) for start in starts])

    @torch.inference_mode()
    def _sample(self, histories: list[EncodedSeries], length: int) -> np.ndarray:
        batch = {name: tensor.to(self.model.device) for name, tensor in self._prompt(histories).items()}
        days = {"min_new_tokens": length, "max_new_tokens": length}
        tokens = self.model.generate(**batch, **days, do_sample=True, suppress_tokens=self.tokenizer.suppress_tokens)
        scale = np.array([one.scale[-1] for one in histories], dtype=np.float64)
        return self.tokenizer.decode_returns(tokens[:, -length:].cpu().numpy(), scale)

    def _prompt(self, histories: list[EncodedSeries]) -> dict[str, torch.Tensor]:
        """A `<ts>` for each unpadded step and `<bos>`, padded on the left, and the steps themselves."""
        steps = slice(-self.context_length, None)
        context = collate_windows(
            [
                {"past_values": one.values[steps], "attention_mask": one.traded[steps], "scale": one.scale[steps]}
                for one in histories
            ]
        )
        lengths = context["attention_mask"].sum(dim=1)
        longest = int(lengths.max())
        real = torch.arange(longest) >= longest - lengths[:, None]
        ids = torch.where(real, self.tokenizer.ts_token_id, self.tokenizer.pad_token_id)
        bos = torch.full((len(ids), 1), self.tokenizer.bos_token_id)
        return {
            "input_ids": torch.cat([ids, bos], dim=1),
            "attention_mask": torch.cat([real, torch.ones_like(bos, dtype=torch.bool)], dim=1).long(),
            "past_values": context["past_values"],
            "past_values_mask": context["attention_mask"],
        }
