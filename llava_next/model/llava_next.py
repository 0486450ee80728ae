"""The model: stock LLaVA-NeXT weights behind a forward pass that takes packed rows.

`LlavaNext` wraps `LlavaNextForConditionalGeneration` by its public names and copies none of its code. It differs in
how it runs, not in what it computes: the tower stops at the layer whose features are used, image tokens are one
gather and one indexed write, attention stays inside segments, and the head and most of the last block run at supervised
positions only.

Reading and writing directories is `hugging_face.py`'s; which parts train is the caller's choice (`set_trained_parts`).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, LlavaNextForConditionalGeneration, PreTrainedModel

from llava_next.config import AttentionKernel, ModelError
from llava_next.inputs.batch import Batch, Segments
from llava_next.kernels.attention import register, register_for_tower
from llava_next.model.language_models import refuse_unsupported
from llava_next.model.last_block import run_at_targets
from llava_next.model.loss import token_losses
from llava_next.model.towers import num_prefix_tokens


class LossSums(NamedTuple):
    """Sums over the supervised tokens of a row.

    `total` is the weighted loss sum, the only value with a gradient. `by_source` float32 [num_sources] are the
    weighted loss sums of each data source, `tokens_by_source` int64 [num_sources] their supervised tokens.
    """

    total: torch.Tensor
    by_source: torch.Tensor
    tokens_by_source: torch.Tensor


@dataclass(frozen=True)
class TokenScores:
    """For each supervised token: its loss, float32 [L], and whether it is the most likely token, bool [L]."""

    losses: torch.Tensor
    hits: torch.Tensor


class LlavaNext(nn.Module):
    """Packed LLaVA-NeXT.

    Args:
        hf: the stock model. Its tower is cut in place: the layers above the feature layer are kept aside for export
            (`upper_tower_layers`), frozen and never run. So `hf` itself no longer runs; what generates is the export.
        image_mean, image_std: of the tower's training, for tiles in [0, 1].
        num_sources: length of the per-source sums.
        attention: the kernel inside packed samples, and on a CPU inside tiles.

    Raises:
        ModelError: the language model attends in a way that packing does not implement, or the kernel's package is
            not installed.
    """

    tile_scale: torch.Tensor
    tile_shift: torch.Tensor

    def __init__(
        self,
        hf: LlavaNextForConditionalGeneration,
        *,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
        num_sources: int = 1,
        attention: AttentionKernel = "auto",
    ) -> None:
        super().__init__()
        refuse_unsupported(hf.config.text_config)
        _refuse_dropout(hf)
        _check_feature_rows(hf)
        if hf.lm_head.bias is not None:
            raise ModelError(f"{hf.config.text_config.model_type} has a biased head, LLaVA-NeXT's has no bias")
        hf.model.language_model.set_attn_implementation(register(attention))
        hf.model.vision_tower.set_attn_implementation(register_for_tower(attention))
        run_at_targets(hf.model.language_model.layers[-1])
        self.hf = hf
        self.num_sources = num_sources
        layers_name, layers = _encoder_layers(hf.model.vision_tower)
        self.upper_tower_layers = _cut(layers, hf.config.vision_feature_layer)
        self.tower_layers_name = f"hf.model.vision_tower.{layers_name}"
        self.num_tower_layers = len(layers)
        mean, std = torch.tensor(image_mean), torch.tensor(image_std)
        # (x / 255 - mean) / std as one multiply-add per channel.
        self.register_buffer("tile_scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("tile_shift", (-mean / std).view(3, 1, 1), persistent=False)

    def forward(
        self, batch: Batch, *, next_ids: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor:
        """The fields of the row's `LossSums`; see `Batch` for the tensors' shapes.

        A plain tuple, because ZeRO-3 rebuilds a module's outputs from their type and a list.

        Args:
            next_ids: give the likeliest next token at each target position instead, int64 [L]. It is asked for here
                because ZeRO-3 gathers what is read inside of `forward` alone.
        """
        states, head_weight = self._target_states(batch)
        if next_ids:
            return _likeliest(states, head_weight)
        losses = token_losses(states, head_weight, batch.target_ids)
        weighted = losses * batch.target_weights
        by_source = weighted.new_zeros(self.num_sources)
        by_source.index_add_(0, batch.target_sources, weighted.detach())
        tokens = torch.zeros_like(by_source, dtype=torch.int64)
        tokens.index_add_(0, batch.target_sources, torch.ones_like(batch.target_sources))  # bincount waits for a GPU
        return weighted.sum(), by_source, tokens

    @torch.no_grad()
    def score(self, batch: Batch) -> TokenScores:
        """Losses and greedy hits of the row's supervised tokens, each given the true tokens before it."""
        states, head_weight = self._target_states(batch)
        losses = token_losses(states, head_weight, batch.target_ids)
        return TokenScores(losses, _likeliest(states, head_weight) == batch.target_ids)

    @torch.no_grad()
    def target_logits(self, batch: Batch) -> torch.Tensor:
        """Logits at the row's supervised tokens, [L, V]: for comparisons, since they are large."""
        states, head_weight = self._target_states(batch)
        return states @ head_weight.T

    def tile_features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Projected features of uint8 tiles [N, S, S, 3]: [N, patches, D], patches row by row."""
        model = self.hf.model
        dtype = model.image_newline.dtype
        pixels = (tiles.permute(0, 3, 1, 2) * self.tile_scale + self.tile_shift).to(dtype)
        # The tower is cut, so its last hidden state before any final norm is the chosen one.
        features = model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        return model.multi_modal_projector(features[:, self.num_prefix_tokens :])

    @property
    def blocks(self) -> dict[str, str]:
        """By part the name of its stack of blocks, of the parts that are one."""
        return {"vision_tower": self.tower_layers_name, "language_model": "hf.model.language_model.layers"}

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the register tokens."""
        return num_prefix_tokens(self.hf.config.vision_config)

    def _target_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """States that predict the supervised tokens, [L, D], and the head's weight, [V, D]."""
        model = self.hf.model
        features = self.tile_features(batch.tiles)
        table = torch.cat([features.flatten(0, 1), model.image_newline[None]])
        embeds = self.hf.get_input_embeddings()(batch.input_ids)
        if len(batch.image_positions):
            embeds = embeds.index_copy(1, batch.image_positions, table[batch.image_sources][None])
        else:
            # Every part of every rank takes part in every micro-step, or ranks would wait for one another's gradients.
            embeds = embeds + table.sum() * 0
        targets, segments = _last_block_positions(batch)
        states = model.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False, segments=segments, targets=targets
        ).last_hidden_state
        return states[0, batch.target_positions], self.hf.lm_head.weight


def _last_block_positions(batch: Batch) -> tuple[torch.Tensor, Segments]:
    """Positions at which the last block runs, int64 [L] with L at least 1, and the segments that count them.

    A row without a target runs at position 0, whose output nothing reads. The autograd graph of a block must not depend
    on the row: recompute ends at the last tensor that the graph saved, so another graph would gather other modules
    under ZeRO-3 than the other ranks do, and all would wait for ever. It also gives every weight its zero gradient.
    """
    targets, segments = batch.target_positions, batch.segments
    if len(targets):
        return targets, segments
    num_targets = (1, *(0 for _ in segments.lengths[1:]))
    return targets.new_zeros(1), replace(segments, num_targets=num_targets)


def _likeliest(states: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """The token of the largest logit for each state, int64 [L]; logits of 512 states at a time."""
    return torch.cat([(part @ head_weight.T).argmax(-1) for part in states.split(512)])


def _refuse_dropout(hf: LlavaNextForConditionalGeneration) -> None:
    """A step is a function of its samples: what falls away at random would depend on ranks, rows and restarts."""
    for part, config in (("vision_tower", hf.config.vision_config), ("language_model", hf.config.text_config)):
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float) and value > 0:
                raise ModelError(
                    f"model.{part}: {config.model_type} drops activations at random ({key}={value}), and a step would "
                    f"no longer be a function of its samples; set {key}: 0.0 in model.{part}.overrides"
                )


def _check_feature_rows(hf: LlavaNextForConditionalGeneration) -> None:
    """Raises ModelError unless the tower gives a blank tile the rows that image tokens are counted by: its prefix
    tokens, then one row for each patch. Shapes alone: a tower of this config runs on the meta device."""
    vision = hf.config.vision_config
    tile, prefix = vision.image_size, num_prefix_tokens(vision)
    patches = (tile // vision.patch_size) ** 2
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(vision)
        states = tower(pixel_values=torch.empty(1, 3, tile, tile, dtype=tower.dtype), output_hidden_states=True)
    rows = int(states.hidden_states[-1].shape[1])
    if rows != prefix + patches:
        raise ModelError(
            f"model.vision_tower: a {vision.model_type} gives a tile of {tile} pixels {rows} rows of features, and "
            f"{prefix} prefix tokens and {patches} patches of {vision.patch_size} pixels were expected; give it the "
            "config.json that describes it"
        )


def _encoder_layers(tower: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    depth = tower.config.num_hidden_layers
    found = [(n, m) for n, m in tower.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise ModelError(f"{type(tower).__name__}: its {depth} encoder layers were not found as one list of modules")
    return found[0]


def _cut(layers: nn.ModuleList, feature_layer: object) -> tuple[nn.Module, ...]:
    """Removes the layers above the feature layer and returns them, frozen.

    Raises:
        ModelError: the feature layer is not one of the tower's hidden states.
    """
    depth = len(layers)
    if not isinstance(feature_layer, int) or not -depth - 1 <= feature_layer <= depth:
        raise ModelError(
            f"model.vision_tower.feature_layer: {feature_layer} is no hidden state of a tower with {depth} layers "
            f"(1 to {depth}, or -{depth} to -1)"
        )
    num_kept = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if num_kept == 0:
        raise ModelError("model.vision_tower.feature_layer: 0 takes no layer of the tower at all; use 1 or more")
    upper = tuple(layers[num_kept:])
    del layers[num_kept:]
    for module in upper:
        module.requires_grad_(False)
    return upper
