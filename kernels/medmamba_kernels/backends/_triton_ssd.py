"""Triton kernels of the SSD form, by matrix products; :mod:`medmamba_kernels.backends._ssd` launches them.

One rate and one step size for a head of P channels turn a chunk of Q tokens into matrix products. With l_t = dt_t A
the log decay of a token, s its sum within the chunk and h the state that enters the chunk::

    y_i = sum_(j <= i) exp(s_i - s_j) (C_i . B_j) dt_j x_j + exp(s_i) C_i h + D x_i
    h'  = sum_j exp(s_Q - s_j) dt_j B_j x_j + exp(s_Q) h

1. ``_ssd_steps_kernel``   dt and s of every token, in the order of the route;
2. ``_ssd_chunk_kernel``   the sum in h', which needs no h; in reverse its mirror image, the gradient of h;
3. ``_ssd_carry_kernel``   h from chunk to chunk, one after the other; in reverse its gradient g;
4. ``_ssd_output_kernel``  y; in reverse dx, the same formula with x and dy, B and C, h and g exchanged;
5. ``_ssd_bwd_states_kernel`` and ``_ssd_bwd_pairs_kernel``  the other gradients, from h and g and from pairs of tokens.

C B^T belongs to all heads of a route: a program computes it once and walks through its heads, and in the backward it
adds up what they send to dB and dC. Tokens are read in place through the order table. A token that does not exist or
is masked is not loaded; it counts as zeros with a step size of 0. Where the route starts anew the decay is 0.

Precision. s is summed in float64 and stored as two float32 numbers, Q per head: the difference of neighbours would
otherwise carry the rounding of the whole sum. Differences are cut at 0 before the exponential. States, products and
sums are float32. A float32 factor beside a bfloat16 input is split into two bfloat16 numbers (2**-17, two products);
other products are of float32 numbers (``PRECISION``: on NVIDIA three products of tf32 numbers, about 1e-7). An input of
NaN or infinity spreads over its whole chunk, to earlier tokens too.

Floor of the forward, per token, channel and route, for inputs of e bytes: memory 2 e for x, which steps 2 and 4 read,
4 or 8 for y in float32, 16 N / Q for the states, (3 e N + e + 36) / P for B, C and dt; 2 Q + 4 N + 2 Q N / (P heads of
a program) flops, and Q / P exponentials. bfloat16, N = 16, P = 64, Q = 64: 18 bytes, 4.2 ps at 4.3 TB/s, and about
400 flops with split products, 0.5 ps of an H200's tensor cores. The backward reads x twice, dy four times and the
states of both directions: about 40 bytes, 9 ps, and 4 Q + 8 N flops besides those that heads share.

Source: Dao & Gu, "Transformers are SSMs", 2024, arXiv:2405.21060, section 6 (block decomposition). The backward is
derived from the lines above. Names as in ``_triton_kernels``; "in" is what is read, "out" what is written.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ._triton_kernels import LOG2E, _step_size

# What differs from patch to patch and batch to batch must not cause another compilation.
SIZES = ("first_route", "batch", "length", "routes", "chunks", "groups")


@triton.jit
def _program(groups, chunks, routes):
    """What a program of a grid (batch * routes * chunks * groups) is: group, everything but the group, chunk, sample,
    route. The divisions are 32-bit."""
    i_bkm = tl.program_id(0) // groups
    i_bk = i_bkm // chunks
    i_g, i_m = tl.program_id(0) % groups, i_bkm % chunks
    i_b, i_k = i_bk // routes, i_bk % routes
    return i_g.to(tl.int64), i_bkm.to(tl.int64), i_m.to(tl.int64), i_b.to(tl.int64), i_k.to(tl.int64)


@triton.jit
def _tokens(p_order, p_mask, i_m, length, Q: tl.constexpr):
    """The tokens of a chunk: raster index, whether it exists, and whether it takes part, all [Q]."""
    o_t = i_m * Q + tl.arange(0, Q).to(tl.int64)
    m_exists = o_t < length
    token = tl.load(p_order + o_t, mask=m_exists, other=0).to(tl.int64)
    m_active = m_exists
    if p_mask is not None:
        m_active = m_exists & (tl.load(p_mask + token, mask=m_exists, other=0) != 0)
    return token, m_exists, m_active


@triton.jit
def _tile(p_tile, m_tile):
    """A tile of an input, 0 outside of the mask: bfloat16 as it is, anything else in float32."""
    b_tile = tl.load(p_tile, mask=m_tile, other=0)
    return b_tile if b_tile.dtype == tl.bfloat16 else b_tile.to(tl.float32)


@triton.jit
def _weight(p_weight, token, m_active, s_l, i_n, N: tl.constexpr, BN: tl.constexpr):
    """B or C of the tokens, states i_n to i_n + BN [Q, BN]."""
    o_n = i_n + tl.arange(0, BN).to(tl.int64)
    return _tile(p_weight + token[:, None] * s_l + o_n[None, :], m_active[:, None] & (o_n < N)[None, :])


@triton.jit
def _scores(
    p_in,
    p_out,
    token,
    m_active,
    s_in_l,
    s_out_l,
    N: tl.constexpr,
    BN: tl.constexpr,
    Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products over the states of the weights of two tokens: "out" of the row, "in" of the column [Q, Q]."""
    b_scores = tl.zeros([Q, Q], tl.float32)
    for i_n in tl.range(0, N, BN, disable_licm=True, loop_unroll_factor=1):
        b_out = _weight(p_out, token, m_active, s_out_l, i_n, N, BN)
        b_scores = _dot(b_out, tl.trans(_weight(p_in, token, m_active, s_in_l, i_n, N, BN)), b_scores, PRECISION)
    return b_scores


@triton.jit
def _dot(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_left @ b_right in float32; a float32 factor beside a bfloat16 one is split into two of these."""
    if b_left.dtype == b_right.dtype:
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    elif b_left.dtype == tl.float32:
        b_high = b_left.to(tl.bfloat16)
        b_sum = tl.dot((b_left - b_high.to(tl.float32)).to(tl.bfloat16), b_right, b_sum)
        b_sum = tl.dot(b_high, b_right, b_sum)
    else:
        b_high = b_right.to(tl.bfloat16)
        b_sum = tl.dot(b_left, (b_right - b_high.to(tl.float32)).to(tl.bfloat16), b_sum)
        b_sum = tl.dot(b_left, b_high, b_sum)
    return b_sum


@triton.jit
def _decay_between(p_high, p_low, i_steps, REVERSE: tl.constexpr, Q: tl.constexpr):
    """Decay between two tokens [Q, Q]: from column to row, 0 if that is earlier; in reverse from row to column."""
    o_q = tl.arange(0, Q).to(tl.int64)
    b_high, b_low = tl.load(p_high + (i_steps + o_q)), tl.load(p_low + (i_steps + o_q))
    b_log = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    m_pair = o_q[:, None] >= o_q[None, :]
    if REVERSE:
        b_log, m_pair = -b_log, o_q[:, None] <= o_q[None, :]
    return tl.where(m_pair, tl.exp2(tl.minimum(b_log, 0)), 0)


@triton.jit
def _decay_from_start(p_high, i_steps, Q: tl.constexpr):
    """Decay from the state that enters to every token [Q]."""
    return tl.exp2(tl.load(p_high + (i_steps + tl.arange(0, Q).to(tl.int64))))


@triton.jit
def _decay_to_end(p_high, p_low, i_steps, Q: tl.constexpr):
    """Decay from every token to the end of the chunk [Q]."""
    o_q = i_steps + tl.arange(0, Q).to(tl.int64)
    i_last = i_steps + Q - 1
    b_high = tl.load(p_high + i_last) - tl.load(p_high + o_q)
    return tl.exp2(tl.minimum(b_high + (tl.load(p_low + i_last) - tl.load(p_low + o_q)), 0))


@triton.jit(do_not_specialize=["heads", *SIZES])
def _ssd_steps_kernel(
    p_raw,
    p_a,
    p_bias,
    p_mask,
    p_order,
    p_starts,
    p_dt,
    p_high,
    p_low,
    p_slope,
    p_decays,
    s_raw_b,
    s_raw_l,
    s_raw_k,
    length,
    routes,
    heads,
    chunks,
    Q: tl.constexpr,
    BH: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Step sizes and decays of the tokens of a chunk, in the order of the route.

    Grid: (batch * routes * chunks * blocks of heads,). Writes dt, the sum of log2 decays up to and with a token as the
    sum of ``p_high`` and ``p_low``, and d dt / d raw to ``p_slope`` or None, all (batch, K, M, H, Q) float32; and the
    decay over the chunk (batch, K, M, H). A start is a log2 decay of -256: exp2 of that is 0.
    """
    blocks = tl.cdiv(heads, BH)
    i_h, i_bkm, i_m, i_b, i_k = _program(blocks, chunks, routes)
    o_h = i_h * BH + tl.arange(0, BH).to(tl.int64)
    o_q = tl.arange(0, Q).to(tl.int64)
    m_h = o_h < heads
    p_raw += i_b * s_raw_b + i_k * s_raw_k
    p_order += i_k * length
    if p_mask is not None:
        p_mask += i_b * length

    token, m_exists, m_active = _tokens(p_order, p_mask, i_m, length, Q)
    m_qh = m_active[:, None] & m_h[None, :]
    b_raw = tl.load(p_raw + token[:, None] * s_raw_l + o_h[None, :], mask=m_qh, other=0).to(tl.float32)
    b_bias = tl.zeros([BH], tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_k * heads + o_h, mask=m_h, other=0)
    b_rate = tl.load(p_a + i_k * heads + o_h, mask=m_h, other=0).to(tl.float64) * LOG2E
    b_dt, b_slope = _step_size(b_raw, b_bias[None, :], m_qh, SOFTPLUS)
    b_log = b_dt.to(tl.float64) * b_rate[None, :]
    if p_starts is not None:
        b_starts = tl.load(p_starts + i_k * length + i_m * Q + o_q, mask=m_exists, other=0)
        b_log += (b_starts.to(tl.float64) * -256)[:, None]
    b_sums = tl.cumsum(b_log, axis=0)
    b_high = b_sums.to(tl.float32)
    o_hq = (i_bkm * heads + o_h[None, :]) * Q + o_q[:, None]
    m_hq = (o_q >= 0)[:, None] & m_h[None, :]
    tl.store(p_dt + o_hq, b_dt, mask=m_hq)
    tl.store(p_high + o_hq, b_high, mask=m_hq)
    tl.store(p_low + o_hq, (b_sums - b_high.to(tl.float64)).to(tl.float32), mask=m_hq)
    if p_slope is not None:
        tl.store(p_slope + o_hq, b_slope, mask=m_hq)
    tl.store(p_decays + i_bkm * heads + o_h, tl.exp2(tl.sum(b_log, axis=0).to(tl.float32)), mask=m_h)


@triton.jit(do_not_specialize=["heads", *SIZES])
def _ssd_chunk_kernel(
    p_in,
    p_weight,
    p_dt,
    p_high,
    p_low,
    p_mask,
    p_order,
    p_states,
    s_in_b,
    s_in_k,
    s_in_l,
    s_weight_b,
    s_weight_l,
    s_weight_k,
    length,
    routes,
    heads,
    chunks,
    groups,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a chunk hands on when nothing enters it, to states (batch, K, M, N, C).

    Forward: the state at its end, from x and B. Reverse: the gradient of the state before its start, from dy and C.

    Grid: (batch * routes * chunks * groups of heads,).
    """
    i_g, i_bkm, i_m, i_b, i_k = _program(groups, chunks, routes)
    per_group = tl.cdiv(heads, groups)
    p_in += i_b * s_in_b + i_k * s_in_k
    p_weight += i_b * s_weight_b + i_k * s_weight_k
    p_order += i_k * length
    if p_mask is not None:
        p_mask += i_b * length

    token, _m_exists, m_active = _tokens(p_order, p_mask, i_m, length, Q)
    for i_h in tl.range(i_g * per_group, tl.minimum(i_g * per_group + per_group, heads), disable_licm=True):
        i_steps = (i_bkm * heads + i_h) * Q
        if REVERSE:
            b_factor = _decay_from_start(p_high, i_steps, Q)
        else:
            b_dt = tl.load(p_dt + (i_steps + tl.arange(0, Q).to(tl.int64)))
            b_factor = _decay_to_end(p_high, p_low, i_steps, Q) * b_dt
        for i_p in tl.range(0, P, BP, disable_licm=True, loop_unroll_factor=1):
            o_p = i_p + tl.arange(0, BP).to(tl.int64)
            m_p = o_p < P
            o_c = i_h * P + o_p
            b_in = _tile(p_in + token[:, None] * s_in_l + o_c[None, :], m_active[:, None] & m_p[None, :])
            b_in = b_in.to(tl.float32) * b_factor[:, None]
            for i_n in tl.range(0, N, BN, disable_licm=True, loop_unroll_factor=1):
                o_n = i_n + tl.arange(0, BN).to(tl.int64)
                b_weight = _weight(p_weight, token, m_active, s_weight_l, i_n, N, BN)
                b_local = _dot(tl.trans(b_weight), b_in, tl.zeros([BN, BP], tl.float32), PRECISION)
                o_nc = (i_bkm * N + o_n)[:, None] * (heads * P) + o_c[None, :]
                tl.store(p_states + o_nc, b_local, mask=(o_n < N)[:, None] & m_p[None, :])


@triton.jit(do_not_specialize=["heads", *SIZES], do_not_specialize_on_alignment=["p_states", "p_first", "p_last"])
def _ssd_carry_kernel(
    p_states,
    p_decays,
    p_first,
    p_last,
    heads,
    chunks,
    N: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Replace what every chunk hands on by what enters it, from chunk to chunk (from the last to the first: REVERSE).

    Grid: (batch * routes * blocks of N * C elements,). Reads BM chunks at a time, then walks through them. ``p_first``
    (batch, K, N, C) or None enters the first of them, ``p_last`` or None gets what the last hands on.
    """
    elements = N * P * heads
    blocks = tl.cdiv(elements, BE)
    i_e = (tl.program_id(0) % blocks).to(tl.int64)
    i_bk = (tl.program_id(0) // blocks).to(tl.int64)
    o_e = i_e * BE + tl.arange(0, BE).to(tl.int64)
    m_e = o_e < elements
    o_h = (o_e.to(tl.int32) % (heads * P) // P).to(tl.int64)
    o_u = tl.arange(0, BM)
    b_h = tl.zeros([BE], tl.float32)
    if p_first is not None:
        b_h = tl.load(p_first + i_bk * elements + o_e, mask=m_e, other=0)
    for i in range(0, chunks, BM):
        o_m = chunks - 1 - (i + o_u) if REVERSE else i + o_u
        o_m = o_m.to(tl.int64)
        m_me = ((o_m >= 0) & (o_m < chunks))[:, None] & m_e[None, :]
        o_me = ((i_bk * chunks + o_m) * elements)[:, None] + o_e[None, :]
        b_local = tl.load(p_states + o_me, mask=m_me, other=0)
        # A chunk that does not exist passes everything.
        b_decay = tl.load(p_decays + ((i_bk * chunks + o_m) * heads)[:, None] + o_h[None, :], mask=m_me, other=1)
        b_entering = tl.zeros([BM, BE], tl.float32)
        for u in tl.static_range(BM):
            m_u = (o_u == u)[:, None]
            b_entering = tl.where(m_u, b_h[None, :], b_entering)
            b_decay_u = tl.sum(tl.where(m_u, b_decay, 0), axis=0)
            b_h = tl.fma(b_decay_u, b_h, tl.sum(tl.where(m_u, b_local, 0), axis=0))
        tl.store(p_states + o_me, b_entering, mask=m_me)
    if p_last is not None:
        tl.store(p_last + i_bk * elements + o_e, b_h, mask=m_e)


@triton.jit(do_not_specialize=["heads", *SIZES])
def _ssd_output_kernel(
    p_in,
    p_in_weight,
    p_out_weight,
    p_d,
    p_dt,
    p_high,
    p_low,
    p_mask,
    p_order,
    p_states,
    p_out,
    s_in_b,
    s_in_k,
    s_in_l,
    s_in_weight_b,
    s_in_weight_l,
    s_in_weight_k,
    s_out_weight_b,
    s_out_weight_l,
    s_out_weight_k,
    s_out_b,
    s_out_k,
    s_out_l,
    first_route,
    length,
    routes,
    heads,
    chunks,
    groups,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    REVERSE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of the tokens of a chunk; or, in reverse, dx.

    Forward: from x, B ("in"), C ("out") and the state that enters the chunk. Reverse: from dy, C, B and the gradient of
    the state that it hands on; the same sum from the other end, with dt at the token that is written.

    Grid: (batch * chunks * groups of heads, routes of this launch). ``p_states`` (batch, K, M, N, C), None for zeros.
    ACCUMULATE adds to the output of earlier launches.
    """
    i_g, _i_bm, i_m, i_b, _i_launch = _program(groups, chunks, 1)
    i_k = tl.program_id(1).to(tl.int64) + first_route
    i_bkm = (i_b * routes + i_k) * chunks + i_m
    per_group = tl.cdiv(heads, groups)
    o_q = tl.arange(0, Q).to(tl.int64)
    p_in += i_b * s_in_b + i_k * s_in_k
    p_in_weight += i_b * s_in_weight_b + i_k * s_in_weight_k
    p_out_weight += i_b * s_out_weight_b + i_k * s_out_weight_k
    p_out += i_b * s_out_b + i_k * s_out_k
    p_order += i_k * length
    if p_d is not None:
        p_d += i_k * heads * P
    if p_mask is not None:
        p_mask += i_b * length
    if p_states is not None:
        p_states += i_bkm * N * heads * P

    token, m_exists, m_active = _tokens(p_order, p_mask, i_m, length, Q)
    b_scores = _scores(p_in_weight, p_out_weight, token, m_active, s_in_weight_l, s_out_weight_l, N, BN, Q, PRECISION)
    for i_h in tl.range(i_g * per_group, tl.minimum(i_g * per_group + per_group, heads), disable_licm=True):
        i_steps = (i_bkm * heads + i_h) * Q
        b_dt = tl.load(p_dt + (i_steps + o_q))
        b_pairs = _decay_between(p_high, p_low, i_steps, REVERSE, Q) * b_scores
        if REVERSE:
            b_decay = _decay_to_end(p_high, p_low, i_steps, Q) * b_dt
            b_pairs = b_pairs * b_dt[:, None]
        else:
            b_decay = _decay_from_start(p_high, i_steps, Q)
            b_pairs = b_pairs * b_dt[None, :]
        for i_p in tl.range(0, P, BP, disable_licm=True, loop_unroll_factor=1):
            o_p = i_p + tl.arange(0, BP).to(tl.int64)
            m_p = o_p < P
            o_c = i_h * P + o_p
            b_in = _tile(p_in + token[:, None] * s_in_l + o_c[None, :], m_active[:, None] & m_p[None, :])
            b_out = tl.zeros([Q, BP], tl.float32)
            if p_states is not None:
                for i_n in tl.range(0, N, BN, disable_licm=True, loop_unroll_factor=1):
                    o_n = i_n + tl.arange(0, BN).to(tl.int64)
                    o_nc = o_n[:, None] * (heads * P) + o_c[None, :]
                    b_state = tl.load(p_states + o_nc, mask=(o_n < N)[:, None] & m_p[None, :], other=0)
                    b_weight = _weight(p_out_weight, token, m_active, s_out_weight_l, i_n, N, BN)
                    b_out = _dot(b_weight, b_state, b_out, PRECISION)
                b_out *= b_decay[:, None]
            b_out = _dot(b_pairs, b_in, b_out, PRECISION)
            if p_d is not None:
                b_out += tl.load(p_d + o_c, mask=m_p, other=0)[None, :] * b_in.to(tl.float32)
            p_tile = p_out + token[:, None] * s_out_l + o_c[None, :]
            m_tile = m_exists[:, None] & m_p[None, :]
            if ACCUMULATE:
                b_out += tl.load(p_tile, mask=m_tile, other=0)
            tl.store(p_tile, b_out, mask=m_tile)


@triton.jit(do_not_specialize=["heads", *SIZES])
def _ssd_bwd_states_kernel(
    p_dy,
    p_x,
    p_b,
    p_c,
    p_dt,
    p_high,
    p_low,
    p_decays,
    p_mask,
    p_order,
    p_states,
    p_later,
    p_db,
    p_dc,
    p_entering,
    p_leaving,
    p_through,
    s_dy_b,
    s_dy_k,
    s_dy_l,
    s_x_b,
    s_x_l,
    s_b_b,
    s_b_l,
    s_b_k,
    s_c_b,
    s_c_l,
    s_c_k,
    batch,
    length,
    routes,
    heads,
    chunks,
    groups,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The share of the states in the gradients of a chunk, from the state h that enters it and the gradient g of the
    state it hands on.

    Writes, summed over the heads of a group, to ``p_dc`` and ``p_db`` (groups, batch, L, K, N)::

        dC_i = exp(s_i) dy_i h^T        dB_j = exp(s_Q - s_j) dt_j x_j g^T

    and for every head the products that its log decays need: ``p_entering`` dC_i . C_i and ``p_leaving``
    dB_j . B_j / dt_j (batch, K, M, H, Q), ``p_through`` exp(s_Q) <g, h> (batch, K, M, H).

    Grid: (batch * routes * chunks * groups of heads, blocks of BN states); the last three have the number of the block
    as a further axis in front.
    """
    i_g, i_bkm, i_m, i_b, i_k = _program(groups, chunks, routes)
    per_group = tl.cdiv(heads, groups)
    i_n = tl.program_id(1).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN).to(tl.int64)
    o_q = tl.arange(0, Q).to(tl.int64)
    m_n = o_n < N
    p_dy += i_b * s_dy_b + i_k * s_dy_k
    p_x += i_b * s_x_b
    p_b += i_b * s_b_b + i_k * s_b_k
    p_c += i_b * s_c_b + i_k * s_c_k
    p_order += i_k * length
    if p_mask is not None:
        p_mask += i_b * length
    p_states += i_bkm * N * heads * P
    p_later += i_bkm * N * heads * P

    token, m_exists, m_active = _tokens(p_order, p_mask, i_m, length, Q)
    b_b = _weight(p_b, token, m_active, s_b_l, i_n * BN, N, BN)
    b_c = _weight(p_c, token, m_active, s_c_l, i_n * BN, N, BN)
    b_db, b_dc = tl.zeros([Q, BN], tl.float32), tl.zeros([Q, BN], tl.float32)
    for i_h in tl.range(i_g * per_group, tl.minimum(i_g * per_group + per_group, heads), disable_licm=True):
        i_steps = (i_bkm * heads + i_h) * Q
        b_start = _decay_from_start(p_high, i_steps, Q)
        b_end = _decay_to_end(p_high, p_low, i_steps, Q)
        b_entering, b_leaving = tl.zeros([Q], tl.float32), tl.zeros([Q], tl.float32)
        b_through = tl.zeros([BP], tl.float32)
        for i_p in tl.range(0, P, BP, disable_licm=True, loop_unroll_factor=1):
            o_p = i_p + tl.arange(0, BP).to(tl.int64)
            m_p = o_p < P
            o_c = i_h * P + o_p
            m_qp, m_np = m_active[:, None] & m_p[None, :], m_n[:, None] & m_p[None, :]
            o_nc = o_n[:, None] * (heads * P) + o_c[None, :]
            b_h = tl.load(p_states + o_nc, mask=m_np, other=0)
            b_dy = _tile(p_dy + token[:, None] * s_dy_l + o_c[None, :], m_qp)
            b_part = _dot(b_dy, tl.trans(b_h), tl.zeros([Q, BN], tl.float32), PRECISION) * b_start[:, None]
            b_dc += b_part
            b_entering += tl.sum(b_part * b_c.to(tl.float32), axis=1)
            b_g = tl.load(p_later + o_nc, mask=m_np, other=0)
            b_x = _tile(p_x + token[:, None] * s_x_l + o_c[None, :], m_qp)
            b_part = _dot(b_x, tl.trans(b_g), tl.zeros([Q, BN], tl.float32), PRECISION) * b_end[:, None]
            b_db += b_part * tl.load(p_dt + (i_steps + o_q))[:, None]
            b_leaving += tl.sum(b_part * b_b.to(tl.float32), axis=1)
            b_through += tl.sum(b_h * b_g, axis=0)
        i_head = i_bkm * heads + i_h
        i_part = i_n * batch * routes * chunks * heads + i_head
        tl.store(p_entering + (i_part * Q + o_q), b_entering)
        tl.store(p_leaving + (i_part * Q + o_q), b_leaving)
        tl.store(p_through + i_part, tl.sum(b_through, axis=0) * tl.load(p_decays + i_head))
    o_row = ((i_g * batch + i_b) * length + token) * routes + i_k
    m_row = m_exists[:, None] & m_n[None, :]
    tl.store(p_dc + o_row[:, None] * N + o_n[None, :], b_dc, mask=m_row)
    tl.store(p_db + o_row[:, None] * N + o_n[None, :], b_db, mask=m_row)


@triton.jit
def _add_pairs(
    p_out,
    b_pairs,
    p_weight,
    token,
    m_exists,
    m_active,
    s_weight_l,
    i_row,
    N: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add b_pairs @ weight to rows ``i_row`` of an output (rows, N)."""
    for i_n in tl.range(0, N, BN, disable_licm=True, loop_unroll_factor=1):
        o_n = i_n + tl.arange(0, BN).to(tl.int64)
        p_tile = p_out + i_row[:, None] * N + o_n[None, :]
        m_tile = m_exists[:, None] & (o_n < N)[None, :]
        b_out = tl.load(p_tile, mask=m_tile, other=0)
        b_out = _dot(b_pairs, _weight(p_weight, token, m_active, s_weight_l, i_n, N, BN), b_out, PRECISION)
        tl.store(p_tile, b_out, mask=m_tile)


@triton.jit(do_not_specialize=["heads", *SIZES])
def _ssd_bwd_pairs_kernel(
    p_dy,
    p_x,
    p_a,
    p_b,
    p_c,
    p_dt,
    p_high,
    p_low,
    p_slope,
    p_mask,
    p_order,
    p_entering,
    p_leaving,
    p_through,
    p_ddt,
    p_da,
    p_db,
    p_dc,
    p_dd,
    p_dbias,
    s_dy_b,
    s_dy_k,
    s_dy_l,
    s_x_b,
    s_x_l,
    s_b_b,
    s_b_l,
    s_b_k,
    s_c_b,
    s_c_l,
    s_c_k,
    batch,
    length,
    routes,
    heads,
    chunks,
    groups,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The share of the pairs of tokens of a chunk in dB and dC, and all of ddt, dA, dD and the gradient of the bias.

    With L_ij the decay from j to i, S = C B^T and T = dy x^T of a head::

        dC += (L T dt) B        dB += (L T dt)^T C        ddt_j = sum_i L_ij S_ij T_ij + leaving_j + A dl_j

    L T dt is added up over heads before its products with B and C. dl_t, the gradient of l_t = dt_t A, is the sum of
    what passes over t: the pairs j < t <= i of L S T dt, the state that enters to tokens from t on, tokens before t to
    the end, and the state through the chunk.

    Grid: (batch * routes * chunks * groups of heads,). Adds to ``p_db`` and ``p_dc`` of ``_ssd_bwd_states_kernel``;
    sums over the chunk go to ``p_da`` and ``p_dbias`` (batch, K, M, H) and ``p_dd`` (batch, K, M, C).
    """
    i_g, i_bkm, i_m, i_b, i_k = _program(groups, chunks, routes)
    per_group = tl.cdiv(heads, groups)
    o_q = tl.arange(0, Q).to(tl.int64)
    p_dy += i_b * s_dy_b + i_k * s_dy_k
    p_x += i_b * s_x_b
    p_b += i_b * s_b_b + i_k * s_b_k
    p_c += i_b * s_c_b + i_k * s_c_k
    p_ddt += (i_b * length * routes + i_k) * heads
    p_order += i_k * length
    if p_mask is not None:
        p_mask += i_b * length

    token, m_exists, m_active = _tokens(p_order, p_mask, i_m, length, Q)
    b_scores = _scores(p_b, p_c, token, m_active, s_b_l, s_c_l, N, BN, Q, PRECISION)
    b_heads = tl.zeros([Q, Q], tl.float32)
    for i_h in tl.range(i_g * per_group, tl.minimum(i_g * per_group + per_group, heads), disable_licm=True):
        i_head = i_bkm * heads + i_h
        i_steps = i_head * Q
        b_products = tl.zeros([Q, Q], tl.float32)
        for i_p in tl.range(0, P, BP, disable_licm=True, loop_unroll_factor=1):
            o_p = i_p + tl.arange(0, BP).to(tl.int64)
            m_p = o_p < P
            o_c = i_h * P + o_p
            m_qp = m_active[:, None] & m_p[None, :]
            b_x = _tile(p_x + token[:, None] * s_x_l + o_c[None, :], m_qp)
            b_dy = _tile(p_dy + token[:, None] * s_dy_l + o_c[None, :], m_qp)
            b_products = _dot(b_dy, tl.trans(b_x), b_products, PRECISION)
            if p_dd is not None:
                b_dd = tl.sum(b_x.to(tl.float32) * b_dy.to(tl.float32), axis=0)
                tl.store(p_dd + i_bkm * heads * P + o_c, b_dd, mask=m_p)

        b_dt = tl.load(p_dt + (i_steps + o_q))
        b_products *= _decay_between(p_high, p_low, i_steps, False, Q)
        b_heads += b_products * b_dt[None, :]
        b_products *= b_scores
        b_ddt = tl.sum(b_products, axis=0)
        # [t, j]: sum over i >= t, then over j < t. Rows minus columns would need no running sum of a tile, and cancel
        # where a step is large.
        b_products = tl.cumsum(b_products * b_dt[None, :], axis=0, reverse=True)
        b_dlog = tl.sum(tl.where(o_q[None, :] < o_q[:, None], b_products, 0), axis=1)
        b_ddt += tl.load(p_leaving + (i_steps + o_q))
        b_left = tl.load(p_leaving + (i_steps + o_q - 1), mask=o_q > 0, other=0)
        b_left *= tl.load(p_dt + (i_steps + o_q - 1), mask=o_q > 0, other=0)
        b_dlog += tl.cumsum(b_left, axis=0) + tl.load(p_through + i_head)
        b_dlog += tl.cumsum(tl.load(p_entering + (i_steps + o_q)), axis=0, reverse=True)
        b_ddt = (b_ddt + b_dlog * tl.load(p_a + i_k * heads + i_h)) * tl.load(p_slope + (i_steps + o_q))
        tl.store(p_ddt + token * routes * heads + i_h, b_ddt, mask=m_exists)
        tl.store(p_da + i_head, tl.sum(b_dlog * b_dt, axis=0))
        if p_dbias is not None:
            tl.store(p_dbias + i_head, tl.sum(b_ddt, axis=0))

    i_row = ((i_g * batch + i_b) * length + token) * routes + i_k
    _add_pairs(p_dc, b_heads, p_b, token, m_exists, m_active, s_b_l, i_row, N, BN, PRECISION)
    _add_pairs(p_db, tl.trans(b_heads), p_c, token, m_exists, m_active, s_c_l, i_row, N, BN, PRECISION)
