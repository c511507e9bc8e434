"""SpaceExploreAI: an open time-series language model for stocks."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction

from .configuration_spaceexplore import SpaceExploreConfig
from .feature_extraction_spaceexplore import SpaceExploreFeatureExtractor
from .modeling_spaceexplore import SpaceExploreForRegression, SpaceExploreModel, SpaceExplorePreTrainedModel

AutoConfig.register(SpaceExploreConfig.model_type, SpaceExploreConfig)
AutoFeatureExtractor.register(SpaceExploreConfig, SpaceExploreFeatureExtractor)
AutoModel.register(SpaceExploreConfig, SpaceExploreModel)
AutoModelForTimeSeriesPrediction.register(SpaceExploreConfig, SpaceExploreForRegression)

__all__ = [
    "SpaceExploreConfig",
    "SpaceExploreFeatureExtractor",
    "SpaceExploreForRegression",
    "SpaceExploreModel",
    "SpaceExplorePreTrainedModel",
]
