"""Published Caduceus models for `transformers`: `AutoModel`, and heads for masked bases, sequences and tokens.

They contain the modules of `caduceus.model`. Files on disk have the published names, which are translated when reading
and writing, so a tied weight is one parameter, however the version of `transformers` handles ties.

Shapes: B batch, L length, D d_model, S streams (2 where the model follows both strands), V padded vocabulary.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from caduceus.errors import UserError
from caduceus.hub.auto.code import AUTO_MAP, code_files
from caduceus.hub.auto.configuration_caduceus import CaduceusConfig
from caduceus.hub.auto.loading import dtype_of, folder_of, place_of
from caduceus.hub.published import PublishedLayout, hidden_states_to_published, mixer_of
from caduceus.hub.weights import find_weights, read_weights
from caduceus.model.backbone import Backbone
from caduceus.model.heads import CaduceusForMaskedLM as Model

POOLING = ("mean", "max", "first", "last")
"""Ways in which sequence classification pools a sequence's states into one vector."""

_log = logging.getLogger(__name__)


class CaduceusPreTrainedModel(PreTrainedModel):
    """Loads and saves weights under the published names."""

    config_class = CaduceusConfig
    base_model_prefix = "caduceus"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (as in transformers)
    _prefix = "caduceus.backbone."

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: modules initialise their weights when they are made."""

    @property
    def backbone_model(self) -> Model:
        """The backbone, whatever the head."""
        return self.get_submodule(self._prefix.removesuffix("."))

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone_model.embedding

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Module:
        """The embedding, which has one row for each token of the published vocabulary and cannot be resized."""
        embedding = self.get_input_embeddings()
        if new_num_tokens not in (None, embedding.num_embeddings):
            raise UserError(
                f"resize_token_embeddings: a Caduceus keeps its table of {embedding.num_embeddings} rows, "
                f"which has all tokens of its vocabulary; got {new_num_tokens}"
            )
        return embedding

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass recomputes every block."""
        return self.backbone_model.recomputed_blocks > 0

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.backbone_model.recomputed_blocks = self.config.n_layer

    def gradient_checkpointing_disable(self) -> None:
        self.backbone_model.recomputed_blocks = 0

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *model_args: Any,
        config: CaduceusConfig | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Load like `transformers`. The weights may have any form that `caduceus.hub` reads, except quantized ones.

        `dtype` (or `torch_dtype`) defaults to that of the file; `device_map` names one device for everything.
        Parameters of a head that the file lacks keep their random weights, and the log names them.
        """
        dtype = options.pop("torch_dtype", None) if dtype is None else dtype
        for key in ("quantization_config", "load_in_8bit", "load_in_4bit"):
            if options.pop(key, None):
                raise UserError(f"{key}: Caduceus is not quantized; load it in bfloat16 instead")
        folder = folder_of(pretrained_model_name_or_path, options)
        if not isinstance(config, PretrainedConfig):  # an export's code may be imported more than once
            config, options = CaduceusConfig.from_pretrained(config or folder, return_unused_kwargs=True, **options)
        file = find_weights(folder)
        if file is None:
            raise UserError(f"{folder}: there are no weights in it, such as model.safetensors")
        weights = read_weights(file)
        if not hasattr(config, "mixer"):
            config.mixer = mixer_of(weights.tensors)
        model = cls(config, *model_args)
        missing = model._load_published({**weights.tensors, **weights.left_out}, file)
        model.name_or_path = config.name_or_path = str(pretrained_model_name_or_path)
        stored = next(tensor.dtype for tensor in weights.tensors.values() if tensor.is_floating_point())
        model = model.to(device=place_of(device_map), dtype=dtype_of(dtype, stored)).eval()
        if not output_loading_info:
            return model
        unused = sorted(weights.left_out.keys() - model.state_dict().keys())
        return model, {"missing_keys": missing, "unexpected_keys": unused, "mismatched_keys": [], "error_msgs": []}

    def _load_published(self, tensors: dict[str, Tensor], file: Path) -> list[str]:
        """Load tensors with published names. Returns the names of the head's parameters without a tensor."""
        try:
            own = self._to_own(tensors)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        missing = sorted(self.state_dict().keys() - own.keys())
        if missing:
            _log.warning("%s: has no %s, which starts with random weights", file, ", ".join(missing))
        nn.Module.load_state_dict(self, own, strict=False)
        return missing

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, **options: Any) -> Any:
        """Load a state dict with this module's names, or the published ones, which `save_pretrained` (and so `Trainer`)
        writes.
        """
        is_published = any("backbone.embeddings.word_embeddings" in name for name in state_dict)
        return super().load_state_dict(self._to_own(state_dict) if is_published else state_dict, strict, **options)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **options: Any
    ) -> None:
        """Save like `transformers`, and add the code that loads it again.

        A tied weight is written under each of its names, as published code needs.
        """
        own = self.state_dict() if state_dict is None else state_dict
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process, self._to_published(own), **options)
        for name, text in code_files().items() if is_main_process else ():
            (Path(save_directory) / name).write_text(text)

    def _to_published(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        model = {name.removeprefix(self._prefix): t for name, t in own.items() if name.startswith(self._prefix)}
        head = {name: tensor for name, tensor in own.items() if not name.startswith(self._prefix)}
        published = PublishedLayout(self.backbone_model.config).to_published(model)
        if not isinstance(self, CaduceusForMaskedLM):
            published = {name: tensor for name, tensor in published.items() if not name.startswith("lm_head.")}
        outer = self._prefix.removesuffix("backbone.")
        return {name.replace("caduceus.", outer, 1): tensor for name, tensor in published.items()} | head

    def _to_own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        layout, model = PublishedLayout(self.backbone_model.config), self.backbone_model
        outer, known = self._prefix.removesuffix("backbone."), self.state_dict()
        head = {name: tensor for name, tensor in tensors.items() if name in known}
        for name, tensor in head.items():
            if tensor.shape != known[name].shape:
                raise UserError(f"{name}: expected shape {list(known[name].shape)}, got {list(tensor.shape)}")
        bare = {name.removeprefix(outer): tensor for name, tensor in tensors.items()}
        published = {f"caduceus.{name}": tensor for name, tensor in bare.items() if name.startswith("backbone.")}
        published |= {name: tensor for name, tensor in tensors.items() if name.startswith(("caduceus.", "lm_head."))}
        own = layout.checked(model.state_dict(), layout.completed(published))
        return {f"{self._prefix}{name}": tensor for name, tensor in own.items()} | head


class Caduceus(CaduceusPreTrainedModel):
    """Returns hidden states: the class of `AutoModel`."""

    _prefix = "backbone."

    def __init__(self, config: CaduceusConfig, **_: Any) -> None:
        super().__init__(config)
        self.backbone = Model(config.own())
        self.post_init()

    def strands(
        self, input_ids: Tensor, attention_mask: Tensor | None, output_hidden_states: bool | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The final norm (S, B, L, D) of each strand, in the forward strand's coordinates, and the hidden states."""
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        pad_mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask == 0
        held, hidden_states = Backbone.forward(self.backbone, input_ids, bool(wanted), pad_mask)
        return self.backbone.by_strand(held), hidden_states

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Hidden states in the published form, (B, L, S·D): those of the second strand have flipped channels.

        input_ids (B, L); attention_mask (B, L), 0 at padding, which may be on either side and does not change results.
        """
        last, hidden_states = self.strands(input_ids, attention_mask, output_hidden_states)
        output = BaseModelOutput(
            last_hidden_state=hidden_states_to_published([last])[0],
            hidden_states=None if hidden_states is None else hidden_states_to_published(hidden_states),
        )
        return output if return_dict is not False else output.to_tuple()


class CaduceusForMaskedLM(CaduceusPreTrainedModel):
    """Predicts masked bases."""

    def __init__(self, config: CaduceusConfig, **_: Any) -> None:
        super().__init__(config)
        self.caduceus = Caduceus(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """Logits (B, L, V) of every base, and the mean loss of the labelled ones, weighted by `loss_weights` (B, L).

        labels (B, L), −100 where nothing is to be predicted. attention_mask: see `Caduceus`.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        pad_mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask == 0
        found = self.caduceus.backbone(input_ids, labels, loss_weights, bool(wanted), pad_mask)
        hidden_states = None if found.hidden_states is None else hidden_states_to_published(found.hidden_states)
        output = MaskedLMOutput(loss=found.loss, logits=found.logits, hidden_states=hidden_states)
        return output if return_dict is not False else output.to_tuple()


class CaduceusForSequenceClassification(CaduceusPreTrainedModel):
    """Predicts a label or a number for each sequence: the head reads each strand's pooled states, and the results are
    averaged.
    """

    def __init__(self, config: CaduceusConfig, **_: Any) -> None:
        super().__init__(config)
        if config.pooling_strategy not in POOLING:
            raise UserError(f"pooling_strategy: choose one of {', '.join(POOLING)}; got {config.pooling_strategy!r}")
        self.num_labels = config.num_labels
        self.caduceus = Caduceus(config)
        self.score = nn.Linear(config.d_model, config.num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (B, labels); labels (B,), or (B, labels) for several at once; `problem_type` as in `transformers`."""
        last, hidden_states = self.caduceus.strands(input_ids, attention_mask, output_hidden_states)
        logits = self.score(self._pooled(last, attention_mask)).mean(0)
        loss = None if labels is None else self._loss(logits, labels.to(logits.device))
        output = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=None if hidden_states is None else hidden_states_to_published(hidden_states),
        )
        return output if return_dict is not False else output.to_tuple()

    def _pooled(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(S, B, L, D) -> (S, B, D) over the bases that are not padding; the other strand is read from its own end."""
        shape = states.shape[1:3]
        real = states.new_ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask > 0
        strategy = self.config.pooling_strategy
        if strategy == "mean":
            weights = real.to(states.dtype)[..., None]
            return (states * weights).sum(2) / weights.sum(1)
        if strategy == "max":
            return states.masked_fill(~real[..., None], -torch.inf).amax(2)
        places = torch.arange(shape[1], device=states.device)
        ends = (places.where(real, shape[1]).amin(1), places.where(real, -1).amax(1))
        rows = torch.arange(shape[0], device=states.device)
        first = 0 if strategy == "first" else 1
        return torch.stack([strand[rows, ends[(first + number) % 2]] for number, strand in enumerate(states)])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None:
            whole = labels.dtype in (torch.long, torch.int)
            several = "single_label_classification" if whole else "multi_label_classification"
            kind = self.config.problem_type = "regression" if self.num_labels == 1 else several
        if kind == "regression":
            return F.mse_loss(logits.squeeze(-1) if self.num_labels == 1 else logits, labels.to(logits.dtype))
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class CaduceusForTokenClassification(CaduceusPreTrainedModel):
    """Predicts a label for each base: the head reads each strand's states, and the results are averaged."""

    def __init__(self, config: CaduceusConfig, **_: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.caduceus = Caduceus(config)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple:
        """Logits (B, L, labels); labels (B, L), −100 where there is none."""
        last, hidden_states = self.caduceus.strands(input_ids, attention_mask, output_hidden_states)
        logits = self.classifier(last).mean(0)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten())
        output = TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=None if hidden_states is None else hidden_states_to_published(hidden_states),
        )
        return output if return_dict is not False else output.to_tuple()
