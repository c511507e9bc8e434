"""SpaceExploreAI: an open time-series language model for stocks."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoTokenizer,
)

from .configuration_spaceexplore import SpaceExploreConfig
from .feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from .modeling_spaceexplore import (
    SpaceExploreForCausalLM,
    SpaceExploreForClassification,
    SpaceExploreForRegression,
    SpaceExploreForTimeToText,
    SpaceExploreModel,
    SpaceExplorePreTrainedModel,
)
from .pipeline_spaceexplore import SpaceExplorePipeline
from .tokenization_spaceexplore import SpaceExploreTokenizer

AutoConfig.register(SpaceExploreConfig.model_type, SpaceExploreConfig)
AutoFeatureExtractor.register(SpaceExploreConfig, SpaceExploreFeatureExtractor)
AutoModel.register(SpaceExploreConfig, SpaceExploreModel)
AutoModelForCausalLM.register(SpaceExploreConfig, SpaceExploreForCausalLM)
AutoModelForPreTraining.register(SpaceExploreConfig, SpaceExploreForTimeToText)
AutoModelForSequenceClassification.register(SpaceExploreConfig, SpaceExploreForClassification)
AutoModelForTimeSeriesPrediction.register(SpaceExploreConfig, SpaceExploreForRegression)
AutoTokenizer.register(SpaceExploreConfig, SpaceExploreTokenizer)

__all__ = [
    "SpaceExploreConfig",
    "SpaceExploreFeatureExtractor",
    "SpaceExploreForCausalLM",
    "SpaceExploreForClassification",
    "SpaceExploreForRegression",
    "SpaceExploreForTimeToText",
    "SpaceExploreModel",
    "SpaceExplorePipeline",
    "SpaceExplorePreTrainedModel",
    "SpaceExploreTokenizer",
]
