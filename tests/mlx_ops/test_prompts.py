from itertools import groupby

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from configs.schema import PromptConfig
from mlx_ops.model import train_tokenizer
from mlx_ops.pairs import make_pair
from mlx_ops.prompts import chat_tokens, demonstration, end_of_turn, prompt_text, prompt_tokens, target_tokens
from rewards.base import Example

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REASONING = (  # like Qwen3's: only the last turn keeps its (here empty) reasoning
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHERS = "{% if m['role'] != 'assistant' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"


def marked(block: str) -> str:
    """ChatML whose assistant turns are this `{% generation %}` block and what follows it."""
    opening = "{{ '<|im_start|>assistant\n' }}"
    turns = "{% for m in messages %}" + OTHERS + "{% else %}" + opening + block + "{% endif %}{% endfor %}"
    return turns + "{% if add_generation_prompt %}" + opening + "{% endif %}"


BLOCKS = {
    "through the end token": "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "past the end token": "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}",
    "words only": "{%- generation -%}{{ m['content'] }}{%- endgeneration -%}{{ '<|im_end|>\n' }}",
}
CHAT = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Go"},
)
EXAMPLE = Example("talk", "Go", messages=CHAT, target="Bye")


def tokenizer(template: str, *stops: str) -> TokenizerWrapper:
    """Bytes and four special tokens; generation stops on `<eos>` and on `stops`."""
    inner = train_tokenizer(["hello"], 280)
    inner.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]})
    inner.chat_template = template
    return TokenizerWrapper(inner, eos_token_ids=[inner.convert_tokens_to_ids(stop) for stop in stops])


def written(tokens, own, words) -> list[str]:
    """The runs of text that the assistant writes."""
    runs = groupby(zip(tokens, own, strict=True), key=lambda pair: pair[1])
    return [words.decode([token for token, _ in run]) for mine, run in runs if mine]


@pytest.mark.parametrize("template", [CHATML, *map(marked, BLOCKS.values())], ids=["by prefixes", *BLOCKS])
def test_each_turn_of_the_assistant_is_marked_through_its_end_token(template):
    words = tokenizer(template, "<|im_end|>")
    tokens, own = chat_tokens(EXAMPLE, PromptConfig(), words)
    assert written(tokens, own, words) == ["Hi there<|im_end|>", "Bye<|im_end|>"]
    assert words.decode(tokens) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n"
        "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\nBye<|im_end|>"
    )


def test_without_an_end_of_turn_in_the_template_only_the_last_turn_ends():
    words = tokenizer(PLAIN)
    tokens, own = chat_tokens(EXAMPLE, PromptConfig(), words)
    assert written(tokens, own, words) == ["Hi there", "Bye<eos>"]
    assert words.decode(tokens) == "user: Hello\nassistant: Hi there\nuser: Go\nassistant: Bye<eos>"


def test_a_turn_follows_the_tokens_that_prompt_it_in_generation():
    words = tokenizer(PLAIN)
    tokens, own = chat_tokens(EXAMPLE, PromptConfig(), words)
    opening = prompt_tokens(Example("first", "", messages=CHAT[:1]), PromptConfig(), words)
    assert tokens[: own.index(True)] == opening


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name():
    words = tokenizer(REASONING, "<|im_end|>")
    with pytest.raises(ValueError, match=r"'talk': the chat template renders message 1 differently .* loss_on: target"):
        chat_tokens(EXAMPLE, PromptConfig(), words)
    # One turn is the last one: what its template puts before the words is the model's to write.
    tokens, own = chat_tokens(Example("one", "", messages=CHAT[:1], target="Hi"), PromptConfig(), words)
    assert written(tokens, own, words) == ["<think></think>Hi<|im_end|>"]


def test_a_chat_that_begins_with_the_assistant_is_refused_by_name():
    with pytest.raises(ValueError, match="'talk': its chat begins with the assistant"):
        chat_tokens(Example("talk", "", messages=CHAT[1:], target="Bye"), PromptConfig(), tokenizer(CHATML))


@pytest.mark.parametrize(
    ("template", "stops", "expected"),
    [
        (CHATML, ("<|im_end|>",), "<|im_end|>"),
        (CHATML, (), "<eos>"),  # a base model that runs over its template's end of turn
        (PLAIN, ("<|im_end|>",), "<eos>"),
        (CHATML.replace("<|im_end|>", " <eos>"), (), " <eos>"),
    ],
)
def test_a_target_ends_as_the_template_ends_turns_if_generation_stops_there(template, stops, expected):
    words = tokenizer(template, *stops)
    end = end_of_turn(PromptConfig(), words)
    assert words.decode(end) == expected
    once = target_tokens("Bye", words, end)
    assert words.decode(once) == "Bye" + expected
    assert target_tokens("Bye" + expected, words, end) == once


def test_the_target_alone_is_imitated_or_every_turn():
    words = tokenizer(CHATML, "<|im_end|>")
    last = make_pair(EXAMPLE, PromptConfig(), words, "target")
    every = make_pair(EXAMPLE, PromptConfig(), words, "assistant")
    assert last is not None
    assert every is not None
    assert words.decode(last.target) == "Bye<|im_end|>"
    assert words.decode(last.prompt).endswith("Go<|im_end|>\n<|im_start|>assistant\n")
    assert words.decode(every.prompt) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert (*last.prompt, *last.target) == (*every.prompt, *every.target)
    assert every.trained[-len(last.target) :] == last.trained


def test_the_last_turn_of_a_chat_is_its_target_where_it_has_no_other():
    words = tokenizer(CHATML, "<|im_end|>")
    ending = Example("talk", "Go", messages=(*CHAT, {"role": "assistant", "content": "Bye"}))
    assert demonstration(ending) == "Bye"
    for loss_on in ("target", "assistant"):
        assert make_pair(ending, PromptConfig(), words, loss_on) == make_pair(EXAMPLE, PromptConfig(), words, loss_on)
    assert demonstration(Example("talk", "Go", messages=CHAT)) is None
    assert make_pair(Example("talk", "Go", messages=CHAT), PromptConfig(), words, "assistant") is None


def test_a_chat_keeps_its_own_system_message():
    words, config = tokenizer(PLAIN), PromptConfig(system="Be brief.")
    own = ({"role": "system", "content": "Be long."}, *CHAT[:1])
    longer = prompt_tokens(Example("a", "", messages=own), config, words)
    assert words.decode(longer) == "system: Be long.\nuser: Hello\nassistant: "
    briefer = prompt_tokens(Example("a", "Hello"), config, words)
    assert words.decode(briefer) == "system: Be brief.\nuser: Hello\nassistant: "


def test_a_template_shows_columns_beside_the_prompt_and_leaves_other_braces_alone():
    config = PromptConfig(template="{prompt}\n{tests}\n{level} {none} {{}}")
    example = Example("ex", "Add {level}.", columns={"tests": ["assert a", "assert b"], "level": 2, "prompt": "no"})
    assert prompt_text(example, config) == "Add {level}.\nassert a\nassert b\n2 {none} {{}}"
