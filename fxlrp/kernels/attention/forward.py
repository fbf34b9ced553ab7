"""The forward kernel: a program computes the output of a block of queries of a head, over blocks of keys."""
# mypy: ignore-errors

import triton
import triton.language as tl

from .scores import LOG2E, load_rows, masked, scored, seen, span, store_rows


@triton.jit
def attend(q_ptr, k_ptr, v_ptr, mask_ptr, sinks_ptr, out_ptr, lse_ptr,
           q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, m_b, m_h, m_q, m_k,
           heads, group, queries, keys, offset, window, inner, outer,
           D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
           QUERIES: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr,
           CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """``out = softmax(s) v`` and ``lse``, with the running maximum of Milakov and Gimelshein 2018."""
    blocks = tl.cdiv(queries, QUERIES)
    head = tl.program_id(0) // blocks
    # Under a causal mask later queries have more to do: they start first.
    row = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    rows = tl.arange(0, QUERIES)[:, None]
    columns = tl.arange(0, KEYS)[None, :]
    q_base = q_ptr + b * q_b + h * q_h
    q = load_rows(q_base, row, q_n, queries, QUERIES, D, DP)
    k_base = k_ptr + b * k_b + h // group * k_h
    v_base = v_ptr + b * v_b + h // group * v_h
    mask_ptr += b * m_b + h * m_h

    sums = tl.zeros((QUERIES, EP), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    if SINKS:
        top = tl.zeros((QUERIES,), tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        total += 1.0
    above = 0 if CAUSAL else window - 1
    start, full, edge, stop = span(row + offset, row + QUERIES - 1 + offset, keys, window - 1, above,
                                   WINDOW, CAUSAL or WINDOW, KEYS)  # fmt: skip
    for block in range(start, stop, KEYS):
        k = load_rows(k_base, block, k_n, keys, KEYS, D, DP)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = masked(scored(raw, inner, outer, CAP), mask_ptr, m_q, m_k, row, block, rows, columns,
                        queries, keys, MASK, PER_KEY)  # fmt: skip
        if (block < full) | (block >= edge):
            scores = seen(scores, row, block, rows, columns, keys, offset, window, CAUSAL, WINDOW)
        highest = tl.maximum(top, tl.max(scores, 1))
        # While every key so far is masked, scores are -inf as the highest is: exp2(-inf - 0) is 0, not NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(weights, 1)
        v = load_rows(v_base, block, v_n, keys, KEYS, E, EP)
        sums = tl.dot(weights.to(v.dtype), v, sums * kept[:, None], input_precision=PRECISION)
        top = highest

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    store_rows(out_ptr + b * o_b + h * o_h, row, o_n, queries, sums / total[:, None], QUERIES, E, EP)
    lse = tl.where(some, (top + tl.log2(total)) / LOG2E, float("-inf"))
    place = row + tl.arange(0, QUERIES)
    tl.store(lse_ptr + head.to(tl.int64) * queries + place, lse, mask=place < queries)
