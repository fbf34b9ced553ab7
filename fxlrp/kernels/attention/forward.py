"""The forward kernel: one program computes the output of a block of queries of one head, over blocks of keys."""

import triton
import triton.language as tl

from .scores import LOG2E, load_rows, masked, plus_product, product, scored, span, store_rows


@triton.jit
def _over_keys(sums, total, top, q, k_base, v_base, mask_ptr, k_n, v_n, m_q, m_k, row, queries, keys, offset,
               window, inner, outer, start, stop,
               D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, QUERIES: tl.constexpr,
               KEYS: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
               CAP: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Numerators, denominators and largest scores after the blocks of keys from ``start`` to ``stop``."""
    for block in range(start, stop, KEYS):
        k = load_rows(k_base, block, k_n, keys, KEYS, D, DP, EDGE)
        raw = product(q, tl.trans(k), PRECISION)
        scores = masked(scored(raw, inner, outer, CAP), mask_ptr, m_q, m_k, row, block,
                        tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :], queries, keys,
                        offset, window, MASK, PER_KEY, CAUSAL, WINDOW, EDGE)  # fmt: skip
        highest = tl.maximum(top, tl.max(scores, 1))
        # While every key so far is masked, scores are -inf as the highest is: exp2(-inf - 0) is 0, not NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(weights, 1)
        v = load_rows(v_base, block, v_n, keys, KEYS, E, EP, EDGE)
        sums = plus_product(sums * kept[:, None], weights.to(v.dtype), v, PRECISION)
        top = highest
    return sums, total, top


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
    rows = row + tl.arange(0, QUERIES)
    q_base = q_ptr + b * q_b + h * q_h
    q = load_rows(q_base, row, q_n, queries, QUERIES, D, DP, True)
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
    if WINDOW:
        sums, total, top = _over_keys(
            sums, total, top, q, k_base, v_base, mask_ptr, k_n, v_n, m_q, m_k, row, queries, keys, offset,
            window, inner, outer, start, tl.minimum(full, stop),
            D, E, DP, EP, QUERIES, KEYS, MASK, PER_KEY, CAUSAL, WINDOW, CAP, PRECISION, True)  # fmt: skip
    sums, total, top = _over_keys(
        sums, total, top, q, k_base, v_base, mask_ptr, k_n, v_n, m_q, m_k, row, queries, keys, offset,
        window, inner, outer, full, edge,
        D, E, DP, EP, QUERIES, KEYS, MASK, PER_KEY, CAUSAL, WINDOW, CAP, PRECISION, False)  # fmt: skip
    sums, total, top = _over_keys(
        sums, total, top, q, k_base, v_base, mask_ptr, k_n, v_n, m_q, m_k, row, queries, keys, offset,
        window, inner, outer, edge, stop,
        D, E, DP, EP, QUERIES, KEYS, MASK, PER_KEY, CAUSAL, WINDOW, CAP, PRECISION, True)  # fmt: skip

    seen = total > 0.0
    out = sums / tl.where(seen, total, 1.0)[:, None]
    store_rows(out_ptr + b * o_b + h * o_h, row, o_n, queries, out, QUERIES, E, EP)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2E, float("-inf"))
    tl.store(lse_ptr + head.to(tl.int64) * queries + rows, lse, mask=rows < queries)
