import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchKVCache

from configs.schema import SamplingConfig
from mlx_ops.generation import generate
from mlx_ops.holding import PagedRows, prefill
from mlx_ops.paged_cache import BlockPool, PagedKVCache, Pages, paged_cache
from tests.mlx_ops.tiny import tiny_model

HEADS, SIZE, PAGE = 2, 32, 4


def held_blocks(pages: Pages) -> list[int]:
    return [block for table in pages.tables for block in table]


def check_books(pages: Pages) -> None:
    """Holders count the tables that name a block, and what no table names is free."""
    named = held_blocks(pages)
    assert pages.pool.holders == [named.count(block) for block in range(len(pages.pool.holders))]
    assert pages.pool.free == pages.pool.holders.count(0)


def test_a_pool_hands_out_what_is_free_and_grows_when_nothing_is():
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    assert {first, second} == {0, 1}
    pool.share(first)
    pool.give_back(first)
    assert pool.free == 0
    pool.give_back(first)
    assert pool.take() == first
    assert pool.take() not in (first, second)
    with pytest.raises(AssertionError, match="is free"):
        BlockPool(1).give_back(0)


def test_full_blocks_of_a_prompt_are_shared_and_begun_ones_are_not():
    pages = Pages(size=4)
    pages.join(10)
    table = list(pages.tables[0])
    pages.join(10, table[:2])
    assert pages.tables[1][:2] == table[:2]
    assert pages.tables[1][2] != table[2]
    assert [pages.pool.holders[block] for block in table] == [2, 2, 1]
    pages.keep([1])
    assert [pages.pool.holders[block] for block in table] == [1, 1, 0]
    check_books(pages)


Action = tuple[str, int, int]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(0, 11), st.integers(1, 4)),
        st.tuples(st.just("leave"), st.integers(0, 2**16), st.just(0)),
        st.tuples(st.just("draw"), st.integers(1, 3), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_no_schedule_of_joins_and_leaves_loses_or_shares_a_block_wrongly(actions: list[Action]):
    """Every token is a number of its own, so a row that reads another's block, or a freed one, is seen."""
    pages = Pages(PAGE)
    cache = PagedKVCache(pages)
    rows: list[list[float]] = []
    fresh = iter(range(1, 100_000))

    def block_of(numbers: list[list[float]]) -> mx.array:
        array = np.array(numbers, dtype=np.float32)[:, None, :, None]
        return mx.array(np.broadcast_to(array, (len(numbers), HEADS, array.shape[2], SIZE)).copy())

    for action, number, group in actions:
        if action == "join":
            prompt = [float(next(fresh)) for _ in range(number)]
            join(cache, prompt, group, block_of)
            rows += [list(prompt) for _ in range(group)]
        elif action == "leave" and rows:
            gone = {place for place in range(len(rows)) if number >> place % 16 & 1}
            kept = [place for place in range(len(rows)) if place not in gone]
            pages.keep(kept)
            cache.written = [cache.written[place] for place in kept]
            rows = [rows[place] for place in kept]
        elif action == "draw" and rows:
            new = [[float(next(fresh)) for _ in range(number)] for _ in rows]
            keys, values = cache.update_and_fetch(block_of(new), -block_of(new))
            rows = [row + more for row, more in zip(rows, new, strict=True)]
            assert keys.shape == (len(rows), HEADS, max(map(len, rows)), SIZE)
            for place, row in enumerate(rows):
                assert np.array(keys[place, 1, : len(row), 3]).tolist() == row
                assert np.array(values[place, 0, : len(row), 0]).tolist() == [-x for x in row]
        check_books(pages)
        begun = [(table, row) for table, row in zip(pages.tables, rows, strict=True) if len(row) % PAGE]
        written_next = [table[len(row) // PAGE] for table, row in begun]
        assert all(pages.pool.holders[block] == 1 for block in written_next)


def join(cache: PagedKVCache, prompt: list[float], group: int, block_of) -> None:
    """As the engine does: the prompt's pages once, and a copy of the begun one for every other row."""
    pages, full = cache.pages, len(prompt) // PAGE
    first = pages.tables[pages.join(len(prompt))]
    begun = [first[full:]] + [pages.tables[pages.join(len(prompt), first[:full])][full:] for _ in range(group - 1)]
    cache.written += [len(prompt)] * group
    if prompt:
        padded = prompt + [0.0] * (-len(prompt) % PAGE)
        loaded = block_of([padded]).reshape(HEADS, -1, PAGE, SIZE).swapaxes(0, 1)
        cache.store([loaded, -loaded], 0, first[:full])
        for blocks in begun:
            cache.store([loaded, -loaded], full, blocks)


def test_mlx_lms_own_loop_runs_on_pages_token_for_token():
    model, prompt = tiny_model(), mx.array([5, 9, 2, 33, 7, 1, 60])
    plain = [int(token) for token, _ in generate_step(prompt, model, max_tokens=40)]
    caches = paged_cache(model, size=4)
    paged = [int(token) for token, _ in generate_step(prompt, model, max_tokens=40, prompt_cache=caches)]
    assert paged == plain
    assert caches[0].size() == 7 + 40
    assert len(set(paged)) > 5


def test_eight_bit_pages_stay_close_and_hold_a_third():
    model = tiny_model(head_dim=32)
    tokens = mx.array([[5, 9, 2, 33, 7, 1, 60, 12, 40, 3]])
    wide, narrow = paged_cache(model), paged_cache(model, bits=8)
    exact, close = model(tokens, cache=wide), model(tokens, cache=narrow)
    assert float(mx.abs(exact - close).max()) < 0.05 * float(mx.abs(exact).max())
    assert not mx.array_equal(exact, close)
    # 8 bits and two float32 scales for 32 numbers of 4 bytes: (32 + 8) / 128.
    assert narrow[0].nbytes / wide[0].nbytes == pytest.approx(0.3125)


def test_8_bit_pages_serve_the_engine():
    model = tiny_model(head_dim=32)
    drawn = generate(
        model,
        [[1, 2, 3], [4, 5]],
        sampling=SamplingConfig(max_tokens=6),
        seeds=range(4),
        eos=frozenset(),
        group_size=2,
        cache="paged8",
    )
    assert [len(c.tokens) for c in drawn] == [6] * 4


def test_windows_and_recurrent_layers_are_refused_with_the_reason():
    model = tiny_model(layer_types=["sliding_attention", "full_attention"], sliding_window=6)
    with pytest.raises(ValueError, match="RotatingKVCache"):
        paged_cache(model)
    with pytest.raises(ValueError, match="window"):
        PagedKVCache(Pages()).make_mask(3, window_size=4)


def test_a_group_of_16_with_a_long_prompt_holds_at_most_035_of_batch_kv_cache():
    """512 prompt tokens and 128 new: pages keep 512 + 16 x 128 of the 16 x 640 columns that rows of their own have."""
    model = tiny_model(num_hidden_layers=1)
    source = random.Random(0)
    prompt = [source.randrange(64) for _ in range(513)]
    held = PagedRows(model, [prompt], [0] * 16, bits=None)
    whole = BatchKVCache([0] * 16)
    prompt_keys, prompt_values = (mx.repeat(array, 16, axis=0) for array in prefill(model, [prompt])[0].state)
    whole.update_and_fetch(prompt_keys, prompt_values)
    for _ in range(128):
        new = mx.zeros((16, 2, 1, 8))
        mx.eval(held.caches[0].update_and_fetch(new, new), whole.update_and_fetch(new, new))
    assert held.caches[0].offset == 640
    assert held.caches[0].nbytes <= 0.35 * whole.nbytes


def test_rows_that_leave_make_room_for_those_that_join():
    model = tiny_model()
    held = PagedRows(model, [[1] * 40], [0] * 4, bits=None)
    size = held.caches[0].pages.pool.free
    for _ in range(20):
        held.keep([0, 1], 0)
        held.join([[2] * 40], [0, 0], 0)
    assert held.caches[0].pages.pool.free >= size - 4
    assert len(held.caches[0].pages.pool.holders) == 64
    held.keep([], 0)
    assert held.caches[0].pages.pool.free == 64
