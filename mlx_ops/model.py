"""Policies: an mlx-lm model and its tokenizer, loaded, made from scratch, given adapters, written back.

Everything on disk is mlx-lm's layout, which `mlx_lm.load`, `mlx_lm.server` and transformers read unchanged.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes, load_model, load_tokenizer, save_model

from configs.atomic import link_or_copy
from configs.schema import Adapter, FullAdapter, LoraAdapter, ScratchModel
from mlx_ops.batching import Tree

DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth")
TRANSFORMERS_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


@dataclass(frozen=True)
class Policy:
    """A language model and what turns text into its tokens."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    path: Path
    """The folder that the weights were read from."""

    @property
    def eos(self) -> frozenset[int]:
        return frozenset(self.tokenizer.eos_token_ids)


def load_policy(directory: Path, dtype: mx.Dtype | None = None) -> Policy:
    """The model in a folder, in evaluation mode; `dtype` casts its floating-point weights.

    `FileNotFoundError` for a missing folder or weights, `ValueError` for an architecture that mlx-lm doesn't have.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"model: no such folder: {directory}")
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"model: {directory} has no config.json, so it is not a model folder")
    model, config = load_model(directory, lazy=True)
    if dtype is not None:
        model.set_dtype(dtype)
    mx.eval(model.parameters())
    # Said, so that transformers doesn't ask the terminal whether it may run a folder's code.
    never = {"trust_remote_code": False}
    return Policy(model, load_tokenizer(directory, never, eos_token_ids=_ids(config.get("eos_token_id"))), directory)


def _ids(value: int | list[int] | None) -> list[int] | None:
    return [value] if isinstance(value, int) else value


def copy_model(source: Path, directory: Path) -> None:
    """A model folder made of hard links to `source` where the file system allows it, else of copies."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            link_or_copy(file.resolve(), directory / file.name)


def make_scratch(config: ScratchModel, texts: Iterable[str], directory: Path, seed: int) -> None:
    """Write a model with random weights, and a byte-level BPE tokenizer trained on `texts`, into a folder."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokenizer.save_pretrained(directory)
    settings = _scratch_settings(config, tokenizer)
    (directory / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    model_class, args_class = _get_classes(settings)
    mx.random.seed(seed)
    save_model(directory, model_class(args_class.from_dict(settings)))


def _scratch_settings(config: ScratchModel, tokenizer: Any) -> dict[str, Any]:
    sizes = config.model_dump(exclude={"kind", "architecture", "extra"})
    name = TRANSFORMERS_CLASSES.get(config.architecture)
    return {
        "model_type": config.architecture,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "hidden_act": "gelu" if config.architecture == "gemma" else "silu",
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **({"architectures": [name]} if name else {}),
        **sizes,
        **config.extra,
        # The embedding has a row for each token that the tokenizer really has.
        "vocab_size": max(len(tokenizer), 1),
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer (arXiv:1508.07909) with single digits, an end token and a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # pyright: ignore[reportCallIssue]
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def add_adapter(model: nn.Module, adapter: Adapter, seed: int) -> None:
    """Leave trainable what `adapter` says: every weight, or new low-rank layers over a frozen model. In place."""
    if isinstance(adapter, FullAdapter):
        model.unfreeze()
        return
    depth = _depth(model)
    if adapter.layers > depth:
        raise ValueError(f"adapter.layers: {adapter.layers} of a model with {depth} blocks")
    model.freeze()
    mx.random.seed(seed)
    linear_to_lora_layers(
        model, depth if adapter.layers < 0 else adapter.layers, _lora(adapter), adapter.kind == "dora"
    )
    if not tree_flatten(model.trainable_parameters()):
        raise ValueError(f"adapter.keys: {list(adapter.keys or ())} name no linear layer of a block")
    model.eval()


def _depth(model: nn.Module) -> int:
    return len(cast(Any, model).layers)


def _lora(adapter: LoraAdapter) -> dict[str, Any]:
    keys = {} if adapter.keys is None else {"keys": list(adapter.keys)}
    return {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, **keys}


def write_adapter(model: nn.Module, adapter: LoraAdapter, directory: Path) -> None:
    """The adapter alone, as `mlx_lm.load(base, adapter_path=…)` reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    layers = _depth(model) if adapter.layers < 0 else adapter.layers
    settings = {"fine_tune_type": adapter.kind, "num_layers": layers, "lora_parameters": _lora(adapter)}
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    mx.save_safetensors(str(directory / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))


def write_model(model: nn.Module, source: Path, directory: Path) -> None:
    """The whole model with `source`'s settings and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, directory / file.name)
    save_model(directory, model)


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Adapter weights into a model that carries such an adapter; `ValueError` names the first that doesn't fit."""
    weights = cast(dict[str, mx.array], mx.load(str(directory / "adapters.safetensors")))
    trainable = dict(tree_flatten(model.trainable_parameters()))
    for name, array in weights.items():
        if name not in trainable or trainable[name].shape != array.shape:
            expected = trainable[name].shape if name in trainable else "no such weight"
            raise ValueError(f"adapter {directory}: {name} {array.shape} doesn't fit the model ({expected})")
    model.load_weights(list(weights.items()), strict=False)


def fuse_adapters(model: nn.Module) -> None:
    """Fold the adapters into the weights, in place; layers over quantised weights come out in full precision.

    Requantising such a layer would round most of a small update away.
    """
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten([(name, cast(Any, module).fuse(dequantize=True)) for name, module in layers]))


def snapshot(model: nn.Module) -> Tree:
    """The trainable weights as they are. Arrays never change in place: this costs nothing until the model moves on."""
    return tree_map(lambda array: array, model.trainable_parameters())


def finite(model: nn.Module) -> bool:
    """Every weight of the model is a finite number."""
    arrays = [cast(mx.array, array) for _, array in tree_flatten(model.parameters())]
    floating = [array for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
    return bool(mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in floating])).item())
