"""Triton kernels of the selective scan; :mod:`medmamba_kernels.backends.gpu` launches them and loads them on first use.

One program owns the channels of one block and walks along the tokens of a chunk of a route. A state tile is
[BN, BC], states by channels, and never leaves the registers inside a chunk. In the forward a thread holds all states
of one channel, so that the sum over states needs no other thread; in the backward, which also sums over channels,
a thread holds four channels times some of the states (fewer shuffles in all). The compiler takes the layout from the
loads of the tiles: where ``channels`` is not specialised it does not know that four channels are aligned and loads
one per thread.

Everything is computed in the dtype of the saved states, float32 or float64, whatever the inputs are. Offsets are
int64. There are no atomics: every output element is written by one program, sums over programs have a fixed order.

Names: p_ pointer, b_ block value, i_ index of a program or loop, o_ offsets, s_ strides, m_ masks.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# log2(e) as the sum of a float32 number and a rest.
LOG2E_HIGH = tl.constexpr(1.44269502162933349609375)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What differs from patch to patch and batch to batch must not cause another compilation.
SIZES = ("first_route", "batch", "length", "routes", "chunk", "chunks")


@triton.jit
def _softplus(b_raw):
    """log(1 + exp(raw)) and its derivative, to the last bits also where raw is very negative.

    exp(-|raw|) carries the rounding of |raw| log2(e) along, and log(1 + e) = 2 atanh(e / (2 + e)) is a short series:
    the hardware's log2 has an absolute error, which is a large relative one near log(1).
    """
    b_negative = -tl.abs(b_raw)
    b_power = b_negative * LOG2E_HIGH
    b_rest = tl.fma(b_negative, tl.full(b_raw.shape, LOG2E_HIGH, b_raw.dtype), -b_power) + b_negative * LOG2E_LOW
    b_e = tl.exp2(b_power)
    b_e = tl.fma(b_e, b_rest * LN2, b_e)
    b_ratio = b_e / (b_e + 2)
    b_square = b_ratio * b_ratio
    terms: tl.constexpr = 17 if b_raw.dtype == tl.float64 else 7
    b_series = tl.zeros_like(b_raw)
    for i in tl.static_range(terms):
        b_series = tl.fma(b_series, b_square, tl.full(b_raw.shape, 1 / (2 * (terms - 1 - i) + 1), b_raw.dtype))
    b_inverse = 1 / (b_e + 1)
    b_slope = tl.where(b_raw >= 0, b_inverse, b_e * b_inverse)
    return tl.fma(2 * b_ratio, b_series, tl.maximum(b_raw, 0)), b_slope


@triton.jit
def _position(p_order, p_mask, p_starts, step, last):
    """Where a step of the route is: its token, whether it exists, whether it takes part, and 0 where it starts anew.

    Steps from ``last`` on do not exist; they are harmless (no step size, no input) and must not be stored.
    """
    nearest = tl.minimum(step, last - 1).to(tl.int64)
    token = tl.load(p_order + nearest).to(tl.int64)
    m_exists = step + tl.arange(0, 1) < last  # [1], as a block: a scalar cannot be combined with a mask
    m_active = m_exists
    if p_mask is not None:
        m_active = m_exists & (tl.load(p_mask + (token + tl.arange(0, 1))) != 0)
    keep = 1.0
    if p_starts is not None:
        keep = 1.0 - tl.load(p_starts + nearest).to(tl.float32)
    return token, m_exists, m_active, keep


@triton.jit
def _inputs(p_order, p_mask, p_starts, p_x, p_dt, p_b, s_x_l, s_dt_l, s_b_l, o_c, o_n, m_c, m_n, step, last):
    """The position of a step and what is read there: x [BC], raw dt [BC] and B [BN], 0 where nothing takes part."""
    token, m_exists, m_active, keep = _position(p_order, p_mask, p_starts, step, last)
    b_x = tl.load(p_x + token * s_x_l + o_c, mask=m_c & m_active, other=0)
    b_raw = tl.load(p_dt + token * s_dt_l + o_c, mask=m_c & m_active, other=0)
    b_b = tl.load(p_b + token * s_b_l + o_n, mask=m_n & m_active, other=0)
    return token, m_exists, m_active, keep, b_x, b_raw, b_b


@triton.jit
def _step_size(b_raw, b_bias, m_active, SOFTPLUS: tl.constexpr):
    """dt and d dt / d raw; 0 for tokens that take no part."""
    b_dt = b_raw + b_bias
    b_slope = tl.full(b_dt.shape, 1, b_dt.dtype)
    if SOFTPLUS:
        b_dt, b_slope = _softplus(b_dt)
    return tl.where(m_active, b_dt, 0), tl.where(m_active, b_slope, 0)


@triton.jit
def _decay(b_dt, b_a2, keep, p_starts):
    """exp(dt A) of one step, 0 where the route starts anew."""
    b_decay = tl.exp2(b_dt[None, :] * b_a2)  # [BN, BC]
    if p_starts is not None:
        b_decay = b_decay * keep
    return b_decay


@triton.jit
def _weights(p_weights, o_c, m_c, like):
    """Per-channel weights [BC], or zeros where there are none."""
    b_weights = tl.zeros_like(like)
    if p_weights is not None:
        b_weights = tl.load(p_weights + o_c, mask=m_c, other=0).to(like.dtype)
    return b_weights


@triton.jit(do_not_specialize=["channels", *SIZES])
def _scan_chunk_kernel(
    p_in,
    p_dt,
    p_a,
    p_weight,
    p_bias,
    p_mask,
    p_order,
    p_starts,
    p_states,
    p_sums,
    s_in_b,
    s_in_k,
    s_in_l,
    s_dt_b,
    s_dt_l,
    s_dt_k,
    s_weight_b,
    s_weight_l,
    s_weight_k,
    length,
    routes,
    channels,
    chunk,
    chunks,
    N: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What a chunk hands on when nothing enters it, and its sum of dt.

    Forward: the state at its end, from x and B. Reverse: the gradient of the state before its start, from dy and C.

    Grid: (batch * chunks * channel blocks, routes). Writes states (batch, K, M, N, C) and sums (batch, K, M, C).
    """
    blocks = tl.cdiv(channels, BC)
    i_bm = tl.program_id(0) // blocks
    # Remainders by subtraction: with % ptxas needs more than 128 registers.
    i_c = (tl.program_id(0) - i_bm * blocks).to(tl.int64)
    i_b = (i_bm // chunks).to(tl.int64)
    i_m = i_bm - i_b * chunks
    i_k = tl.program_id(1).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC).to(tl.int64)
    o_n = tl.arange(0, BN).to(tl.int64)
    m_c, m_n = o_c < channels, o_n < N
    o_nc = o_n[:, None] * channels + o_c[None, :]
    m_nc = m_n[:, None] & m_c[None, :]
    acc: tl.constexpr = p_states.dtype.element_ty

    b_a2 = tl.load(p_a + i_k * N * channels + o_nc, mask=m_nc, other=0).to(acc) * LOG2E
    b_zero = tl.zeros([BC], acc)
    b_bias = _weights(p_bias, i_k * channels + o_c, m_c, b_zero)
    p_in += i_b * s_in_b + i_k * s_in_k
    p_dt += i_b * s_dt_b + i_k * s_dt_k
    p_weight += i_b * s_weight_b + i_k * s_weight_k
    p_order += i_k * length
    if p_mask is not None:
        p_mask += i_b * length
    if p_starts is not None:
        p_starts += i_k * length

    b_h = tl.zeros([BN, BC], acc)
    b_sum = b_zero
    first = (i_m * chunk).to(tl.int32)
    last = tl.minimum(i_m * chunk + chunk, length).to(tl.int32)
    # Loads run one step ahead of the arithmetic, which hides their latency.
    step = last - 1 if REVERSE else first
    _token, _m_exists, m_active, keep, b_in, b_raw, b_weight = _inputs(
        p_order, p_mask, p_starts, p_in, p_dt, p_weight, s_in_l, s_dt_l, s_weight_l, o_c, o_n, m_c, m_n, step, last
    )
    for i in range(last - first):
        b_in_now, b_raw_now, b_weight_now, m_active_now, keep_now = b_in, b_raw, b_weight, m_active, keep
        step = tl.maximum(last - 2 - i, first) if REVERSE else first + 1 + i
        _token, _m_exists, m_active, keep, b_in, b_raw, b_weight = _inputs(
            p_order, p_mask, p_starts, p_in, p_dt, p_weight, s_in_l, s_dt_l, s_weight_l, o_c, o_n, m_c, m_n, step, last
        )

        b_dt, _b_slope = _step_size(b_raw_now.to(acc), b_bias, m_active_now, SOFTPLUS)
        b_decay = _decay(b_dt, b_a2, keep_now, p_starts)
        b_sum += b_dt
        if REVERSE:
            b_h = b_decay * tl.fma(b_in_now.to(acc)[None, :], b_weight_now.to(acc)[:, None], b_h)
        else:
            b_h = tl.fma(b_decay, b_h, (b_dt * b_in_now.to(acc))[None, :] * b_weight_now.to(acc)[:, None])
    i_bkm = (i_b * routes + i_k) * chunks + i_m
    tl.store(p_states + i_bkm * N * channels + o_nc, b_h, mask=m_nc)
    tl.store(p_sums + i_bkm * channels + o_c, b_sum, mask=m_c)


@triton.jit(do_not_specialize=["channels", *SIZES], do_not_specialize_on_alignment=["p_states", "p_sums", "p_a"])
def _scan_carry_kernel(
    p_states,
    p_sums,
    p_resets,
    p_a,
    routes,
    channels,
    chunks,
    N: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Replace what every chunk hands on by what enters it, from chunk to chunk (from the last to the first: REVERSE).

    Grid: (batch * routes * blocks of N * C elements,). Reads BM chunks at a time, then walks through them.
    """
    elements = N * channels
    blocks = tl.cdiv(elements, BE)
    i_e = (tl.program_id(0) % blocks).to(tl.int64)
    i_bk = (tl.program_id(0) // blocks).to(tl.int64)
    i_k = i_bk % routes
    o_e = i_e * BE + tl.arange(0, BE).to(tl.int64)
    o_c = (o_e.to(tl.int32) % channels).to(tl.int64)
    o_u = tl.arange(0, BM)
    m_e = o_e < elements
    acc: tl.constexpr = p_states.dtype.element_ty
    b_a2 = tl.load(p_a + i_k * elements + o_e, mask=m_e, other=0).to(acc) * LOG2E
    b_h = tl.zeros([BE], acc)
    for i in range(0, chunks, BM):
        o_m = chunks - 1 - (i + o_u) if REVERSE else i + o_u
        o_m = o_m.to(tl.int64)
        m_m = (o_m >= 0) & (o_m < chunks)
        o_me = ((i_bk * chunks + o_m) * elements)[:, None] + o_e[None, :]
        m_me = m_m[:, None] & m_e[None, :]
        b_local = tl.load(p_states + o_me, mask=m_me, other=0)
        o_sum = ((i_bk * chunks + o_m) * channels)[:, None] + o_c[None, :]
        b_decay = tl.exp2(tl.load(p_sums + o_sum, mask=m_me, other=0) * b_a2[None, :])
        if p_resets is not None:
            b_resets = tl.load(p_resets + i_k * chunks + o_m, mask=m_m, other=0)
            b_decay = tl.where((b_resets != 0)[:, None], 0, b_decay)
        b_entering = tl.zeros([BM, BE], acc)
        for u in tl.static_range(BM):
            m_u = (o_u == u)[:, None]
            b_entering = tl.where(m_u, b_h[None, :], b_entering)
            b_decay_u = tl.sum(tl.where(m_u, b_decay, 0), axis=0)
            b_h = tl.fma(b_decay_u, b_h, tl.sum(tl.where(m_u, b_local, 0), axis=0))
        tl.store(p_states + o_me, b_entering, mask=m_me)


@triton.jit(do_not_specialize=["channels", *SIZES])
def _scan_fwd_kernel(
    p_x,
    p_dt,
    p_a,
    p_b,
    p_c,
    p_d,
    p_bias,
    p_mask,
    p_order,
    p_starts,
    p_states,
    p_y,
    s_x_b,
    s_x_l,
    s_dt_b,
    s_dt_l,
    s_dt_k,
    s_b_b,
    s_b_l,
    s_b_k,
    s_c_b,
    s_c_l,
    s_c_k,
    s_y_b,
    s_y_k,
    s_y_l,
    first_route,
    length,
    routes,
    channels,
    chunk,
    chunks,
    N: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """y of the tokens of a chunk, from the state that enters it (``p_states`` (batch, K, M, N, C)).

    Grid: (batch * chunks * channel blocks, routes of this launch). ACCUMULATE adds to the y of earlier launches.
    """
    blocks = tl.cdiv(channels, BC)
    i_c = (tl.program_id(0) % blocks).to(tl.int64)
    i_b = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    i_m = (tl.program_id(0) // blocks % chunks).to(tl.int64)
    i_k = tl.program_id(1).to(tl.int64) + first_route
    o_c = i_c * BC + tl.arange(0, BC).to(tl.int64)
    o_n = tl.arange(0, BN).to(tl.int64)
    m_c, m_n = o_c < channels, o_n < N
    o_nc = o_n[:, None] * channels + o_c[None, :]
    m_nc = m_n[:, None] & m_c[None, :]
    acc: tl.constexpr = p_y.dtype.element_ty

    b_a2 = tl.load(p_a + i_k * N * channels + o_nc, mask=m_nc, other=0).to(acc) * LOG2E
    b_zero = tl.zeros([BC], acc)
    b_bias = _weights(p_bias, i_k * channels + o_c, m_c, b_zero)
    b_d = _weights(p_d, i_k * channels + o_c, m_c, b_zero)
    p_x += i_b * s_x_b
    p_dt += i_b * s_dt_b + i_k * s_dt_k
    p_b += i_b * s_b_b + i_k * s_b_k
    p_c += i_b * s_c_b + i_k * s_c_k
    p_y += i_b * s_y_b + i_k * s_y_k
    p_order += i_k * length
    if p_mask is not None:
        p_mask += i_b * length
    if p_starts is not None:
        p_starts += i_k * length

    b_h = tl.zeros([BN, BC], acc)
    if p_states is not None:
        i_bkm = (i_b * routes + i_k) * chunks + i_m
        b_h = tl.load(p_states + i_bkm * N * channels + o_nc, mask=m_nc, other=0)
    first = (i_m * chunk).to(tl.int32)
    last = tl.minimum(i_m * chunk + chunk, length).to(tl.int32)
    # Loads run one step ahead of the arithmetic, which hides their latency.
    token, m_exists, m_active, keep, b_x, b_raw, b_b = _inputs(
        p_order, p_mask, p_starts, p_x, p_dt, p_b, s_x_l, s_dt_l, s_b_l, o_c, o_n, m_c, m_n, first, last
    )
    b_c = tl.load(p_c + token * s_c_l + o_n, mask=m_n & m_active, other=0)
    b_y = b_zero
    if ACCUMULATE:
        b_y = tl.load(p_y + token * s_y_l + o_c, mask=m_c, other=0)
    for step in range(first, last):
        b_x_now, b_raw_now, b_b_now, b_c_now, b_y_now = b_x, b_raw, b_b, b_c, b_y
        token_now, m_active_now, keep_now = token, m_active, keep
        token, m_exists, m_active, keep, b_x, b_raw, b_b = _inputs(
            p_order, p_mask, p_starts, p_x, p_dt, p_b, s_x_l, s_dt_l, s_b_l, o_c, o_n, m_c, m_n, step + 1, last
        )
        b_c = tl.load(p_c + token * s_c_l + o_n, mask=m_n & m_active, other=0)
        if ACCUMULATE:
            b_y = tl.load(p_y + token * s_y_l + o_c, mask=m_c & m_exists, other=0)

        b_dt, _b_slope = _step_size(b_raw_now.to(acc), b_bias, m_active_now, SOFTPLUS)
        b_decay = _decay(b_dt, b_a2, keep_now, p_starts)
        b_u = b_x_now.to(acc)
        b_h = tl.fma(b_decay, b_h, (b_dt * b_u)[None, :] * b_b_now.to(acc)[:, None])
        b_out = tl.fma(b_d, b_u, b_y_now) + tl.sum(b_h * b_c_now.to(acc)[:, None], axis=0)
        tl.store(p_y + token_now * s_y_l + o_c, b_out, mask=m_c)


@triton.jit
def _reverse_step(b_h, b_g, b_da, b_a2, b_x, b_dt, b_b, b_c, b_dy, b_d, keep, p_starts):
    """One token of the backward, from the state before it and the gradient of the state after it.

    Returns:
        the gradient of the state before it, the running dA, and the token's dx [BC], ddt [BC], dB [BN], dC [BN].
    """
    b_decay = _decay(b_dt, b_a2, keep, p_starts)
    b_u = b_dt * b_x
    b_after = tl.fma(b_decay, b_h, b_u[None, :] * b_b[:, None])
    b_g = tl.fma(b_dy[None, :], b_c[:, None], b_g)
    b_dc = tl.sum(b_after * b_dy[None, :], axis=1)
    b_db = tl.sum(b_g * b_u[None, :], axis=1)
    b_gb = tl.sum(b_g * b_b[:, None], axis=0)
    b_g = b_g * b_decay
    b_through = b_g * b_h
    b_da = tl.fma(b_through, b_dt[None, :], b_da)
    b_ddt = tl.fma(b_x, b_gb, tl.sum(b_through * b_a2, axis=0) * LN2)
    return b_g, b_da, tl.fma(b_dt, b_gb, b_d * b_dy), b_ddt, b_db, b_dc


@triton.jit(do_not_specialize=SIZES)
def _scan_bwd_kernel(
    p_dy,
    p_x,
    p_dt,
    p_a,
    p_b,
    p_c,
    p_d,
    p_bias,
    p_mask,
    p_order,
    p_starts,
    p_states,
    p_later,
    p_scratch,
    p_dx,
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
    s_dt_b,
    s_dt_l,
    s_dt_k,
    s_b_b,
    s_b_l,
    s_b_k,
    s_c_b,
    s_c_l,
    s_c_k,
    s_dx_b,
    s_dx_k,
    s_dx_l,
    first_route,
    batch,
    length,
    routes,
    channels,
    chunk,
    chunks,
    N: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Gradients of the tokens of many chunks: recompute the states from those that enter, then sweep back.

    A chunk is walked in groups of four tokens. The states at the start of every group go to the program's own
    scratch; the states within a group stay in registers.

    Grid: (P programs that share the chunks, G programs that share the channel blocks, routes of this launch).
    Per-channel sums go to ``p_da`` (P, routes of this launch, N, C), ``p_dd`` and ``p_dbias`` (P, routes of this
    launch, C); sums over the channels of one of the G to ``p_db`` and ``p_dc`` (G, batch, L, K, N), the blocks of a
    program being added one after the other. ACCUMULATE adds to the dx of earlier launches.
    """
    i_p, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_launch = tl.program_id(2).to(tl.int64)
    i_k = i_launch + first_route
    parts, groups, launched = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    o_n = tl.arange(0, BN).to(tl.int64)
    m_n = o_n < N
    acc: tl.constexpr = p_states.dtype.element_ty
    i_program = (i_launch * groups + i_g) * parts + i_p
    o_tile = tl.arange(0, BN).to(tl.int64)[:, None] * BC + tl.arange(0, BC).to(tl.int64)[None, :]
    p_scratch += i_program * (chunk // 4) * BN * BC + o_tile
    p_order += i_k * length
    if p_starts is not None:
        p_starts += i_k * length

    for i_c in range(i_g, tl.cdiv(channels, BC), groups):
        o_c = i_c * BC + tl.arange(0, BC).to(tl.int64)
        m_c = o_c < channels
        o_nc = o_n[:, None] * channels + o_c[None, :]
        m_nc = m_n[:, None] & m_c[None, :]
        b_zero = tl.zeros([BC], acc)
        b_a2 = tl.load(p_a + i_k * N * channels + o_nc, mask=m_nc, other=0).to(acc) * LOG2E
        b_bias = _weights(p_bias, i_k * channels + o_c, m_c, b_zero)
        b_d = _weights(p_d, i_k * channels + o_c, m_c, b_zero)
        b_da, b_dd, b_dbias = tl.zeros([BN, BC], acc), b_zero, b_zero
        m_add = tl.zeros([1], tl.int64) + i_c > i_g  # a program's first block writes dB and dC, the others add

        for item in range(i_p, batch * chunks, parts):
            i_b, i_m = item // chunks, item % chunks
            i_state = ((i_b * routes + i_k) * chunks + i_m) * N * channels
            p_x_b = p_x + i_b * s_x_b
            p_dt_b = p_dt + i_b * s_dt_b + i_k * s_dt_k
            p_b_b = p_b + i_b * s_b_b + i_k * s_b_k
            p_c_b = p_c + i_b * s_c_b + i_k * s_c_k
            p_dy_b = p_dy + i_b * s_dy_b + i_k * s_dy_k
            p_dx_b = p_dx + i_b * s_dx_b + i_k * s_dx_k
            p_mask_b = p_mask
            if p_mask is not None:
                p_mask_b = p_mask + i_b * length
            first = (i_m * chunk).to(tl.int32)
            last = tl.minimum(i_m * chunk + chunk, length).to(tl.int32)
            fours = tl.cdiv(last - first, 4).to(tl.int64)

            b_h = tl.load(p_states + i_state + o_nc, mask=m_nc, other=0)
            _token, _m_exists, m_active, keep, b_x, b_raw, b_b = _inputs(
                p_order, p_mask_b, p_starts, p_x_b, p_dt_b, p_b_b, s_x_l, s_dt_l, s_b_l, o_c, o_n, m_c, m_n, first, last
            )
            for i_four in range(fours):
                tl.store(p_scratch + i_four * BN * BC, b_h)
                for i in range(4):
                    step = (first + 4 * i_four + i + 1).to(tl.int32)
                    m_active_now, keep_now, b_x_now, b_raw_now, b_b_now = m_active, keep, b_x, b_raw, b_b
                    _token, _m_exists, m_active, keep, b_x, b_raw, b_b = _inputs(
                        p_order,
                        p_mask_b,
                        p_starts,
                        p_x_b,
                        p_dt_b,
                        p_b_b,
                        s_x_l,
                        s_dt_l,
                        s_b_l,
                        o_c,
                        o_n,
                        m_c,
                        m_n,
                        step,
                        last,
                    )
                    b_dt, _b_slope = _step_size(b_raw_now.to(acc), b_bias, m_active_now, SOFTPLUS)
                    b_u = b_dt * b_x_now.to(acc)
                    b_h = tl.fma(_decay(b_dt, b_a2, keep_now, p_starts), b_h, b_u[None, :] * b_b_now.to(acc)[:, None])
            # The scratch is read by the threads that wrote it only if both use one layout; the barrier makes sure.
            tl.debug_barrier()

            b_g = tl.load(p_later + i_state + o_nc, mask=m_nc, other=0)
            # C, dy and the dx to add to are read here for the first time in a long while, so one step ahead.
            step = (first + 4 * fours - 1).to(tl.int32)
            token, m_exists, m_active, keep = _position(p_order, p_mask_b, p_starts, step, last)
            b_c = tl.load(p_c_b + token * s_c_l + o_n, mask=m_n & m_active, other=0)
            b_dy = tl.load(p_dy_b + token * s_dy_l + o_c, mask=m_c & m_active, other=0)
            b_dx_old = b_zero
            if ACCUMULATE:
                b_dx_old = tl.load(p_dx_b + token * s_dx_l + o_c, mask=m_c & m_exists, other=0)
            for i_back in range(fours):
                i_four = fours - 1 - i_back
                # The states before the four tokens, filled from b_h3 and emptied into it by turns: loops that are not
                # unrolled keep the registers of several tokens apart.
                b_h3 = tl.load(p_scratch + i_four * BN * BC)
                b_h0, b_h1, b_h2 = b_h3, b_h3, b_h3
                for i in range(3):
                    step = (first + 4 * i_four + i).to(tl.int32)
                    _token, _m_exists, m_active, keep, b_x, b_raw, b_b = _inputs(
                        p_order,
                        p_mask_b,
                        p_starts,
                        p_x_b,
                        p_dt_b,
                        p_b_b,
                        s_x_l,
                        s_dt_l,
                        s_b_l,
                        o_c,
                        o_n,
                        m_c,
                        m_n,
                        step,
                        last,
                    )
                    b_dt, _b_slope = _step_size(b_raw.to(acc), b_bias, m_active, SOFTPLUS)
                    b_u = b_dt * b_x.to(acc)
                    b_h0, b_h1, b_h2 = b_h1, b_h2, b_h3
                    b_h3 = tl.fma(_decay(b_dt, b_a2, keep, p_starts), b_h3, b_u[None, :] * b_b.to(acc)[:, None])
                for i in range(4):
                    step = (first + 4 * i_four + 3 - i).to(tl.int32)
                    b_c_now, b_dy_now, b_dx = b_c.to(acc), b_dy.to(acc), b_dx_old
                    token, m_exists, m_active, keep = _position(
                        p_order, p_mask_b, p_starts, tl.maximum(step - 1, first), last
                    )
                    b_c = tl.load(p_c_b + token * s_c_l + o_n, mask=m_n & m_active, other=0)
                    b_dy = tl.load(p_dy_b + token * s_dy_l + o_c, mask=m_c & m_active, other=0)
                    if ACCUMULATE:
                        b_dx_old = tl.load(p_dx_b + token * s_dx_l + o_c, mask=m_c & m_exists, other=0)
                    token, m_exists, m_active, keep, b_x, b_raw, b_b = _inputs(
                        p_order,
                        p_mask_b,
                        p_starts,
                        p_x_b,
                        p_dt_b,
                        p_b_b,
                        s_x_l,
                        s_dt_l,
                        s_b_l,
                        o_c,
                        o_n,
                        m_c,
                        m_n,
                        step,
                        last,
                    )
                    b_dt, b_slope = _step_size(b_raw.to(acc), b_bias, m_active, SOFTPLUS)
                    b_g, b_da, b_dx_route, b_ddt, b_db, b_dc = _reverse_step(
                        b_h3, b_g, b_da, b_a2, b_x.to(acc), b_dt, b_b.to(acc), b_c_now, b_dy_now, b_d, keep, p_starts
                    )
                    b_h3, b_h2, b_h1 = b_h2, b_h1, b_h0
                    b_ddt = b_ddt * b_slope
                    b_dd = tl.fma(b_x.to(acc), b_dy_now, b_dd)
                    b_dbias += b_ddt
                    m_store = m_c & m_exists
                    tl.store(p_dx_b + token * s_dx_l + o_c, b_dx + b_dx_route, mask=m_store)
                    i_row = (i_b * length + token) * routes + i_k
                    tl.store(p_ddt + i_row * channels + o_c, b_ddt, mask=m_store)
                    i_row_g = (i_g * batch * length * routes + i_row) * N
                    b_db += tl.load(p_db + i_row_g + o_n, mask=m_n & m_exists & m_add, other=0)
                    b_dc += tl.load(p_dc + i_row_g + o_n, mask=m_n & m_exists & m_add, other=0)
                    tl.store(p_db + i_row_g + o_n, b_db, mask=m_n & m_exists)
                    tl.store(p_dc + i_row_g + o_n, b_dc, mask=m_n & m_exists)
            tl.debug_barrier()

        i_part = i_p * launched + i_launch
        tl.store(p_da + i_part * N * channels + o_nc, b_da, mask=m_nc)
        if p_dd is not None:
            tl.store(p_dd + i_part * channels + o_c, b_dd, mask=m_c)
        if p_dbias is not None:
            tl.store(p_dbias + i_part * channels + o_c, b_dbias, mask=m_c)
