"""Text becomes tokens here and nowhere else."""

from typing import Any

from configs.schema import PromptConfig
from rewards.base import Example


def prompt_text(example: Example, config: PromptConfig) -> str:
    """The example's prompt inside the configured template, before any chat template."""
    return config.template.replace("{prompt}", example.prompt)


def prompt_tokens(example: Example, config: PromptConfig, tokenizer: Any) -> list[int]:
    """The token ids that a completion continues.

    With `chat`, the tokenizer's chat template has the last word on special tokens, so none is added to it. `ValueError`
    where the tokenizer has no chat template, or nothing comes out.
    """
    if not config.chat and example.messages is None:
        tokens = list(tokenizer.encode(prompt_text(example, config)))
    else:
        tokens = _chat_tokens(example, config, tokenizer)
    if not tokens:
        raise ValueError(f"example {example.id!r}: its prompt has no tokens")
    return tokens


def _chat_tokens(example: Example, config: PromptConfig, tokenizer: Any) -> list[int]:
    if not tokenizer.has_chat_template:
        raise ValueError("prompt.chat: the model's tokenizer has no chat template; set chat: false")
    messages = list(example.messages or [{"role": "user", "content": prompt_text(example, config)}])
    if config.system is not None:
        messages = [{"role": "system", "content": config.system}, *messages]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **config.chat_template_args
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def target_tokens(target: str, tokenizer: Any) -> list[int]:
    """What SFT imitates after a prompt: the target and the end token."""
    return [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]


def completion_text(tokens: tuple[int, ...], tokenizer: Any, eos: frozenset[int]) -> str:
    """The text of a completion, without its end token."""
    kept = tokens[:-1] if tokens and tokens[-1] in eos else tokens
    return tokenizer.decode(list(kept), skip_special_tokens=True)
