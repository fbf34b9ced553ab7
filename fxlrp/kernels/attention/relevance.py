"""The relevance kernels: what is summed over the head size, over queries, and over keys.

Logarithms lse come in base 2, and as inf for masked rows; they and delta hold ``spaced`` rows for each head,
as many as fill tiles, inf and 0 behind the last query. With probabilities P computed from them, ``W = P t``
(t: slopes of cap and stabiliser) and coefficients G of C targets, which share P and W:
``dS = W (G v^T - delta)``, over keys ``G_q = dS k``, over queries ``G_k = dS^T q`` and ``G_v = P^T G``.
Tuples hold one accumulator for each target; Triton knows no unpacking in them.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

from .scores import (
    load_rows,
    masked,
    scored,
    seen,
    slope,
    span,
    store_rows,
    wide,
)


@triton.jit
def prepare(out_ptr, g_ptr, damped_ptr, delta_ptr, o_b, o_h, o_n, g_t, g_b, g_h, g_n, d_t, d_b, d_h, d_n,
            programs, heads, queries, spaced, targets, epsilon,
            E: tl.constexpr, EP: tl.constexpr, QUERIES: tl.constexpr, DAMP: tl.constexpr):  # fmt: skip
    """``G' = sigma(out) G``, written where there is an epsilon, and ``delta = sum(out G')`` over the size."""
    blocks = spaced // QUERIES
    head = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * QUERIES
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    rows = row + tl.arange(0, QUERIES)
    out_base = out_ptr + b * o_b + h * o_h
    g_base = g_ptr + b * g_b + h * g_h
    damped_ptr += b * d_b + h * d_h
    delta_ptr += head.to(tl.int64) * spaced
    out = load_rows(out_base, row, o_n, queries, QUERIES, E, EP).to(tl.float32)
    if DAMP:
        sigma = tl.abs(out) / (tl.abs(out) + epsilon)
    for target in range(targets):
        place = wide(target)
        g = load_rows(g_base + place * g_t, row, g_n, queries, QUERIES, E, EP).to(tl.float32)
        if DAMP:
            damped = (g * sigma).to(damped_ptr.dtype.element_ty)
            store_rows(damped_ptr + place * d_t, row, d_n, queries, damped, QUERIES, E, EP)
            g = damped.to(tl.float32)
        delta = tl.sum(g * out, 1)
        tl.store(delta_ptr + place * programs * spaced + rows, delta)


@triton.jit
def of_queries(q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, mask_ptr, found_ptr,
               q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_t, g_b, g_h, g_n, f_t, f_b, f_h, f_n,
               m_b, m_h, m_q, m_k, programs, heads, group, queries, spaced, keys, targets, offset,
               window, inner, outer, score_epsilon, factor,
               D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
               QUERIES: tl.constexpr, KEYS: tl.constexpr, TARGETS: tl.constexpr, MASK: tl.constexpr,
               PER_KEY: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
               DAMP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``G_q = factor dS k`` of a block of queries of one head, for ``TARGETS`` targets."""
    blocks = tl.cdiv(queries, QUERIES)
    unit = tl.program_id(0) // blocks
    # Under a causal mask later queries have more to do: they start first.
    row = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    first = unit // programs * TARGETS
    head = unit % programs
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    rows = tl.arange(0, QUERIES)[:, None]
    columns = tl.arange(0, KEYS)[None, :]
    place_of = row + tl.arange(0, QUERIES)
    q_base = q_ptr + b * q_b + h * q_h
    q = load_rows(q_base, row, q_n, queries, QUERIES, D, DP)
    k_base = k_ptr + b * k_b + h // group * k_h
    v_base = v_ptr + b * v_b + h // group * v_h
    g_base = g_ptr + b * g_b + h * g_h
    mask_ptr += b * m_b + h * m_h
    lse = tl.load(lse_ptr + head.to(tl.int64) * spaced + place_of)

    gs = ()
    deltas = ()
    found = ()
    for i in tl.static_range(TARGETS):
        # Behind the last target the last one is computed again, and written again: the same values.
        place = tl.minimum(first + i, targets - 1).to(tl.int64)
        gs = gs + (load_rows(g_base + place * g_t, row, g_n, queries, QUERIES, E, EP),)
        delta = delta_ptr + (place * programs + head) * spaced
        deltas = deltas + (tl.load(delta + place_of),)
        found = found + (tl.zeros((QUERIES, DP), tl.float32),)
    above = 0 if CAUSAL else window - 1
    start, full, edge, stop = span(row + offset, row + QUERIES - 1 + offset, keys, window - 1, above,
                                   WINDOW, CAUSAL or WINDOW, KEYS)  # fmt: skip
    for block in range(start, stop, KEYS):
        k = load_rows(k_base, block, k_n, keys, KEYS, D, DP)
        v = load_rows(v_base, block, v_n, keys, KEYS, E, EP)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = masked(scored(raw, inner, outer, CAP), mask_ptr, m_q, m_k, row, block, rows, columns,
                        queries, keys, MASK, PER_KEY)  # fmt: skip
        if (block < full) | (block >= edge):
            scores = seen(scores, row, block, rows, columns, keys, offset, window, CAUSAL, WINDOW)
        weights = tl.exp2(scores - lse[:, None])
        if CAP != "none" or DAMP:
            weights *= slope(raw, inner, score_epsilon, CAP, DAMP)
        after = ()
        for i in tl.static_range(TARGETS):
            arrived = tl.dot(gs[i], tl.trans(v), input_precision=PRECISION)
            of_scores = (weights * (arrived - deltas[i][:, None])).to(k.dtype)
            after = after + (tl.dot(of_scores, k, found[i], input_precision=PRECISION),)
        found = after
    for i in tl.static_range(TARGETS):
        place = tl.minimum(first + i, targets - 1).to(tl.int64)
        base = found_ptr + place * f_t + b * f_b + h * f_h
        store_rows(base, row, f_n, queries, found[i] * factor, QUERIES, D, DP)


@triton.jit
def of_keys(q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, mask_ptr, of_k_ptr, of_v_ptr,
            q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_t, g_b, g_h, g_n,
            fk_t, fk_b, fk_h, fk_n, fv_t, fv_b, fv_h, fv_n, m_b, m_h, m_q, m_k,
            programs, heads, queries, spaced, keys, targets, offset, window, inner, outer, score_epsilon,
            factor_k, factor_v,
            D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, GROUP: tl.constexpr,
            QUERIES: tl.constexpr, KEYS: tl.constexpr, TARGETS: tl.constexpr, OF_K: tl.constexpr,
            OF_V: tl.constexpr, MASK: tl.constexpr, PER_KEY: tl.constexpr, CAUSAL: tl.constexpr,
            WINDOW: tl.constexpr, CAP: tl.constexpr, DAMP: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """``G_k = factor_k dS^T q`` and ``G_v = factor_v P^T G`` of a block of keys of one head, for ``TARGETS``
    targets, summed over the ``GROUP`` query heads that the keys serve.
    """
    blocks = tl.cdiv(keys, KEYS)
    unit = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * KEYS
    first = unit // programs * TARGETS
    b = (unit % programs // heads).to(tl.int64)
    h = (unit % programs % heads).to(tl.int64)
    rows = tl.arange(0, QUERIES)[None, :]
    columns = tl.arange(0, KEYS)[:, None]
    k_base = k_ptr + b * k_b + h * k_h
    k = load_rows(k_base, column, k_n, keys, KEYS, D, DP)
    v = k
    if OF_K:
        v_base = v_ptr + b * v_b + h * v_h
        v = load_rows(v_base, column, v_n, keys, KEYS, E, EP)
    of_k = ()
    of_v = ()
    for _ in tl.static_range(TARGETS):
        if OF_K:
            of_k = of_k + (tl.zeros((KEYS, DP), tl.float32),)
        if OF_V:
            of_v = of_v + (tl.zeros((KEYS, EP), tl.float32),)
    below = 0 if CAUSAL else window - 1
    start, full, edge, stop = span(column - offset, column + KEYS - 1 - offset, queries, below, window - 1,
                                   CAUSAL or WINDOW, WINDOW, QUERIES)  # fmt: skip
    for member in range(GROUP):
        other = h * GROUP + member
        head = b * heads * GROUP + other
        q_base = q_ptr + b * q_b + other * q_h
        lse = lse_ptr + head * spaced
        mask = mask_ptr + b * m_b + other * m_h
        g_bases = ()
        deltas = ()
        for i in tl.static_range(TARGETS):
            # Behind the last target the last one is computed again, and written again: the same values.
            place = tl.minimum(first + i, targets - 1).to(tl.int64)
            g_base = g_ptr + place * g_t + b * g_b + other * g_h
            g_bases = g_bases + (g_base,)
            deltas = deltas + (delta_ptr + (place * programs * GROUP + head) * spaced,)
        for block in range(start, stop, QUERIES):
            # Tiles are transposed, keys by queries, so that both sums over queries take them as they are.
            q = load_rows(q_base, block, q_n, queries, QUERIES, D, DP)
            raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores = masked(scored(raw, inner, outer, CAP), mask, m_q, m_k, block, column, rows, columns,
                            queries, keys, MASK, PER_KEY)  # fmt: skip
            if CAUSAL or WINDOW:  # noqa: SIM102  # the first is a constant
                if (block < full) | (block >= edge):
                    scores = seen(scores, block, column, rows, columns, keys, offset, window, CAUSAL, WINDOW)
            weights = tl.exp2(scores - tl.load(lse + block + tl.arange(0, QUERIES))[None, :])
            passed = weights
            if OF_K and (CAP != "none" or DAMP):
                passed = weights * slope(raw, inner, score_epsilon, CAP, DAMP)
            after_k = ()
            after_v = ()
            for i in tl.static_range(TARGETS):
                g = load_rows(g_bases[i], block, g_n, queries, QUERIES, E, EP)
                if OF_V:
                    share = tl.dot(weights.to(g.dtype), g, of_v[i], input_precision=PRECISION)
                    after_v = after_v + (share,)
                if OF_K:
                    delta = tl.load(deltas[i] + block + tl.arange(0, QUERIES))
                    arrived = tl.dot(v, tl.trans(g), input_precision=PRECISION)
                    of_scores = (passed * (arrived - delta[None, :])).to(q.dtype)
                    after_k = after_k + (tl.dot(of_scores, q, of_k[i], input_precision=PRECISION),)
            of_k = after_k
            of_v = after_v
    for i in tl.static_range(TARGETS):
        place = tl.minimum(first + i, targets - 1).to(tl.int64)
        if OF_K:
            base = of_k_ptr + place * fk_t + b * fk_b + h * fk_h
            store_rows(base, column, fk_n, keys, of_k[i] * factor_k, KEYS, D, DP)
        if OF_V:
            base = of_v_ptr + place * fv_t + b * fv_b + h * fv_h
            store_rows(base, column, fv_n, keys, of_v[i] * factor_v, KEYS, E, EP)
