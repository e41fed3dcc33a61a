"""Attend: the Triton kernel of sparse attention over listed tiles of keys.

    for each tile of queries (one program), over the tiles of keys listed for it:
        s = factor * q k^T                          factor = scale * log2(e), positive
        s = -inf    where the key is padding, or its pattern drops the pair
        m, l, o = max(m, s), l' + sum 2^(s - m), o' + 2^(s - m) v
    output = o / l        lse = (m + log2 l) * ln 2        (0 and -inf where l = 0)

A program walks five lists, one after the other, each a loop of its own: whole tiles, which need no
mask; tiles masked by words, by intervals, by a bit a pair; groups of pooled keys, whose bias (log2
of the tokens behind each) is added to `s`.

A word holds, for each axis of `Windows`, one bit for each place within the tile of keys. A query's
word `w` has the bits of the places it sees, a key's word `e` the bits of its own place:

    kept  <=>  (~w & e) == 0             instead of two comparisons an axis and pair

Operands: query, output `[batch, queries, heads, head_dim]` in raster order, unit stride in
head_dim; key, value `[batch, keys, heads, head_dim]`, the same in the order of the blocks, by
pointers and (batch, token, head) strides, or as tensor descriptors of `[batch, heads, keys,
head_dim]`; the tables of `Worklist`.
lse: float32 `[batch, heads, queries]`, contiguous, raster order. float32, bfloat16 or float16.

Limits: head_dim <= 256, padded to a power of two; tiles of 16 or more queries and keys, powers of
two; descriptors need sm_90 or later; bfloat16 needs sm_80 or later.
"""

import triton
import triton.language as tl


@triton.jit
def matmul(left, right, UPCAST: tl.constexpr):
    """In float32; UPCAST because the interpreter would multiply the bits of bfloat16."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _update(
    scores, value, total, largest, sums, factor, alive, bound,
    SKIPS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax. `largest` starts finite, so hidden scores (-inf) give 0.
    SKIPS leaves the values out where all queries have their scores below `largest + bound`."""
    inside = tl.max(scores, 1) * factor
    now_largest = tl.maximum(largest, inside)
    weights = tl.math.exp2(scores * factor - now_largest[:, None])
    shrink = tl.math.exp2(largest - now_largest)
    sums = sums * shrink + tl.sum(weights, 1)
    if UPCAST:
        # The interpreter would cut weights to bfloat16, where a GPU rounds them.
        value = value.to(tl.float32)
    weights = weights.to(value.dtype)
    total *= shrink[:, None]
    if SKIPS:
        if tl.max(tl.where(alive, inside - now_largest, float("-inf")), 0) >= bound:
            total = tl.dot(weights, value, total, input_precision="ieee")
    else:
        total = tl.dot(weights, value, total, input_precision="ieee")
    return total, now_largest, sums


@triton.jit
def load_rows(pointer, row, stride, seen, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """`[rows, DIM]`: rows of HEAD_DIM elements at any places, zero where not `seen` and beyond
    HEAD_DIM."""
    d = tl.arange(0, DIM)
    at = pointer + row[:, None].to(tl.int64) * stride + d[None, :]
    return tl.load(at, mask=seen[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _load_runs(pointer, run, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """`[runs, DIM]`: rows of a table of fewer than 2^31 elements, zero beyond HEAD_DIM."""
    d = tl.arange(0, DIM)
    at = pointer + (run[:, None] * HEAD_DIM + d[None, :])
    if HEAD_DIM < DIM:
        return tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def load_tile(
    source, strides, sample, head, first, tokens,
    DESCRIPTORS: tl.constexpr, INSIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`[BLOCK, DIM]`: consecutive rows from `first`, zero past `tokens` and HEAD_DIM. INSIDE
    promises that the tile does not reach past `tokens`."""
    if DESCRIPTORS:
        rows = source.load([sample, head, first, 0]).reshape(BLOCK, DIM)
    else:
        n = tl.arange(0, BLOCK)
        d = tl.arange(0, DIM)
        base = source + sample.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]
        at = base + first.to(tl.int64) * strides[1] + n[:, None] * strides[1] + d[None, :]
        if INSIDE and HEAD_DIM == DIM:
            rows = tl.load(at)
        else:
            seen = (d < HEAD_DIM)[None, :] & ((first + n) < tokens)[:, None]
            rows = tl.load(at, mask=seen, other=0.0)
    return rows


@triton.jit
def _look(
    q, key, value, key_strides, value_strides, sample, head, first, tokens,
    DESCRIPTORS: tl.constexpr, INSIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of `q` against the tile of keys from `first`, and the values of that tile."""
    k = load_tile(
        key, key_strides, sample, head, first, tokens, DESCRIPTORS, INSIDE, HEAD_DIM, DIM, BLOCK_K,
    )  # fmt: skip
    v = load_tile(
        value, value_strides, sample, head, first, tokens, DESCRIPTORS, INSIDE, HEAD_DIM, DIM,
        BLOCK_K,
    )  # fmt: skip
    return matmul(q, k.T, UPCAST), v


@triton.jit
def _bits(low, high, origin, bottom, top):
    """The bits from `bottom` to `top` of the places that queries see in a tile on one axis."""
    one = tl.full([1], 1, tl.int32)
    from_bit = tl.minimum(tl.maximum(low - origin, bottom), top)
    to_bit = tl.minimum(tl.maximum(high - origin, bottom), top)
    return (one << to_bit) - (one << from_bit)


@triton.jit
def _hide(scores, missing, owned, CUDA: tl.constexpr):
    """`scores`, -inf where a bit is missing that the key owns."""
    if CUDA:
        # Left to LLVM, it packs the conditions of many pairs into words and unpacks them again.
        return tl.inline_asm_elementwise(
            """{
            .reg .pred kept;
            .reg .b32 both;
            and.b32 both, $2, $3;
            setp.eq.b32 kept, both, 0;
            selp.f32 $0, $1, 0fFF800000, kept;
            }""",
            "=f,f,r,r",
            [scores, missing, owned],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.where((missing & owned) == 0, scores, float("-inf"))


@triton.jit
def _load_axes(table, group, tokens, place, seen, AXES: tl.constexpr):
    """Rows `group * AXES ...` of a table `[groups * AXES, tokens]`, as a tuple over four axes;
    axes that are not there repeat the first."""
    at = table + group * AXES * tokens + place
    first = tl.load(at, mask=seen, other=0)
    second = first
    third = first
    fourth = first
    if AXES > 1:
        second = tl.load(at + tokens, mask=seen, other=0)
    if AXES > 2:
        third = tl.load(at + 2 * tokens, mask=seen, other=0)
    if AXES > 3:
        fourth = tl.load(at + 3 * tokens, mask=seen, other=0)
    return first, second, third, fourth


@triton.jit
def attend(
    query, key, value, output, lse,
    lists, words, intervals, bits, pooled,
    query_strides, key_strides, value_strides, output_strides,
    factor, bound, heads, queries, keys,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PERMUTED: tl.constexpr, DESCRIPTORS: tl.constexpr, DENSE: tl.constexpr,
    MASKED: tl.constexpr, WORD_AXES: tl.constexpr, INTERVAL_AXES: tl.constexpr,
    BITS: tl.constexpr, POOLED: tl.constexpr, SKIPS: tl.constexpr,
    CUDA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """See the head of this file.

    DENSE walks all tiles in sequence, as the yardstick of the static gate. MASKED, INTERVAL_AXES,
    BITS and POOLED say which of the other lists exist. SKIPS leaves values out by `bound`, in
    powers of two as scores are.
    """
    sample = tl.program_id(1)
    row = tl.load(lists.rows + tl.program_id(0))
    head = row // lists.query_tiles
    tile = row % lists.query_tiles
    m = tl.arange(0, BLOCK_Q)
    n = tl.arange(0, BLOCK_K)
    d = tl.arange(0, DIM)
    place = tl.load(lists.query_first + tile) + m
    alive = m < tl.load(lists.query_count + tile)
    token = place
    if PERMUTED:
        token = tl.load(lists.permutation + place, mask=alive, other=0)
    query += sample.to(tl.int64) * query_strides[0] + head.to(tl.int64) * query_strides[2]
    q = load_rows(query, token, query_strides[1], alive, HEAD_DIM, DIM)
    total = tl.zeros([BLOCK_Q, DIM], tl.float32)
    largest = tl.full([BLOCK_Q], -1.0e20, tl.float32)
    sums = tl.zeros([BLOCK_Q], tl.float32)

    if DENSE:
        start = 0
        stop = keys // BLOCK_K
        first = 0
    else:
        start = tl.load(lists.bounds + 4 * row)
        stop = tl.load(lists.bounds + 4 * row + 1)
        first = tl.load(lists.first + start)
    for entry in tl.range(start, stop):
        # Known one tile ahead, or the copies of each tile would wait for where it is.
        if DENSE:  # noqa: SIM108, the compiler types both sides of a ternary
            ahead = first + BLOCK_K
        else:
            ahead = tl.load(lists.first + entry + 1)
        scores, v = _look(
            q, key, value, key_strides, value_strides, sample, head, first, keys,
            DESCRIPTORS, True, HEAD_DIM, DIM, BLOCK_K, UPCAST,
        )  # fmt: skip
        total, largest, sums = _update(
            scores, v, total, largest, sums, factor, alive, bound, SKIPS, UPCAST,
        )  # fmt: skip
        first = ahead

    if MASKED:
        start = stop
        stop = tl.load(lists.bounds + 4 * row + 2)
        group = tl.load(lists.word_group + head)
        if WORD_AXES > 0:
            low = _load_axes(words.low, group, queries, place, alive, WORD_AXES)
            high = _load_axes(words.high, group, queries, place, alive, WORD_AXES)
            bottom = _load_axes(words.bottom, group, 1, 0, True, WORD_AXES)
            top = _load_axes(words.top, group, 1, 0, True, WORD_AXES)
            origins = words.origin + group * WORD_AXES * words.tiles
            own_words = words.word + sample * words.sample_stride + group * words.tiles * BLOCK_K
        for entry in tl.range(start, stop, num_stages=2):
            first = tl.load(lists.first + entry)
            # A tile without a mask but short, or with padded text, is listed as -1 - tile.
            listed = tl.load(lists.tile + entry)
            key_tile = tl.maximum(listed, -1 - listed)
            # What hides scores is looked up before they are multiplied, and so meanwhile.
            if WORD_AXES > 0:
                word = tl.where(listed < 0, (1 << 30) - 1, 0)
                for axis in tl.static_range(WORD_AXES):
                    origin = tl.load(origins + axis * words.tiles + key_tile)
                    word |= _bits(low[axis], high[axis], origin, bottom[axis], top[axis])
                own = tl.load(own_words + key_tile * BLOCK_K + n)
            else:
                count = tl.load(lists.key_count + sample * lists.count_stride + key_tile)
            scores, v = _look(
                q, key, value, key_strides, value_strides, sample, head, first, keys,
                DESCRIPTORS, False, HEAD_DIM, DIM, BLOCK_K, UPCAST,
            )  # fmt: skip
            if WORD_AXES > 0:
                scores = _hide(scores, ~word[:, None], own[None, :], CUDA)
            else:
                scores = tl.where((n < count)[None, :], scores, float("-inf"))
            total, largest, sums = _update(
                scores, v, total, largest, sums, factor, alive, bound, SKIPS, UPCAST,
            )  # fmt: skip

    if INTERVAL_AXES > 0:
        counts = lists.key_count + sample * lists.count_stride
        group = tl.load(lists.interval_group + head)
        low = _load_axes(intervals.low, group, queries, place, alive, INTERVAL_AXES)
        size = _load_axes(intervals.size, group, queries, place, alive, INTERVAL_AXES)
        start = tl.load(lists.bounds + 4 * row + 2)
        stop = tl.load(lists.bounds + 4 * row + 3)
        for entry in tl.range(start, stop, num_stages=2):
            first = tl.load(lists.first + entry)
            past_end = n >= tl.load(counts + tl.load(lists.tile + entry))
            scores, v = _look(
                q, key, value, key_strides, value_strides, sample, head, first, keys,
                DESCRIPTORS, False, HEAD_DIM, DIM, BLOCK_K, UPCAST,
            )  # fmt: skip
            for axis in tl.static_range(INTERVAL_AXES):
                at = (group * INTERVAL_AXES + axis) * intervals.tokens + first
                own = tl.load(intervals.place + at + n)
                # Far from every interval; as unsigned numbers one comparison does both sides.
                own = tl.where(past_end, 1 << 30, own)
                offset = (own[None, :] - low[axis][:, None]).to(tl.uint32, bitcast=True)
                kept = offset < size[axis][:, None].to(tl.uint32, bitcast=True)
                scores = tl.where(kept, scores, float("-inf"))
            total, largest, sums = _update(
                scores, v, total, largest, sums, factor, alive, bound, SKIPS, UPCAST,
            )  # fmt: skip

    if BITS:
        position = tl.load(bits.offset + tile) + m
        stride = tl.load(bits.stride + tile)
        start = tl.load(lists.bounds + 4 * row + 3)
        stop = tl.load(lists.bounds + 4 * row + 4)
        for entry in tl.range(start, stop, num_stages=2):
            first = tl.load(lists.first + entry)
            count = tl.load(
                lists.key_count + sample * lists.count_stride + tl.load(lists.tile + entry)
            )
            at = bits.word + tl.load(bits.at + entry)
            word = tl.load(
                at + (n * stride)[None, :] + (position >> 5)[:, None],
                mask=alive[:, None] & (n < count)[None, :],
                other=0,
            )
            scores, v = _look(
                q, key, value, key_strides, value_strides, sample, head, first, keys,
                DESCRIPTORS, False, HEAD_DIM, DIM, BLOCK_K, UPCAST,
            )  # fmt: skip
            kept = ((word >> (position & 31)[:, None]) & 1) != 0
            scores = tl.where(kept, scores, float("-inf"))
            total, largest, sums = _update(
                scores, v, total, largest, sums, factor, alive, bound, SKIPS, UPCAST,
            )  # fmt: skip

    if POOLED:
        start = tl.load(pooled.bounds + row)
        stop = tl.load(pooled.bounds + row + 1)
        at = (sample.to(tl.int64) * heads + head) * pooled.runs * HEAD_DIM
        for group in tl.range(start, stop, num_stages=2):
            # Several pooled blocks side by side, 2^shift places for each.
            shift = tl.load(pooled.shift + group)
            item = tl.load(pooled.entry + group) + (n >> shift)
            seen = item < tl.load(pooled.stop + group)
            block = tl.load(pooled.block + item, mask=seen, other=0)
            within = n & ((1 << shift) - 1)
            seen = seen & (within < tl.load(pooled.number + block))
            # Places without a run repeat the first, which is seen, so that rows need no mask.
            run = tl.load(pooled.first + block) + within
            run = tl.where(
                seen,
                run,
                tl.load(pooled.first + tl.load(pooled.block + tl.load(pooled.entry + group))),
            )
            bias = tl.load(
                pooled.bias + sample * pooled.bias_stride + run, mask=seen, other=float("-inf")
            )
            k = _load_runs(pooled.key + at, run, HEAD_DIM, DIM)
            v = _load_runs(pooled.value + at, run, HEAD_DIM, DIM)
            scores = matmul(q, k.T, UPCAST) * factor + bias[None, :]
            total, largest, sums = _update(
                scores, v, total, largest, sums, 1.0, alive, bound, SKIPS, UPCAST,
            )  # fmt: skip

    seen = sums > 0
    sums = tl.where(seen, sums, 1.0)
    total /= sums[:, None]
    output += sample.to(tl.int64) * output_strides[0] + head.to(tl.int64) * output_strides[2]
    at = output + token[:, None].to(tl.int64) * output_strides[1] + d[None, :]
    kept = alive[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(at, total.to(output.dtype.element_ty), mask=kept)
    logarithm = (largest + tl.math.log2(sums)) * 0.6931471805599453
    at = lse + (sample.to(tl.int64) * heads + head) * queries + token
    tl.store(at, tl.where(seen, logarithm, float("-inf")), mask=alive)
