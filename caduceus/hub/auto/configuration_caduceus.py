"""Published configurations of Caduceus, PlantCaduceus and PlantCAD2 for `transformers`."""

from typing import Any

from transformers import PretrainedConfig

from caduceus.alphabet import VOCABULARIES
from caduceus.config import CaduceusConfig as OwnConfig
from caduceus.hub.published_config import FUNCTION_KEYS, config_from_published, config_to_published


class CaduceusConfig(PretrainedConfig):
    """The keys of published `config.json` files, and `pooling_strategy` for sequence classification."""

    model_type = "caduceus"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}  # noqa: RUF012 (as in transformers)

    def __init__(
        self,
        d_model: int = 256,
        n_layer: int = 4,
        vocab_size: int = 12,
        ssm_cfg: dict[str, Any] | None = None,
        complement_map: dict[Any, int] | None = None,
        pooling_strategy: str = "mean",
        **keys: Any,
    ) -> None:
        self.d_model, self.n_layer, self.vocab_size = d_model, n_layer, vocab_size
        self.ssm_cfg, self.pooling_strategy = ssm_cfg, pooling_strategy
        # Keys are numbers, so that they are sorted as published code needs them when the configuration is written.
        self.complement_map = complement_map and {int(token): other for token, other in complement_map.items()}
        for key in FUNCTION_KEYS & keys.keys():
            setattr(self, key, keys.pop(key))
        if keys.get("pad_token_id", 0) < 0:  # this is the label that published code ignores, not a token
            del keys["pad_token_id"]
        super().__init__(**keys)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict, with the published `pad_token_id`."""
        values = super().to_dict()
        if self.vocab_size in VOCABULARIES:
            values["pad_token_id"] = config_to_published(OwnConfig(vocab_size=self.vocab_size))["pad_token_id"]
        return values

    def own(self) -> OwnConfig:
        """The configuration of this package's model. Raises `UserError` for unsupported values."""
        return config_from_published({key: getattr(self, key) for key in FUNCTION_KEYS if hasattr(self, key)})
