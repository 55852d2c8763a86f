"""What SFT imitates, as tokens."""

from dataclasses import dataclass
from typing import Any, Literal

from configs.schema import PromptConfig
from mlx_ops.prompts import chat_tokens, demonstration, end_of_turn, is_chat, plain_end, prompt_tokens, target_tokens
from rewards.base import Example


@dataclass(frozen=True)
class Pair:
    """A prompt and what follows it; the end token included."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    mask: tuple[bool, ...] = ()
    """Which tokens of the target are imitated; all of them where empty."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def trained(self) -> tuple[bool, ...]:
        """For each token of the target whether it is imitated."""
        return self.mask or (True,) * len(self.target)


def make_pair(
    example: Example, prompt: PromptConfig, tokenizer: Any, loss_on: Literal["target", "assistant"]
) -> Pair | None:
    """The example as tokens, None for one that demonstrates nothing.

    On the assistant's turns, the prompt ends before the first of them, and the rest of the chat is the target.
    """
    target = demonstration(example)
    if target is None:
        return None
    if loss_on == "assistant" and example.messages is not None:
        tokens, own = chat_tokens(example, prompt, tokenizer)
        first = own.index(True)
        return Pair(tuple(tokens[:first]), tuple(tokens[first:]), tuple(own[first:]))
    end = end_of_turn(prompt, tokenizer) if is_chat(example, prompt) else plain_end(tokenizer)
    return Pair(tuple(prompt_tokens(example, prompt, tokenizer)), tuple(target_tokens(target, tokenizer, end)))
