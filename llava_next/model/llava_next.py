"""The LLaVA-NeXT model with a forward pass for packed rows.

`LlavaNext` wraps transformers' `LlavaNextForConditionalGeneration` through its public attributes. It computes the same
function, but the tower stops at the layer whose features are used, image tokens are inserted with one gather and one
indexed write, attention stays inside segments, and the head and most of the last block run at supervised positions
only. The reduced feature maps of `anyres_max_N` are computed as in transformers' LLaVA-OneVision.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, LlavaNextForConditionalGeneration, PreTrainedModel

from llava_next.config import AttentionKernel, ModelError
from llava_next.inputs.batch import Batch, Segments
from llava_next.kernels.attention import register
from llava_next.model.language_models import check_language_model_supported
from llava_next.model.loss import token_losses
from llava_next.model.supervised_last_block import run_at_targets
from llava_next.model.towers import num_prefix_tokens
from llava_next.model.weighted_rows import weighted_rows


class LossSums(NamedTuple):
    """Sums over the supervised tokens of a row.

    Attributes:
        total: the weighted loss sum, the only value with a gradient.
        by_source: float32 [num_sources], the weighted loss sum of each data source.
        tokens_by_source: int64 [num_sources], the supervised tokens of each data source.
    """

    total: torch.Tensor
    by_source: torch.Tensor
    tokens_by_source: torch.Tensor


@dataclass(frozen=True)
class TokenScores:
    """Scores of the supervised tokens of a row.

    Attributes:
        losses: float32 [L].
        hits: bool [L], whether the token has the largest logit.
    """

    losses: torch.Tensor
    hits: torch.Tensor


class LlavaNext(nn.Module):
    """LLaVA-NeXT for packed rows.

    Args:
        hf: the stock model. It is modified and must not be run afterwards: the tower's layers above the feature layer
            are removed and stored in `upper_tower_layers`, frozen, for export.
        image_mean, image_std: normalization of tiles in [0, 1].
        num_sources: length of the per-source sums.
        attention: the attention kernel of packed samples.

    Raises:
        ModelError: packed rows do not support the model, or the kernel's package is not installed.
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
        check_language_model_supported(hf.config.text_config)
        _check_no_dropout(hf)
        _check_feature_rows(hf)
        if hf.lm_head.bias is not None:
            raise ModelError(f"{hf.config.text_config.model_type} has a head with a bias, LLaVA-NeXT's head has none")
        hf.model.language_model.set_attn_implementation(register(attention))
        hf.model.vision_tower.set_attn_implementation("sdpa")
        run_at_targets(hf.model.language_model.layers[-1])
        self.hf = hf
        self.num_sources = num_sources
        layers_name, layers = _encoder_layers(hf.model.vision_tower)
        self.upper_tower_layers = _remove_upper_layers(layers, hf.config.vision_feature_layer)
        self.tower_layers_name = f"hf.model.vision_tower.{layers_name}"
        self.num_tower_layers = len(layers)
        mean, std = torch.tensor(image_mean), torch.tensor(image_std)
        # (x / 255 - mean) / std as one multiply-add per channel
        self.register_buffer("tile_scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("tile_shift", (-mean / std).view(3, 1, 1), persistent=False)

    def forward(
        self, batch: Batch, *, next_ids: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor:
        """Computes the loss sums of a row.

        Args:
            batch: the row; see `Batch` for shapes.
            next_ids: return the most likely next token at each target position instead, int64 [L]. This is an option of
                `forward` because ZeRO-3 gathers parameters only inside it.

        Returns:
            The fields of `LossSums` as a plain tuple, because ZeRO-3 rebuilds outputs by calling their type on a list.
        """
        states, head_weight = self._target_states(batch)
        if next_ids:
            return _most_likely_ids(states, head_weight)
        losses = token_losses(states, head_weight, batch.target_ids)
        weighted = losses * batch.target_weights
        by_source = weighted.new_zeros(self.num_sources)
        by_source.index_add_(0, batch.target_sources, weighted.detach())
        tokens = torch.zeros_like(by_source, dtype=torch.int64)
        tokens.index_add_(
            0, batch.target_sources, torch.ones_like(batch.target_sources)
        )  # bincount synchronizes with a GPU
        return weighted.sum(), by_source, tokens

    @torch.no_grad()
    def score(self, batch: Batch) -> TokenScores:
        """Scores the row's supervised tokens, each conditioned on the true preceding tokens."""
        states, head_weight = self._target_states(batch)
        losses = token_losses(states, head_weight, batch.target_ids)
        return TokenScores(losses, _most_likely_ids(states, head_weight) == batch.target_ids)

    @torch.no_grad()
    def target_logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the row's supervised tokens, [L, V]. They are large; this method is for comparisons."""
        states, head_weight = self._target_states(batch)
        return states @ head_weight.T

    def tile_features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Projected features of tiles.

        Args:
            tiles: uint8 [N, S, S, 3].

        Returns:
            [N, patches, D], patches row by row.
        """
        model = self.hf.model
        dtype = model.image_newline.dtype
        pixels = (tiles.permute(0, 3, 1, 2) * self.tile_scale + self.tile_shift).to(dtype)
        features = self._tower_features(pixels)
        return model.multi_modal_projector(features[:, self.num_prefix_tokens :])

    def _tower_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Output of the tower's last layer for normalized tiles, [N, prefix tokens and patches, width of the tower].

        The tower ends at the feature layer, so this is the feature, before any final norm. A hook takes it because
        `output_hidden_states` keeps the outputs of all layers in memory (1.8 GB for 64 tiles of ViT-L in bf16). The
        hook exists during the call only: it is then the last to run, after those that ZeRO-3 adds to the layer, and it
        does not run when the layer is recomputed.
        """
        outputs: list[torch.Tensor | tuple[torch.Tensor, ...]] = []
        layers = self.get_submodule(self.tower_layers_name)
        assert isinstance(layers, nn.ModuleList)
        hook = layers[-1].register_forward_hook(lambda _, args, output: outputs.append(output))
        try:
            self.hf.model.vision_tower(pixel_values=pixels)
        finally:
            hook.remove()
        (output,) = outputs
        return output[0] if isinstance(output, tuple) else output

    @property
    def blocks(self) -> dict[str, str]:
        """Module name of the list of transformer blocks of each part that has one."""
        return {"vision_tower": self.tower_layers_name, "language_model": "hf.model.language_model.layers"}

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the tower's patches: class tokens and register tokens."""
        return num_prefix_tokens(self.hf.config.vision_config)

    def _target_states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states that predict the supervised tokens, [L, D], and the head's weight, [V, D]."""
        model = self.hf.model
        features = self.tile_features(batch.tiles).flatten(0, 1)
        rows = [features, model.image_newline[None]]
        if len(batch.reduced_rows):
            rows.append(
                weighted_rows(
                    features,
                    batch.reduced_rows,
                    batch.reduced_weights,
                    batch.reduced_uses,
                    batch.reduced_use_weights,
                )
            )
        table = torch.cat(rows)
        embeds = self.hf.get_input_embeddings()(batch.input_ids)
        if len(batch.image_positions):
            embeds = embeds.index_copy(1, batch.image_positions, table[batch.image_sources][None])
        else:
            # Every part must run in every micro-step of every rank, because gradient reduction is collective.
            embeds = embeds + table.sum() * 0
        targets, segments = _last_block_positions(batch)
        states = model.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False, segments=segments, targets=targets
        ).last_hidden_state
        return states[0, batch.target_positions], self.hf.lm_head.weight


def _last_block_positions(batch: Batch) -> tuple[torch.Tensor, Segments]:
    """Positions at which the last block runs, int64 [L] with L at least 1, and segments with their numbers.

    A row without targets runs at position 0, whose output is not used. The autograd graph of a block must be the same
    for all rows: recompute stops at the last saved tensor, so with another graph a rank would gather other modules than
    the other ranks under ZeRO-3, and all ranks would hang. It also gives every weight a zero gradient.
    """
    targets, segments = batch.target_positions, batch.segments
    if len(targets):
        return targets, segments
    num_targets = (1, *(0 for _ in segments.lengths[1:]))
    return targets.new_zeros(1), replace(segments, num_targets=num_targets)


def _most_likely_ids(states: torch.Tensor, head_weight: torch.Tensor) -> torch.Tensor:
    """The token with the largest logit for each state, int64 [L]. Logits are computed for 512 states at a time."""
    return torch.cat([(part @ head_weight.T).argmax(-1) for part in states.split(512)])


def _check_no_dropout(hf: LlavaNextForConditionalGeneration) -> None:
    """Checks that no config enables dropout, which would make a step depend on ranks, rows and restarts."""
    for part, config in (("vision_tower", hf.config.vision_config), ("language_model", hf.config.text_config)):
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float) and value > 0:
                raise ModelError(
                    f"model.{part}: {config.model_type} uses dropout ({key}={value}), so a step would not be a "
                    f"function of its samples; set {key}: 0.0 in model.{part}.overrides"
                )


_num_feature_rows: dict[str, int] = {}
"""By the JSON of a tower's config the rows of features that it gives a tile: a process asks once for each tower."""


def _check_feature_rows(hf: LlavaNextForConditionalGeneration) -> None:
    """Raises ModelError unless the tower's output for a tile has one row per prefix token and per patch.

    Token counts rely on this. A tower of the same config runs on the meta device.
    """
    vision = hf.config.vision_config
    tile, prefix = vision.image_size, num_prefix_tokens(vision)
    patches = (tile // vision.patch_size) ** 2
    key = vision.to_json_string(use_diff=False)
    if key not in _num_feature_rows:
        with torch.device("meta"), torch.no_grad():
            tower = AutoModel.from_config(vision)
            states = tower(pixel_values=torch.empty(1, 3, tile, tile, dtype=tower.dtype), output_hidden_states=True)
        _num_feature_rows[key] = int(states.hidden_states[-1].shape[1])
    rows = _num_feature_rows[key]
    if rows != prefix + patches:
        raise ModelError(
            f"model.vision_tower: a {vision.model_type} computes {rows} rows of features for a tile of {tile} pixels, "
            f"but {prefix} prefix tokens and {patches} patches of {vision.patch_size} pixels were expected; correct "
            "its config.json"
        )


def _encoder_layers(tower: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and module of the tower's list of encoder layers."""
    depth = tower.config.num_hidden_layers
    lists = [(n, m) for n, m in tower.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise ModelError(f"{type(tower).__name__} has {len(lists)} module lists of {depth} layers, expected one")
    return lists[0]


def _remove_upper_layers(layers: nn.ModuleList, feature_layer: object) -> tuple[nn.Module, ...]:
    """Removes the layers above the feature layer from `layers` and returns them, frozen.

    Raises:
        ModelError: the feature layer is not a hidden state of the tower, or no layer would remain.
    """
    depth = len(layers)
    if not isinstance(feature_layer, int) or not -depth - 1 <= feature_layer <= depth:
        raise ModelError(
            f"model.vision_tower.feature_layer={feature_layer} is not a hidden state of a tower with {depth} layers; "
            f"use 1 to {depth}, or -{depth} to -1"
        )
    num_kept = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if num_kept == 0:
        raise ModelError(
            f"model.vision_tower.feature_layer={feature_layer} selects the input of the tower's first layer; use 1 to "
            f"{depth}, or -{depth} to -1"
        )
    upper = tuple(layers[num_kept:])
    del layers[num_kept:]
    for module in upper:
        module.requires_grad_(False)
    return upper
