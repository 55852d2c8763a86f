"""Text becomes tokens here and nowhere else.

An example's demonstration is its target or, of a chat that ends with the assistant, that last turn. What stands before
it is the prompt. An assistant's turn ends with a token that generation stops on: the template's own where it has one
(`<|im_end|>`), else the tokenizer's end token.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs.schema import PromptConfig
from rewards.base import Example

Message = Mapping[str, str]
Marked = tuple[list[int], list[bool]]
"""Token ids, and which of them the assistant writes."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "what the assistant says"
PLACEHOLDER = re.compile(r"\{(\w+)\}")


def prompt_text(example: Example, config: PromptConfig) -> str:
    """The example's prompt and columns inside the configured template, before any chat template."""
    parts = {**example.columns, "prompt": example.prompt}
    return PLACEHOLDER.sub(lambda found: _shown(parts[found[1]]) if found[1] in parts else found[0], config.template)


def _shown(part: Any) -> str:
    return "\n".join(map(str, part)) if isinstance(part, list) else str(part)


def demonstration(example: Example) -> str | None:
    """What SFT imitates at the end of the prompt; None where the example shows nothing."""
    return _last_turn(example) if example.target is None else example.target


def prompt_messages(example: Example, config: PromptConfig) -> list[Message]:
    """The chat that the demonstration or a completion answers; its own system message replaces the configured one."""
    messages = list(example.messages or [{"role": "user", "content": prompt_text(example, config)}])
    if example.target is None and _last_turn(example) is not None:
        messages.pop()
    if not messages:
        raise ValueError(f"example {example.id!r}: its chat has no message to answer")
    if config.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system})
    return messages


def prompt_tokens(example: Example, config: PromptConfig, tokenizer: Any) -> list[int]:
    """The token ids that a completion continues.

    With `chat`, the tokenizer's chat template has the last word on special tokens, so none is added to it. `ValueError`
    where the tokenizer has no chat template, or nothing comes out.
    """
    if is_chat(example, config):
        text = _render(prompt_messages(example, config), config, tokenizer, open_turn=True)
        tokens = list(tokenizer.encode(text, add_special_tokens=False))
    else:
        tokens = list(tokenizer.encode(prompt_text(example, config)))
    if not tokens:
        raise ValueError(f"example {example.id!r}: its prompt has no tokens")
    return tokens


def is_chat(example: Example, config: PromptConfig) -> bool:
    """The example goes through the chat template."""
    return config.chat or example.messages is not None


def target_tokens(target: str, tokenizer: Any, end: Sequence[int] | None = None) -> list[int]:
    """What SFT imitates after a prompt: the target and, unless it ends itself, `end`, by default the end token."""
    tokens = list(tokenizer.encode(target, add_special_tokens=False))
    return tokens if _ended(tokens, tokenizer) else [*tokens, *(plain_end(tokenizer) if end is None else end)]


def plain_end(tokenizer: Any) -> list[int]:
    """The tokenizer's end token. `ValueError` where it has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no end token: what it learns from targets would never stop")
    return [tokenizer.eos_token_id]


def end_of_turn(config: PromptConfig, tokenizer: Any) -> list[int]:
    """What the chat template writes behind an assistant's words, up to the first token that generation stops on.

    The tokenizer's end token where there is none such: a base model's template may close turns with a token that its
    generation runs over.
    """
    text = _render([{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}], config, tokenizer)
    tokens = list(tokenizer.encode(text.rpartition(PROBE)[2], add_special_tokens=False))
    stop = _first_end(tokens, tokenizer)
    return plain_end(tokenizer) if stop is None else tokens[: stop + 1]


def chat_tokens(example: Example, config: PromptConfig, tokenizer: Any) -> Marked:
    """The whole chat with its demonstration, and every token that the assistant writes in it, ends of turns included.

    From the template's `{% generation %}` blocks where it has them. Else the chat up to each turn is rendered;
    `ValueError` where that is not how the whole chat begins, as with templates that drop the reasoning of earlier
    turns. Template text behind the last of the assistant's tokens is left out.
    """
    shown = demonstration(example)
    assert shown is not None, "an example without a demonstration has nothing to imitate"
    messages = [*prompt_messages(example, config), {"role": "assistant", "content": shown}]
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and GENERATION.search(template):
        tokens, own = _marked_by_template(messages, config, tokenizer)
    else:
        tokens, own = _marked_by_prefixes(example, messages, config, tokenizer)
    if not any(own) or own[0]:
        where = "the very first token" if any(own) else "nothing"
        raise ValueError(f"example {example.id!r}: the chat template marks {where} as the assistant's")
    return _through_last_turn(tokens, _through_ends(tokens, own, tokenizer), tokenizer)


def completion_text(tokens: tuple[int, ...], tokenizer: Any, eos: frozenset[int]) -> str:
    """The text of a completion, without its end token."""
    kept = tokens[:-1] if tokens and tokens[-1] in eos else tokens
    return tokenizer.decode(list(kept), skip_special_tokens=True)


def _last_turn(example: Example) -> str | None:
    """What the assistant says at the end of the example's chat."""
    last = (example.messages or ({"role": ""},))[-1]
    return last["content"] if last["role"] == "assistant" else None


def _render(messages: Sequence[Message], config: PromptConfig, tokenizer: Any, *, open_turn: bool = False) -> str:
    if not tokenizer.has_chat_template:
        raise ValueError("prompt.chat: the model's tokenizer has no chat template; set chat: false")
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=open_turn, **config.chat_template_args
    )


def _marked_by_template(messages: Sequence[Message], config: PromptConfig, tokenizer: Any) -> Marked:
    # mlx-lm's wrapper never returns a dict, so the wrapped tokenizer is asked, with the wrapper's default for thinking.
    settings = {"enable_thinking": tokenizer.has_thinking, **config.chat_template_args}
    encoded = tokenizer._tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **settings
    )
    return list(encoded["input_ids"]), [bool(own) for own in encoded["assistant_masks"]]


def _marked_by_prefixes(example: Example, messages: Sequence[Message], config: PromptConfig, tokenizer: Any) -> Marked:
    if messages[0]["role"] == "assistant":
        raise ValueError(
            f"example {example.id!r}: its chat begins with the assistant, so nothing stands before that turn"
        )
    whole = _render(messages, config, tokenizer)
    tokens: list[int] = []
    own: list[bool] = []
    done = 0
    for turn in [place for place, message in enumerate(messages) if message["role"] == "assistant"]:
        opening = _render(messages[:turn], config, tokenizer, open_turn=True)
        closing = _render(messages[: turn + 1], config, tokenizer)
        if not (whole.startswith(opening) and whole.startswith(closing) and done <= len(opening) < len(closing)):
            raise ValueError(
                f"example {example.id!r}: the chat template renders message {turn} differently once others follow, so "
                "it can't be imitated in place; set loss_on: target, or give the template {% generation %} blocks"
            )
        # Prompt and turn are encoded apart, as they are when the model writes the turn.
        for text, mine in ((whole[done : len(opening)], False), *_turn(whole[len(opening) : len(closing)], tokenizer)):
            piece = tokenizer.encode(text, add_special_tokens=False)
            tokens += piece
            own += [mine] * len(piece)
        done = len(closing)
    return tokens, own


def _turn(text: str, tokenizer: Any) -> list[tuple[str, bool]]:
    """A turn's text; where no end token closes it, the white space behind it is the template's."""
    if _first_end(tokenizer.encode(text, add_special_tokens=False), tokenizer) is not None:
        return [(text, True)]
    words = text.rstrip()
    return [(words, True), (text[len(words) :], False)]


def _through_ends(tokens: Sequence[int], own: Sequence[bool], tokenizer: Any) -> list[bool]:
    """The same mask, but a turn goes through its first end token and no further."""
    ends, before, running = set(tokenizer.eos_token_ids), False, False
    trained = []
    for token, mine in zip(tokens, own, strict=True):
        running = running or (mine and not before)
        trained.append(running and (mine or token in ends))
        running, before = running and mine and token not in ends, mine
    return trained


def _through_last_turn(tokens: list[int], trained: list[bool], tokenizer: Any) -> Marked:
    last = len(trained) - trained[::-1].index(True)
    tokens, trained = tokens[:last], trained[:last]
    end = [] if _ended(tokens, tokenizer) else plain_end(tokenizer)
    return tokens + end, trained + [True] * len(end)


def _ended(tokens: Sequence[int], tokenizer: Any) -> bool:
    return bool(tokens) and tokens[-1] in tokenizer.eos_token_ids


def _first_end(tokens: Sequence[int], tokenizer: Any) -> int | None:
    """The place of the first token that generation stops on."""
    return next((place for place, token in enumerate(tokens) if token in tokenizer.eos_token_ids), None)
