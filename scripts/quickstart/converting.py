"""Turns model files of packages into Hugging Face directories: DINOv2-small, SmolLM2-135M-Instruct, tokenizers.

Only numpy, onnx, gguf, tokenizers and safetensors are needed, no torch, so a conversion starts at once. The
tensors get the names of the published checkpoints, which `from_pretrained` of every transformers version
reads. Where the files come from stands in assets.py.
"""

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[np.float32]]

DINOV2_SMALL: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "dtype": "float32",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 384,
    "image_size": 518,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}

# What the tower was trained with; the framework cuts and normalises tiles by these numbers.
DINOV2_PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 518},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 518, "width": 518},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_json(path: Path, value: Any) -> None:
    """Write JSON as published model directories have it (two spaces, UTF-8, a last newline)."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def dinov2_tensors(onnx_file: Path) -> Tensors:
    """The DINOv2-small backbone inside a larger ONNX graph, under its published tensor names.

    The exporter kept the names of vectors and dropped those of matrices, which stand transposed as second
    input of the MatMul that is named after their module. It also split the position embedding into class
    and patches. Raises ValueError if the graph holds something else.
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
    # Used only when patches are masked in self-supervised training; absent from the graph.
    tensors["embeddings.mask_token"] = np.zeros((1, DINOV2_SMALL["hidden_size"]), np.float32)
    check_dinov2(tensors)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in sorted(tensors.items())}


def check_dinov2(tensors: Tensors) -> None:
    """Raise ValueError unless the names, shapes and values are those of a DINOv2-small."""
    wanted = _dinov2_shapes()
    found = {name: value.shape for name, value in tensors.items()}
    if found != wanted:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(f"the ONNX graph is not the expected DINOv2-small; these tensors differ: {differing[:5]}")
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"values that are not finite in {broken[:5]}")


def _dinov2_shapes() -> dict[str, tuple[int, ...]]:
    width, inner, patch = 384, 4 * 384, 14
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 1 + (518 // patch) ** 2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for index in range(12):
        layer = f"encoder.layer.{index}"
        linears = {f"attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
        linears |= {
            "attention.output.dense": (width, width),
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
        }
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        for name in ("norm1", "norm2"):
            shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (width,)
        for name in ("layer_scale1", "layer_scale2"):
            shapes[f"{layer}.{name}.lambda1"] = (width,)
    return shapes


def write_dinov2(onnx_file: Path, folder: Path) -> None:
    """DINOv2-small as a directory that `Dinov2Model.from_pretrained` loads."""
    save_file(dinov2_tensors(onnx_file), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", DINOV2_SMALL)
    write_json(folder / "preprocessor_config.json", DINOV2_PREPROCESSOR)


def _gguf_fields(gguf_file: Path) -> tuple[Any, dict[str, Any]]:
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_file))
    return reader, {name: field.contents() for name, field in reader.fields.items()}


def write_smollm2_tokenizer(gguf_file: Path, folder: Path) -> None:
    """SmolLM2's tokenizer and chat template as files that `AutoTokenizer.from_pretrained` loads.

    Built from the vocabulary and merges in the GGUF with the model's own pre-tokenisation (every digit by
    itself, then byte-level), which transformers' reader of GGUF files leaves out.
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
"""Of SmolLM2's thirty: the first turn tokens into meaning and the last turn meaning into tokens. Of the choices of
six that were tried, this one predicts text best without any training (11.3 nats a token; the first six: 20.4)."""


def write_smollm2_six_layers(gguf_file: Path, folder: Path) -> None:
    """SmolLM2-135M-Instruct with six of its layers, for two cores; otherwise as `write_smollm2`."""
    write_smollm2(gguf_file, folder, QUICKSTART_LAYERS)


def write_smollm2(gguf_file: Path, folder: Path, layers: tuple[int, ...] | None = None) -> None:
    """SmolLM2-135M-Instruct in fp32, with its tokenizer, as AutoModelForCausalLM.from_pretrained loads it.

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
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = _llama_config(fields)
    write_json(folder / "config.json", config | ({"num_hidden_layers": len(layers)} if layers else {}))
    ids = {f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    write_json(folder / "generation_config.json", ids | {"pad_token_id": fields["tokenizer.ggml.padding_token_id"]})
    write_smollm2_tokenizer(gguf_file, folder)


def _kept_name(name: str, layers: tuple[int, ...] | None) -> str | None:
    """The tensor's name when only `layers` are kept and numbered anew; None if it is not kept."""
    parts = name.split(".")
    if layers is None or parts[1] != "layers":
        return name
    if int(parts[2]) not in layers:
        return None
    return ".".join([*parts[:2], str(layers.index(int(parts[2]))), *parts[3:]])


def _halves_from_pairs(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of rows: it rotates neighbours in a head, Hugging Face a head's two halves."""
    split = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def _llama_name(name: str) -> str:
    """`blk.3.ffn_up.weight` → `model.layers.3.mlp.up_proj.weight`; KeyError for a name of no Llama."""
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


_LLAMA_TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


def write_vicuna_tokenizer(source: Path, folder: Path) -> None:
    """Vicuna v1.5's tokenizer (Llama's 32,000 pieces) from the two tables inside a JavaScript file.

    As its directory has it: `legacy: false` (no word mark behind an end token), and it opens each text with `<s>`.
    Raises ValueError if a table is missing.
    """
    from tokenizers import AddedToken, Tokenizer, models, processors

    tables = dict(re.findall(r'const (llama_\w+) = "([^"]+)"', source.read_text(encoding="utf-8")))
    if not {"llama_vocab_base64", "llama_merges_binary"} <= tables.keys():
        raise ValueError(f"{source.name} holds other tables than expected: {sorted(tables)}")
    pieces = base64.b64decode(tables["llama_vocab_base64"]).decode().split("\n")
    pairs = struct.iter_unpack("<2H", base64.b64decode(tables["llama_merges_binary"]))
    vocabulary = {piece: row for row, piece in enumerate(pieces)}
    merges = [(pieces[left], pieces[right]) for left, right in pairs]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _LLAMA_TOKENIZER | {"legacy": False})


def write_mistral_tokenizer(source: Path, folder: Path) -> None:
    """Mistral-7B-Instruct's first tokenizer: the package's file as it is, with the published settings."""
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    write_json(folder / "tokenizer_config.json", _LLAMA_TOKENIZER | {"legacy": True})


def write_qwen_tokenizer(source: Path, folder: Path) -> None:
    """Qwen1.5's and Qwen2's tokenizer: Qwen3's without the later special tokens, merges in the older notation."""
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    specials = ["<|im_start|>", "<|im_end|>"]
    known = ["<|endoftext|>", *specials]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] in known]
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    write_json(folder / "tokenizer.json", tokenizer)
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": specials,
        "bos_token": None,
    }
    settings |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)


def write_llama3_tokenizer(source: Path, folder: Path) -> None:
    """Llama-3-Instruct's tokenizer: the package's file, with the published settings and chat template, and with the
    published post-processor, which opens each text with `<|begin_of_text|>` (the package's adds no token)."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(source))
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    turn = (
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>'"
    )
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    settings["chat_template"] = (
        "{% for message in messages %}{% set content = " + turn + " %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    write_json(folder / "tokenizer_config.json", settings)
