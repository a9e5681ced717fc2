// The selective scan, compiled once per instruction set (MEDMAMBA_ISA names the object).
//
//   dt' = softplus(dt + bias);   h <- exp(dt' A) h + dt' x B;   y = <h, C> + D x          (Gu and Dao, Mamba, 2023)
//
// Lanes are channels: no sum crosses lanes in the forward pass, so AVX2 and AVX-512 give the same bits. Tokens are
// gathered kBlock at a time, in the order of the route; masked tokens drop out here, and resets cut the block into
// segments, so that the inner loops know neither. Inside a block, channels go by groups of one vector: dt', dt' x and y
// of the block sit in L1 while the states pass through registers, a few per pass.
//
// In the SSD form the decay is one number per head: it is computed once per token and head, with the step size, and the
// inner loops load it (Scalar) where S6 takes an exponential per state.
//
// Precision: everything in T. Sums over all tokens (dA, dD, ddt_bias) are taken in T within a block and in double
// across blocks. The state is stored every kBlock tokens; the backward pass recomputes it inside each block.

#include "kernels.h"
#include "simd.h"

#ifndef MEDMAMBA_ISA
#error "compile with -DMEDMAMBA_ISA=<name>"
#endif

#define MEDMAMBA_INLINE inline __attribute__((always_inline))

namespace {

using medmamba::kBlock;
using medmamba::Member;
using medmamba::RingSlot;

// Decaying states reach the subnormal range wherever the input is zero for long (image background); arithmetic there is
// a hundred times slower on some CPUs. Subnormals count as zero inside a call, on every x86 instruction set alike.
struct FlushSubnormals {
#if defined(__SSE2__)
    unsigned saved;
    FlushSubnormals() : saved(_mm_getcsr()) { _mm_setcsr(saved | 0x8040u); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#else
    FlushSubnormals() {}
#endif
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T> inline int64_t group_count(const medmamba_scan &s) {
    return (s.channels + Simd<T>::W - 1) / Simd<T>::W;
}

inline int64_t block_count(const medmamba_scan &s) { return (s.length + kBlock - 1) / kBlock; }

// The tokens of one block of one route: `token` in visiting order without the masked ones, cut into segments. The state
// is reset before every segment but the first; before the first if `reset_first`; after the last if `reset_last`.
struct Block {
    int count, masked, segments;
    bool reset_first, reset_last;
    const int32_t *token;
    int begin[kBlock + 1];
    int32_t kept[kBlock], dropped[kBlock];
};

void read_block(const medmamba_scan &s, int64_t b, int64_t k, int64_t first, Block &out) {
    const int64_t last = first + kBlock < s.length ? first + kBlock : s.length;
    const int32_t *order = s.order + k * s.length;
    out.masked = 0;
    out.segments = 1;
    out.begin[0] = 0;
    out.reset_first = out.reset_last = false;
    if (!s.mask && !s.starts) { // read in place
        out.token = order + first;
        out.count = int(last - first);
        out.begin[1] = out.count;
        return;
    }
    const uint8_t *mask = s.mask ? s.mask + b * s.length : nullptr;
    const uint8_t *starts = s.starts ? s.starts + k * s.length : nullptr;
    int n = 0, segments = 0;
    bool reset = false;
    for (int64_t p = first; p < last; ++p) {
        const int32_t t = order[p];
        if (starts && starts[p]) reset = true; // a masked start still resets: the state passes masked tokens unchanged
        if (mask && !mask[t]) {
            out.dropped[out.masked++] = t;
            continue;
        }
        if (n == 0) out.reset_first = reset;
        if (n == 0 || reset) out.begin[segments++] = n;
        reset = false;
        out.kept[n++] = t;
    }
    out.reset_last = reset;
    out.token = out.kept;
    out.count = n;
    out.segments = segments;
    out.begin[segments] = n;
}

// Where the rows of the next block and group lie, to be fetched while this one is computed.
template <class T> struct Ahead {
    int count = 0;
    const int32_t *token = nullptr;
    const T *row[3] = {};
    int64_t stride[3] = {};
    // Distributes the fetches over the steps of the running block.
    MEDMAMBA_INLINE void fetch(int i) const {
        if (i >= count) return;
        const int64_t t = token[i];
        __builtin_prefetch(row[0] + t * stride[0]);
        __builtin_prefetch(row[1] + t * stride[1]);
        __builtin_prefetch(row[2] + t * stride[2]);
    }
};

// States are worked through in passes of 2^n states. Measured with AVX-512 and AVX2: 8 forward and 4 backward are best.
template <class T> struct Passes {
    static constexpr int forward_max = Simd<T>::W >= 8 ? 8 : 4;
    static constexpr int backward_max = Simd<T>::W >= 8 ? 4 : 2;
    static inline int64_t width(int64_t left, int max) {
        while (max > left) max /= 2;
        return max;
    }
};

// Rows of the arguments, typed.
template <class T> struct Rows {
    const medmamba_scan &s;
    explicit Rows(const medmamba_scan &scan) : s(scan) {}
    const T *x(int64_t b) const { return (const T *)s.x + b * s.x_stride[0]; }
    const T *dt(int64_t b, int64_t k) const { return (const T *)s.dt + b * s.dt_stride[0] + k * s.dt_stride[2]; }
    const T *B(int64_t b, int64_t k) const { return (const T *)s.B + b * s.B_stride[0] + k * s.B_stride[2]; }
    const T *C(int64_t b, int64_t k) const { return (const T *)s.C + b * s.C_stride[0] + k * s.C_stride[2]; }
    const T *dy(int64_t b, int64_t k) const { return (const T *)s.dy + b * s.dy_stride[0] + k * s.dy_stride[1]; }
};

// A step size is good if it is finite and not negative.
template <class T> struct StepCheck {
    typename Simd<T>::I bad = {};
    MEDMAMBA_INLINE void see(typename Simd<T>::V d) {
        const typename Simd<T>::V zero = {}, infinity = zero + T(INFINITY);
        bad |= ~((d >= zero) & (d < infinity));
    }
    bool failed() const {
        for (int w = 0; w < Simd<T>::W; ++w)
            if (bad[w]) return true;
        return false;
    }
};

// exp(dt A) = 2^(dt A'): A' = A log2(e). An A of -inf (exp of a diverged A_log) becomes a very fast decay: dt A' = -inf
// would have no fraction.
template <class T> inline T rate(T a) {
    const T scaled = a * T(1.4426950408889634074);
    return scaled < T(-1e30) ? T(-1e30) : scaled;
}

// A of the member's groups, transposed to [route][group][state][lane], as A'.
template <class T> void transpose_A(const medmamba_scan &s, int64_t g0, int64_t g1, T *out) {
    constexpr int W = Simd<T>::W;
    const T *A = (const T *)s.A;
    for (int64_t k = 0; k < s.routes; ++k)
        for (int64_t g = g0; g < g1; ++g)
            for (int64_t n = 0; n < s.states; ++n)
                for (int64_t w = 0; w < W; ++w) {
                    const int64_t c = g * W + w;
                    *out++ = c < s.channels ? rate(A[(k * s.channels + c) * s.states + n]) : T(0);
                }
}

// Rows of B or C of the block's tokens, contiguous.
template <class T> void gather_states(const T *rows, int64_t stride, const Block &block, int64_t N, T *out) {
    for (int i = 0; i < block.count; ++i)
        memcpy(out + i * N, rows + block.token[i] * stride, size_t(N) * sizeof(T));
}

template <class T> inline int lanes_of_group(const medmamba_scan &s, int64_t g) {
    const int64_t left = s.channels - g * Simd<T>::W;
    return int(left < Simd<T>::W ? left : Simd<T>::W);
}

// Per-channel vector of a (K, Ch) parameter, zero where the parameter is absent.
template <class T>
inline typename Simd<T>::V channel_vector(const void *p, const medmamba_scan &s, int64_t k, int64_t g) {
    if (!p) return typename Simd<T>::V{};
    const int lanes = lanes_of_group<T>(s, g);
    const T *row = (const T *)p + k * s.channels + g * Simd<T>::W;
    return lanes == Simd<T>::W ? load<T>(row) : load_lanes<T, false>(row, lanes);
}

// Weights of a low-rank dt of the member's groups, transposed to [route][group][rank][lane].
template <class T> void transpose_weight(const medmamba_scan &s, int64_t g0, int64_t g1, T *out) {
    constexpr int W = Simd<T>::W;
    const T *weight = (const T *)s.dt_weight;
    for (int64_t k = 0; k < s.routes; ++k)
        for (int64_t g = g0; g < g1; ++g)
            for (int64_t r = 0; r < s.rank; ++r)
                for (int64_t w = 0; w < W; ++w) {
                    const int64_t c = g * W + w;
                    *out++ = c < s.channels ? weight[(k * s.channels + c) * s.rank + r] : T(0);
                }
}

// Bump allocation from the scratch that the dispatcher sized with the same calls on a null base.
struct Arena {
    char *at;
    explicit Arena(void *base) : at((char *)base) {}
    template <class U> U *take(int64_t count) {
        U *p = (U *)at;
        at += round_up(count * int64_t(sizeof(U)), 64);
        return p;
    }
};

// Step sizes and decays of the heads of a block's tokens (SSD), and their spreading over the channels.
template <class T> struct Heads {
    typedef typename Simd<T>::V V;
    static constexpr int W = Simd<T>::W;
    int64_t count, padded, width; // heads, rounded up to whole vectors, channels of a head
    T *dt, *decay;                // [token of the block][padded]

    Heads(Arena &arena, const medmamba_scan &s) {
        count = s.heads;
        padded = round_up(count, W);
        width = count ? s.channels / count : 1;
        dt = arena.take<T>(kBlock * padded);
        decay = arena.take<T>(kBlock * padded);
    }

    static V parameter(const void *p, int64_t k, int64_t h, int64_t count) {
        V v = {};
        if (p)
            for (int w = 0; w < W && h + w < count; ++w) v[w] = ((const T *)p)[k * count + h + w];
        return v;
    }

    // The heads that have channels in groups [g0, g1).
    template <bool ClampUp>
    void read(const medmamba_scan &s, const Block &block, const T *rows, int64_t k, int64_t g0, int64_t g1,
              StepCheck<T> &check) const {
        const int64_t last = g1 * W < s.channels ? g1 * W : s.channels;
        for (int64_t h = g0 * W / width / W * W; h * width < last; h += W) {
            const V bias = parameter(s.dt_bias, k, h, count);
            V a = parameter(s.A, k, h, count);
            for (int w = 0; w < W; ++w) a[w] = rate(a[w]);
            const int lanes = int(count - h < W ? count - h : W);
            for (int i = 0; i < block.count; ++i) {
                const T *row = rows + block.token[i] * s.dt_stride[1] + h;
                V d = (lanes == W ? load<T>(row) : load_lanes<T, false>(row, lanes)) + bias;
                if (s.softplus) d = softplus<T>(d);
                check.see(d);
                store<T>(dt + i * padded + h, d);
                store<T>(decay + i * padded + h, Simd<T>::template exp2<ClampUp>(d * a));
            }
        }
    }

    // The values of the heads of group g's channels, one per lane.
    struct Spread {
        bool same;
        int32_t head[W];
        Spread(const Heads &heads, int64_t g) {
            for (int w = 0; w < W; ++w) {
                const int64_t h = (g * W + w) / heads.width;
                head[w] = int32_t(h < heads.count ? h : heads.count - 1);
            }
            same = head[0] == head[W - 1];
        }
        MEDMAMBA_INLINE V operator()(const T *row) const {
            if (same) return V{} + row[head[0]];
            V v;
            for (int w = 0; w < W; ++w) v[w] = row[head[w]];
            return v;
        }
    };
};

// Where the step sizes of one group of channels come from: rows of dt, or of z and the weights of a low-rank dt.
template <class T> struct StepSource {
    typedef typename Simd<T>::V V;
    const T *rows;   // dt at the group's first channel, or z
    int64_t stride;
    const T *weight; // [rank][lane], or null
    int64_t rank;
    V bias;
    template <bool Full> MEDMAMBA_INLINE V operator()(int64_t token, int lanes) const {
        const T *row = rows + token * stride;
        if (!weight) return load_lanes<T, Full>(row, lanes) + bias;
        V d = bias;
        for (int64_t r = 0; r < rank; ++r) d += row[r] * load<T>(weight + r * Simd<T>::W);
        return d;
    }
};

// --- forward -----------------------------------------------------------------------------------------------------

template <class T> struct ForwardScratch {
    typedef typename Simd<T>::V V;
    Arena arena;
    T *A, *weight, *h, *B, *C;
    V *dt, *u, *y, *decay;
    Block *blocks;
    Heads<T> heads;
    int64_t bytes;
    ForwardScratch(void *base, const medmamba_scan &s, int64_t groups) : arena(base), heads(arena, s) {
        constexpr int W = Simd<T>::W;
        A = arena.take<T>(s.heads ? 0 : s.routes * groups * s.states * W);
        weight = arena.take<T>(s.routes * groups * s.rank * W);
        h = arena.take<T>(groups * s.states * W);
        B = arena.take<T>(kBlock * s.states);
        C = arena.take<T>(kBlock * s.states);
        dt = arena.take<V>(kBlock);
        u = arena.take<V>(kBlock);
        y = arena.take<V>(kBlock);
        decay = arena.take<V>(s.heads ? kBlock : 0);
        blocks = arena.take<Block>(2);
        bytes = int64_t(arena.at - (char *)base);
    }
};

// S states through the tokens of a block; y accumulates. `step` is dt' of every token, or with Scalar the decay itself.
template <class T, int S, bool ClampUp, bool Scalar>
__attribute__((noinline)) void forward_pass(const Block &block, const T *A, T *state, const T *B, const T *C, int64_t N,
                                            const typename Simd<T>::V *step, const typename Simd<T>::V *u,
                                            typename Simd<T>::V *y, const Ahead<T> &ahead) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    V a[S], h[S];
    for (int j = 0; j < S; ++j) {
        a[j] = Scalar ? V{} : load<T>(A + j * W);
        h[j] = load<T>(state + j * W);
    }
    for (int segment = 0; segment < block.segments; ++segment) {
        if (segment > 0 || block.reset_first)
            for (int j = 0; j < S; ++j) h[j] = V{};
        const int end = block.begin[segment + 1];
        for (int i = block.begin[segment]; i < end; ++i) {
            ahead.fetch(i);
            const T *b = B + i * N, *c = C + i * N;
            const V d = step[i], v = u[i];
            V sum = y[i], second = {};
#pragma GCC unroll 16
            for (int j = 0; j < S; ++j) {
                h[j] = (Scalar ? d : Simd<T>::template exp2<ClampUp>(d * a[j])) * h[j] + v * b[j];
                // Without exponentials between them, the additions would wait for one another.
                (Scalar && j % 2 ? second : sum) += h[j] * c[j];
            }
            y[i] = Scalar && S > 1 ? sum + second : sum;
        }
    }
    for (int j = 0; j < S; ++j) store<T>(state + j * W, block.reset_last ? V{} : h[j]);
}

template <class T, bool ClampUp, bool Scalar>
void forward_states(const Block &block, const T *A, T *state, const T *B, const T *C, int64_t N,
                    const typename Simd<T>::V *step, const typename Simd<T>::V *u, typename Simd<T>::V *y,
                    const Ahead<T> &ahead) {
    constexpr int W = Simd<T>::W;
    const Ahead<T> nothing;
    for (int64_t n = 0; n < N;) {
        const int64_t S = Passes<T>::width(N - n, Passes<T>::forward_max);
        const Ahead<T> &fetch = n == 0 ? ahead : nothing;
        const T *a = A + n * W;
        T *h = state + n * W;
        if (S == 8)
            forward_pass<T, 8, ClampUp, Scalar>(block, a, h, B + n, C + n, N, step, u, y, fetch);
        else if (S == 4)
            forward_pass<T, 4, ClampUp, Scalar>(block, a, h, B + n, C + n, N, step, u, y, fetch);
        else if (S == 2)
            forward_pass<T, 2, ClampUp, Scalar>(block, a, h, B + n, C + n, N, step, u, y, fetch);
        else
            forward_pass<T, 1, ClampUp, Scalar>(block, a, h, B + n, C + n, N, step, u, y, fetch);
        n += S;
    }
}

// dt', dt' x and D x of the block's tokens, for one group of channels.
template <class T, bool Full>
void prepare_forward(const medmamba_scan &s, const Block &block, const T *x, const StepSource<T> &source,
                     typename Simd<T>::V skip, int lanes, const ForwardScratch<T> &scratch, StepCheck<T> &check) {
    typedef typename Simd<T>::V V;
    const int64_t x_stride = s.x_stride[1];
    const bool use_softplus = s.softplus;
    for (int i = 0; i < block.count; ++i) {
        const int64_t t = block.token[i];
        const V v = load_lanes<T, Full>(x + t * x_stride, lanes);
        V d = source.template operator()<Full>(t, lanes);
        if (use_softplus) d = softplus<T>(d);
        check.see(d);
        scratch.dt[i] = d;
        scratch.u[i] = d * v;
        scratch.y[i] = skip * v;
    }
}

// The same in SSD, where the step sizes are known already: the decays, dt' x and D x.
template <class T, bool Full>
void prepare_forward_heads(const medmamba_scan &s, const Block &block, const T *x, int64_t g,
                           typename Simd<T>::V skip, int lanes, const ForwardScratch<T> &scratch) {
    typedef typename Simd<T>::V V;
    const Heads<T> &heads = scratch.heads;
    const typename Heads<T>::Spread spread(heads, g);
    for (int i = 0; i < block.count; ++i) {
        const V v = load_lanes<T, Full>(x + block.token[i] * s.x_stride[1], lanes);
        scratch.decay[i] = spread(heads.decay + i * heads.padded);
        scratch.u[i] = spread(heads.dt + i * heads.padded) * v;
        scratch.y[i] = skip * v;
    }
}

// Writes the block's results to the volume, or adds them to those of the routes before.
template <class T, bool Full>
void finish_forward(const Block &block, T *y, int64_t stride, bool add, int lanes, const typename Simd<T>::V *from) {
    if (add) {
        for (int i = 0; i < block.count; ++i) {
            T *to = y + block.token[i] * stride;
            store_lanes<T, Full>(to, load_lanes<T, Full>(to, lanes) + from[i], lanes);
        }
        return;
    }
    for (int i = 0; i < block.count; ++i) store_lanes<T, Full>(y + block.token[i] * stride, from[i], lanes);
    for (int i = 0; i < block.masked; ++i)
        store_lanes<T, Full>(y + block.dropped[i] * stride, typename Simd<T>::V{}, lanes);
}

template <class T>
StepSource<T> step_source(const medmamba_scan &s, const T *dt, const T *weight, int64_t k, int64_t g, int64_t g0,
                          int64_t g1) {
    constexpr int W = Simd<T>::W;
    const T *own = s.rank ? weight + (k * (g1 - g0) + g - g0) * s.rank * W : nullptr;
    return {s.rank ? dt : dt + g * W, s.dt_stride[1], own, s.rank, channel_vector<T>(s.dt_bias, s, k, g)};
}

// The state of one group, [state][lane] <-> rows of (.., Ch, N).
template <class T> void store_state(const medmamba_scan &s, int64_t g, const T *h, T *out) {
    const int lanes = lanes_of_group<T>(s, g);
    for (int w = 0; w < lanes; ++w)
        for (int64_t n = 0; n < s.states; ++n) out[(g * Simd<T>::W + w) * s.states + n] = h[n * Simd<T>::W + w];
}

template <class T> void load_state(const medmamba_scan &s, int64_t g, const T *in, T *h) {
    const int lanes = lanes_of_group<T>(s, g);
    for (int w = 0; w < lanes; ++w)
        for (int64_t n = 0; n < s.states; ++n) h[n * Simd<T>::W + w] = in[(g * Simd<T>::W + w) * s.states + n];
}

template <class T, bool ClampUp, bool Scalar> void forward_member(const medmamba_scan &s, Member &member) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    const FlushSubnormals flush;
    const Rows<T> rows(s);
    const int64_t N = s.states, K = s.routes, L = s.length, Ch = s.channels;
    const int64_t g0 = member.group_begin, g1 = member.group_end, G = group_count<T>(s), blocks = block_count(s);
    const ForwardScratch<T> scratch(member.scratch, s, g1 - g0);
    if (!Scalar) transpose_A<T>(s, g0, g1, scratch.A);
    transpose_weight<T>(s, g0, g1, scratch.weight);
    StepCheck<T> check;

    for (int64_t b = member.batch_begin; b < member.batch_end; ++b)
        for (int64_t k = 0; k < K; ++k) {
            const T *x = rows.x(b), *dt = rows.dt(b, k), *B = rows.B(b, k), *C = rows.C(b, k);
            T *y = (T *)s.y + (s.merge == 0 ? b : b * K + k) * L * Ch;
            const bool add = s.merge == 0 && k > 0;
            memset(scratch.h, 0, size_t((g1 - g0) * N * W) * sizeof(T));
            read_block(s, b, k, 0, scratch.blocks[0]);
            for (int64_t j = 0; j < blocks; ++j) {
                const Block &block = scratch.blocks[j & 1];
                Block &following = scratch.blocks[(j + 1) & 1];
                const bool more = j + 1 < blocks;
                if (more) read_block(s, b, k, (j + 1) * kBlock, following);
                gather_states<T>(B, s.B_stride[1], block, N, scratch.B);
                gather_states<T>(C, s.C_stride[1], block, N, scratch.C);
                if (Scalar) scratch.heads.template read<ClampUp>(s, block, dt, k, g0, g1, check);
                if (more)
                    for (int i = 0; i < following.count; ++i) {
                        __builtin_prefetch(B + following.token[i] * s.B_stride[1]);
                        __builtin_prefetch(C + following.token[i] * s.C_stride[1]);
                    }
                for (int64_t g = g0; g < g1; ++g) {
                    const int lanes = lanes_of_group<T>(s, g);
                    const int64_t c = g * W;
                    const V skip = channel_vector<T>(s.D, s, k, g);
                    T *h = scratch.h + (g - g0) * N * W;
                    if (s.checkpoint) {
                        T *keep = (T *)s.checkpoint + (((b * K + k) * blocks + j) * G + g) * N * W;
                        memcpy(keep, h, size_t(N * W) * sizeof(T));
                    }
                    const bool full = lanes == W;
                    if (Scalar) {
                        (full ? prepare_forward_heads<T, true> : prepare_forward_heads<T, false>)(
                            s, block, x + c, g, skip, lanes, scratch);
                    } else {
                        const StepSource<T> source = step_source<T>(s, dt, scratch.weight, k, g, g0, g1);
                        (full ? prepare_forward<T, true> : prepare_forward<T, false>)(s, block, x + c, source, skip,
                                                                                      lanes, scratch, check);
                    }
                    Ahead<T> ahead;
                    const bool wrap = g + 1 == g1;
                    if (!wrap || more) {
                        const Block &from = wrap ? following : block;
                        const int64_t next = (wrap ? g0 : g + 1) * W;
                        ahead.count = from.count;
                        ahead.token = from.token;
                        ahead.row[0] = x + next, ahead.stride[0] = s.x_stride[1];
                        ahead.row[1] = dt + (s.rank || Scalar ? 0 : next), ahead.stride[1] = s.dt_stride[1];
                        ahead.row[2] = y + next, ahead.stride[2] = Ch;
                    }
                    const T *A = Scalar ? scratch.A : scratch.A + (k * (g1 - g0) + g - g0) * N * W;
                    forward_states<T, ClampUp, Scalar>(block, A, h, scratch.B, scratch.C, N,
                                                       Scalar ? scratch.decay : scratch.dt, scratch.u, scratch.y,
                                                       ahead);
                    (full ? finish_forward<T, true> : finish_forward<T, false>)(block, y + c, Ch, add, lanes,
                                                                                scratch.y);
                }
            }
            if (s.final_state)
                for (int64_t g = g0; g < g1; ++g)
                    store_state<T>(s, g, scratch.h + (g - g0) * N * W, (T *)s.final_state + (b * K + k) * Ch * N);
        }
    member.bad_step = check.failed();
}

// --- backward ----------------------------------------------------------------------------------------------------
//
// In SSD the sums over the channels of a head (ddt, dA) are taken with those of dB and dC, and A leaves the sum over n.
//
// With g = dy, e = exp(dt' A), l_t the gradient of h_t:   l_t = g_t C_t + e_{t+1} l_{t+1}
//   dC_t = sum_c g_t h_t      dB_t = sum_c l_t u_t      du_t = sum_n l_t B_t           (u = dt' x)
//   q = e_t l_t h_{t-1}:      dA = sum_t q dt'          ddt' = sum_n q A + du x
//   dx = du dt' + g D         dD = sum_t g x

// Layout of a group's share of a block in a ring slot: [token][pass][vectors of the pass] of dB and dC, see Fold. Then
// come, with a low-rank dt, the passes of dz, a vector each; in SSD a vector with every channel's share of ddt.
template <class T> struct Share {
    static constexpr int W = Simd<T>::W;
    // A pass of S states makes 2 S sums, dB then dC, in `vectors` vectors of `sums` sums each.
    static constexpr int sums(int S) { return 2 * S < W ? 2 * S : W; }
    static constexpr int vectors(int S) { return 2 * S / sums(S); }
    static int64_t row(int64_t N) {
        int64_t length = 0;
        for (int64_t n = 0; n < N;) {
            const int64_t S = Passes<T>::width(N - n, Passes<T>::backward_max);
            length += vectors(int(S)) * W;
            n += S;
        }
        return length;
    }
    static int64_t rank_width(int64_t left) { return Passes<T>::width(left, W); }
    static int64_t row(const medmamba_scan &s) {
        int64_t length = row(s.states) + (s.heads ? W : 0);
        for (int64_t r = 0; r < s.rank; r += rank_width(s.rank - r)) length += W;
        return length;
    }
};

template <class T> struct BackwardScratch {
    typedef typename Simd<T>::V V;
    Arena arena;
    T *A, *weight, *carry, *B, *C, *z;
    V *dt, *u, *g, *du, *qA, *h, *e;
    V *slope;
    Block *blocks;
    Heads<T> heads;
    int64_t bytes;
    BackwardScratch(void *base, const medmamba_scan &s, int64_t groups) : arena(base), heads(arena, s) {
        constexpr int W = Simd<T>::W;
        A = arena.take<T>(s.heads ? 0 : s.routes * groups * s.states * W);
        weight = arena.take<T>(s.routes * groups * s.rank * W);
        carry = arena.take<T>(groups * s.states * W);
        B = arena.take<T>(kBlock * s.states);
        C = arena.take<T>(kBlock * s.states);
        z = arena.take<T>(kBlock * s.rank);
        dt = arena.take<V>(kBlock);
        u = arena.take<V>(kBlock);
        g = arena.take<V>(kBlock);
        du = arena.take<V>(kBlock);
        qA = arena.take<V>(kBlock);
        slope = arena.take<V>(kBlock);
        // One state more than tokens per segment.
        h = arena.take<V>((2 * kBlock + 1) * Passes<T>::backward_max);
        e = arena.take<V>(kBlock * Passes<T>::backward_max);
        blocks = arena.take<Block>(2);
        bytes = int64_t(arena.at - (char *)base);
    }
};

// Sums over tokens, one set per batch item: [batch][route][group]{ dA [state][lane], dD [lane], ddt_bias [lane],
// ddt_weight [rank][lane] }. In SSD dA has no states.
template <class T> struct TokenSums {
    static constexpr int W = Simd<T>::W;
    static int64_t rates(const medmamba_scan &s) { return s.heads ? 1 : s.states; }
    static int64_t set(const medmamba_scan &s) { return (rates(s) + 2 + s.rank) * W; }
    static double *dD(const medmamba_scan &s, double *set) { return set + rates(s) * W; }
    static double *bias(const medmamba_scan &s, double *set) { return set + (rates(s) + 1) * W; }
    static double *weight(const medmamba_scan &s, double *set) { return set + (rates(s) + 2) * W; }
    static int64_t index(const medmamba_scan &s, int64_t b, int64_t k, int64_t g) {
        return ((b * s.routes + k) * group_count<T>(s) + g) * set(s);
    }
};

template <class T> MEDMAMBA_INLINE void add_to(double *sums, typename Simd<T>::V v) {
    for (int w = 0; w < Simd<T>::W; ++w) sums[w] += double(v[w]);
}

template <class T, int S, bool ClampUp, bool Scalar>
__attribute__((noinline)) void backward_pass(const Block &block, const T *A, const T *checkpoint, T *carry, const T *B,
                                             const T *C, int64_t N, const BackwardScratch<T> &scratch, T *share,
                                             int64_t share_row, double *dA, const Ahead<T> &ahead) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    V a[S], h[S];
    for (int j = 0; j < S; ++j) {
        a[j] = Scalar ? V{} : load<T>(A + j * W);
        h[j] = load<T>(checkpoint + j * W);
    }
    V *states = scratch.h;
    const V *e_all = scratch.e;
    for (int segment = 0; segment < block.segments; ++segment) {
        if (segment > 0 || block.reset_first)
            for (int j = 0; j < S; ++j) h[j] = V{};
        for (int j = 0; j < S; ++j) *states++ = h[j];
        const int end = block.begin[segment + 1];
        for (int i = block.begin[segment]; i < end; ++i) {
            ahead.fetch(i);
            const T *b = B + i * N;
            const V d = scratch.dt[i], u = scratch.u[i];
            V *e = scratch.e + i * (Scalar ? 1 : S);
#pragma GCC unroll 16
            for (int j = 0; j < S; ++j) {
                if (!Scalar) e[j] = Simd<T>::template exp2<ClampUp>(d * a[j]);
                h[j] = e[Scalar ? 0 : j] * h[j] + u * b[j];
                *states++ = h[j];
            }
        }
    }

    V back[S], sum_A[S];
    for (int j = 0; j < S; ++j) {
        back[j] = block.reset_last ? V{} : load<T>(carry + j * W);
        sum_A[j] = V{};
    }
    for (int segment = block.segments - 1; segment >= 0; --segment) {
        states -= S;
        for (int j = 0; j < S; ++j) h[j] = states[j];
        const int begin = block.begin[segment];
        for (int i = block.begin[segment + 1] - 1; i >= begin; --i) {
            states -= S;
            const T *b = B + i * N, *c = C + i * N;
            const V d = scratch.dt[i], u = scratch.u[i], g = scratch.g[i];
            const V *e = e_all + i * (Scalar ? 1 : S);
            V du = scratch.du[i], qA = scratch.qA[i];
            V sums[2 * S];
#pragma GCC unroll 16
            for (int j = 0; j < S; ++j) {
                const V l = g * c[j] + back[j];
                sums[j] = l * u;
                sums[S + j] = g * h[j];
                du += l * b[j];
                back[j] = l * e[Scalar ? 0 : j];
                h[j] = states[j];
                const V q = back[j] * h[j];
                if (Scalar) {
                    qA += q; // times A and dt' when the token is finished
                } else {
                    qA += q * a[j];
                    sum_A[j] += q * d;
                }
            }
            scratch.du[i] = du;
            scratch.qA[i] = qA;
            constexpr int M = Share<T>::sums(S);
            for (int v = 0; v < Share<T>::vectors(S); ++v)
                store<T>(share + i * share_row + v * W, Fold<T>::template run<M, W>(sums + v * M));
        }
        if (segment > 0 || block.reset_first)
            for (int j = 0; j < S; ++j) back[j] = V{};
    }
    for (int j = 0; j < S; ++j) {
        store<T>(carry + j * W, back[j]);
        if (!Scalar) add_to<T>(dA + j * W, sum_A[j]);
    }
}

template <class T, bool ClampUp, bool Scalar>
void backward_states(const Block &block, const T *A, const T *checkpoint, T *carry, int64_t N,
                     const BackwardScratch<T> &scratch, T *share, int64_t row, double *dA, const Ahead<T> &ahead) {
    constexpr int W = Simd<T>::W;
    const Ahead<T> nothing;
    for (int64_t n = 0; n < N;) {
        const int64_t S = Passes<T>::width(N - n, Passes<T>::backward_max);
        const Ahead<T> &fetch = n == 0 ? ahead : nothing;
        const T *a = A + n * W, *B = scratch.B + n, *C = scratch.C + n, *start = checkpoint + n * W;
        T *c = carry + n * W;
        double *sum = dA + n * W;
        if (S == 4)
            backward_pass<T, 4, ClampUp, Scalar>(block, a, start, c, B, C, N, scratch, share, row, sum, fetch);
        else if (S == 2)
            backward_pass<T, 2, ClampUp, Scalar>(block, a, start, c, B, C, N, scratch, share, row, sum, fetch);
        else
            backward_pass<T, 1, ClampUp, Scalar>(block, a, start, c, B, C, N, scratch, share, row, sum, fetch);
        share += Share<T>::vectors(int(S)) * W;
        n += S;
    }
}

// dB and dC of S states of one token: the sum over the groups, in group order.
template <class T, int S>
MEDMAMBA_INLINE void merge_shares(const T *share, int64_t group_stride, int64_t G, T *dB, T *dC) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W, M = Share<T>::sums(S);
    V sum[2 * S / M];
    for (int v = 0; v < 2 * S / M; ++v) {
        sum[v] = load<T>(share + v * W);
        for (int64_t g = 1; g < G; ++g) sum[v] += load<T>(share + g * group_stride + v * W);
    }
    constexpr typename Fold<T>::template Where<M> where;
    for (int j = 0; j < S; ++j) {
        dB[j] = sum[j / M][where.lane[j % M]];
        dC[j] = sum[(S + j) / M][where.lane[(S + j) % M]];
    }
}

// ddt of the heads: the sum over a head's channels, in order, times the slope of softplus.
template <class T>
void merge_heads(const medmamba_scan &s, int64_t b, int64_t k, const Block &block, const T *share, int64_t group_stride,
                 int64_t row) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    const int64_t H = s.heads, K = s.routes, width = s.channels / H;
    const T *dt = (const T *)s.dt + b * s.dt_stride[0] + k * s.dt_stride[2];
    T *ddt = (T *)s.ddt + (b * s.length * K + k) * H;
    for (int64_t first = 0; first < H; first += W) {
        const int lanes = int(H - first < W ? H - first : W);
        const V bias = Heads<T>::parameter(s.dt_bias, k, first, H);
        for (int i = 0; i < block.count; ++i) {
            const int64_t t = block.token[i];
            V slope = V{} + T(1), sum = {};
            if (s.softplus) softplus<T>(load_lanes<T, false>(dt + t * s.dt_stride[1] + first, lanes) + bias, slope);
            for (int w = 0; w < lanes; ++w) {
                T total = 0;
                for (int64_t c = (first + w) * width; c < (first + w + 1) * width; ++c)
                    total += share[c / W * group_stride + i * row + c % W];
                sum[w] = total;
            }
            store_lanes<T, false>(ddt + t * K * H + first, sum * slope, lanes);
        }
    }
    for (int i = 0; i < block.masked; ++i) memset(ddt + block.dropped[i] * K * H, 0, size_t(H) * sizeof(T));
}

// Calls pass.template run<M>(r) for passes of M = 2^n ranks, from rank r on, that cover all ranks.
template <class T, class Pass> MEDMAMBA_INLINE void for_ranks(int64_t rank, const Pass &pass) {
    constexpr int W = Simd<T>::W;
    for (int64_t r = 0; r < rank;) {
        const int64_t M = Share<T>::rank_width(rank - r);
        if constexpr (W >= 16)
            if (M == 16) pass.template run<16>(r);
        if constexpr (W >= 8)
            if (M == 8) pass.template run<8>(r);
        if constexpr (W >= 4)
            if (M == 4) pass.template run<4>(r);
        if (M == 2) pass.template run<2>(r);
        if (M == 1) pass.template run<1>(r);
        r += M;
    }
}

// One token: ddt of the group's channels times the weights, summed over the channels, into the share.
template <class T> struct ShareOfZ {
    typename Simd<T>::V raw;
    const T *weight; // [rank][lane]
    T *&share;
    template <int M> MEDMAMBA_INLINE void run(int64_t r) const {
        typename Simd<T>::V products[M];
        for (int m = 0; m < M; ++m) products[m] = raw * load<T>(weight + (r + m) * Simd<T>::W);
        store<T>(share, Fold<T>::template run<M, Simd<T>::W>(products));
        share += Simd<T>::W;
    }
};

// dz of one token: the sum over the groups, in group order.
template <class T> struct MergeZ {
    const T *&share;
    int64_t group_stride, G;
    T *dz;
    template <int M> MEDMAMBA_INLINE void run(int64_t r) const {
        typename Simd<T>::V sum = load<T>(share);
        for (int64_t g = 1; g < G; ++g) sum += load<T>(share + g * group_stride);
        constexpr typename Fold<T>::template Where<M> where;
        for (int m = 0; m < M; ++m) dz[r + m] = sum[where.lane[m]];
        share += Simd<T>::W;
    }
};

template <class T>
void merge_ranks(const medmamba_scan &s, int64_t b, int64_t k, const Block &block, const T *shares,
                 int64_t group_stride, int64_t row, int64_t G) {
    const int64_t R = s.rank, K = s.routes;
    T *dz = (T *)s.ddt + (b * s.length * K + k) * R;
    for (int i = 0; i < block.count; ++i) {
        const T *share = shares + i * row;
        for_ranks<T>(R, MergeZ<T>{share, group_stride, G, dz + block.token[i] * K * R});
    }
    for (int i = 0; i < block.masked; ++i) memset(dz + block.dropped[i] * K * R, 0, size_t(R) * sizeof(T));
}

template <class T>
void merge_block(const medmamba_scan &s, int64_t b, int64_t k, const Block &block, const T *slot, int64_t G) {
    const int64_t N = s.states, K = s.routes, L = s.length, row = Share<T>::row(s), group_stride = kBlock * row;
    T *dB = (T *)s.dB + (b * L * K + k) * N, *dC = (T *)s.dC + (b * L * K + k) * N;
    for (int i = 0; i < block.count; ++i) {
        const int64_t to = block.token[i] * K * N;
        const T *share = slot + i * row;
        for (int64_t n = 0; n < N;) {
            const int64_t S = Passes<T>::width(N - n, Passes<T>::backward_max);
            if (S == 4)
                merge_shares<T, 4>(share, group_stride, G, dB + to + n, dC + to + n);
            else if (S == 2)
                merge_shares<T, 2>(share, group_stride, G, dB + to + n, dC + to + n);
            else
                merge_shares<T, 1>(share, group_stride, G, dB + to + n, dC + to + n);
            share += Share<T>::vectors(int(S)) * Simd<T>::W;
            n += S;
        }
    }
    for (int i = 0; i < block.masked; ++i) {
        memset(dB + block.dropped[i] * K * N, 0, size_t(N) * sizeof(T));
        memset(dC + block.dropped[i] * K * N, 0, size_t(N) * sizeof(T));
    }
    if (s.rank) merge_ranks<T>(s, b, k, block, slot + Share<T>::row(N), group_stride, row, G);
    if (s.heads) merge_heads<T>(s, b, k, block, slot + row - Simd<T>::W, group_stride, row);
}

// Before writing block number `sequence` of the team into its slot: the block that used the slot before must be merged.
inline void enter_slot(const RingSlot &slot, int64_t round) {
    for (int attempt = 0; __atomic_load_n(&slot.completed, __ATOMIC_ACQUIRE) < round; ++attempt)
        medmamba::wait_for_team(attempt);
}

// dt', its slope, dt' x and dy of the block's tokens, for one group of channels.
template <class T, bool Full>
void prepare_backward(const medmamba_scan &s, const Block &block, const T *x, const StepSource<T> &source, const T *dy,
                      int lanes, const BackwardScratch<T> &scratch) {
    typedef typename Simd<T>::V V;
    const int64_t x_stride = s.x_stride[1], dy_stride = s.dy_stride[2];
    const bool use_softplus = s.softplus;
    for (int i = 0; i < block.count; ++i) {
        const int64_t t = block.token[i];
        V d = source.template operator()<Full>(t, lanes);
        V slope = V{} + T(1);
        if (use_softplus) d = softplus<T>(d, slope);
        scratch.slope[i] = slope;
        scratch.dt[i] = d;
        scratch.u[i] = d * load_lanes<T, Full>(x + t * x_stride, lanes);
        scratch.g[i] = load_lanes<T, Full>(dy + t * dy_stride, lanes);
        scratch.du[i] = V{};
        scratch.qA[i] = V{};
    }
}

// The same in SSD, with the decays; the slopes are applied when ddt is merged.
template <class T, bool Full>
void prepare_backward_heads(const medmamba_scan &s, const Block &block, const T *x, int64_t g, const T *dy, int lanes,
                            const BackwardScratch<T> &scratch) {
    typedef typename Simd<T>::V V;
    const Heads<T> &heads = scratch.heads;
    const typename Heads<T>::Spread spread(heads, g);
    for (int i = 0; i < block.count; ++i) {
        const int64_t t = block.token[i];
        const V d = spread(heads.dt + i * heads.padded);
        scratch.e[i] = spread(heads.decay + i * heads.padded);
        scratch.dt[i] = d;
        scratch.u[i] = d * load_lanes<T, Full>(x + t * s.x_stride[1], lanes);
        scratch.g[i] = load_lanes<T, Full>(dy + t * s.dy_stride[2], lanes);
        scratch.du[i] = V{};
        scratch.qA[i] = V{};
    }
}

// Where the gradients of one group's step sizes go, apart from the sums over tokens.
template <class T> struct StepGradient {
    T *ddt;          // rows of ddt at the group's first channel (neither SSD nor low rank)
    T *share;        // the group's share in the ring slot, behind dB and dC
    int64_t row;     // of the share
    const T *weight; // low rank: [rank][lane]
    typename Simd<T>::V A; // SSD: rates of the lanes
};

// A low-rank dt = z W^T:  dz = ddt W (summed over channels, by the merge)  dW = sum_t ddt z.
template <class T>
void finish_ranks(const medmamba_scan &s, const Block &block, const StepGradient<T> &to,
                  const BackwardScratch<T> &scratch, double *dW) {
    typedef typename Simd<T>::V V;
    const int64_t R = s.rank;
    for (int i = 0; i < block.count; ++i) {
        T *share = to.share + i * to.row;
        for_ranks<T>(R, ShareOfZ<T>{scratch.slope[i], to.weight, share});
    }
    for (int64_t r = 0; r < R; ++r) {
        V even = {}, odd = {};
        for (int i = 0; i + 1 < block.count; i += 2) {
            even += scratch.slope[i] * scratch.z[i * R + r];
            odd += scratch.slope[i + 1] * scratch.z[(i + 1) * R + r];
        }
        if (block.count % 2) even += scratch.slope[block.count - 1] * scratch.z[(block.count - 1) * R + r];
        add_to<T>(dW + r * Simd<T>::W, even + odd);
    }
}

// dx and ddt of the block's tokens; `sums` receives the block's share of dD, ddt_bias and ddt_weight, and in SSD of dA.
template <class T, bool Full, bool Scalar>
void finish_backward_block(const medmamba_scan &s, const Block &block, const T *x, T *dx, const StepGradient<T> &to,
                           bool add, typename Simd<T>::V skip, int lanes, const BackwardScratch<T> &scratch,
                           double *sums) {
    typedef typename Simd<T>::V V;
    const T ln2 = T(0.69314718055994530942);
    const int64_t Ch = s.channels, ddt_stride = s.routes * s.channels, x_stride = s.x_stride[1];
    const bool low_rank = s.rank > 0;
    V sum_D = {}, sum_bias = {}, sum_A = {};
    for (int i = 0; i < block.count; ++i) {
        const int64_t t = block.token[i];
        const V v = load_lanes<T, Full>(x + t * x_stride, lanes), g = scratch.g[i];
        if (Scalar) {
            store<T>(to.share + i * to.row, scratch.du[i] * v + scratch.qA[i] * to.A);
            sum_A += scratch.qA[i] * scratch.dt[i];
        } else {
            const V raw = (scratch.du[i] * v + scratch.qA[i] * ln2) * scratch.slope[i];
            if (low_rank)
                scratch.slope[i] = raw; // the slope is not needed again
            else
                store_lanes<T, Full>(to.ddt + t * ddt_stride, raw, lanes);
            sum_bias += raw;
        }
        sum_D += g * v;
        T *out = dx + t * Ch;
        V total = scratch.du[i] * scratch.dt[i] + g * skip;
        if (add) total += load_lanes<T, Full>(out, lanes);
        store_lanes<T, Full>(out, total, lanes);
    }
    add_to<T>(TokenSums<T>::dD(s, sums), sum_D);
    if (Scalar)
        add_to<T>(sums, sum_A);
    else
        add_to<T>(TokenSums<T>::bias(s, sums), sum_bias);
    if (low_rank) finish_ranks<T>(s, block, to, scratch, TokenSums<T>::weight(s, sums));
    for (int i = 0; i < block.masked; ++i) {
        const int64_t t = block.dropped[i];
        if (!Scalar && !low_rank) store_lanes<T, Full>(to.ddt + t * ddt_stride, V{}, lanes);
        if (!add) store_lanes<T, Full>(dx + t * Ch, V{}, lanes);
    }
}

template <class T, bool ClampUp, bool Scalar> void backward_member(const medmamba_scan &s, Member &member) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    const FlushSubnormals flush;
    const Rows<T> rows(s);
    const int64_t N = s.states, K = s.routes, L = s.length, Ch = s.channels;
    const int64_t g0 = member.group_begin, g1 = member.group_end, G = group_count<T>(s), blocks = block_count(s);
    const BackwardScratch<T> scratch(member.scratch, s, g1 - g0);
    const int64_t share_row = Share<T>::row(s), share_group = kBlock * share_row;
    if (!Scalar) transpose_A<T>(s, g0, g1, scratch.A);
    transpose_weight<T>(s, g0, g1, scratch.weight);
    StepCheck<T> check; // the forward has seen the same steps

    int64_t sequence = 0;
    for (int64_t b = member.batch_begin; b < member.batch_end; ++b)
        for (int64_t k = 0; k < K; ++k) {
            const T *x = rows.x(b), *dt = rows.dt(b, k), *B = rows.B(b, k), *C = rows.C(b, k), *dy = rows.dy(b, k);
            T *dx = (T *)s.dx + b * L * Ch, *ddt = (T *)s.ddt + (b * L * K + k) * Ch;
            memset(scratch.carry, 0, size_t((g1 - g0) * N * W) * sizeof(T));
            if (s.dfinal_state)
                for (int64_t g = g0; g < g1; ++g)
                    load_state<T>(s, g, (const T *)s.dfinal_state + (b * K + k) * Ch * N,
                                  scratch.carry + (g - g0) * N * W);
            read_block(s, b, k, (blocks - 1) * kBlock, scratch.blocks[(blocks - 1) & 1]);
            for (int64_t j = blocks - 1; j >= 0; --j, ++sequence) {
                const Block &block = scratch.blocks[j & 1];
                Block &following = scratch.blocks[(j + 1) & 1];
                const bool more = j > 0;
                if (more) read_block(s, b, k, (j - 1) * kBlock, following);
                gather_states<T>(B, s.B_stride[1], block, N, scratch.B);
                gather_states<T>(C, s.C_stride[1], block, N, scratch.C);
                gather_states<T>(dt, s.dt_stride[1], block, s.rank, scratch.z);
                if (Scalar) scratch.heads.template read<ClampUp>(s, block, dt, k, g0, g1, check);
                if (more)
                    for (int i = 0; i < following.count; ++i) {
                        __builtin_prefetch(B + following.token[i] * s.B_stride[1]);
                        __builtin_prefetch(C + following.token[i] * s.C_stride[1]);
                    }
                RingSlot &state = member.ring_state[sequence % member.ring_slots];
                T *slot = (T *)member.ring + (sequence % member.ring_slots) * G * share_group;
                enter_slot(state, sequence / member.ring_slots);

                for (int64_t g = g0; g < g1; ++g) {
                    const int lanes = lanes_of_group<T>(s, g);
                    const int64_t c = g * W;
                    const V skip = channel_vector<T>(s.D, s, k, g);
                    const bool full = lanes == W;
                    V rates = {}; // SSD: A of every lane
                    if (Scalar) {
                        (full ? prepare_backward_heads<T, true> : prepare_backward_heads<T, false>)(
                            s, block, x + c, g, dy + c, lanes, scratch);
                        rates = typename Heads<T>::Spread(scratch.heads, g)((const T *)s.A + k * s.heads);
                    } else {
                        const StepSource<T> source = step_source<T>(s, dt, scratch.weight, k, g, g0, g1);
                        (full ? prepare_backward<T, true> : prepare_backward<T, false>)(s, block, x + c, source, dy + c,
                                                                                        lanes, scratch);
                    }
                    Ahead<T> ahead;
                    const bool wrap = g + 1 == g1;
                    if (!wrap || more) {
                        const Block &from = wrap ? following : block;
                        const int64_t next = (wrap ? g0 : g + 1) * W;
                        ahead.count = from.count;
                        ahead.token = from.token;
                        ahead.row[0] = x + next, ahead.stride[0] = s.x_stride[1];
                        ahead.row[1] = dt + (s.rank || Scalar ? 0 : next), ahead.stride[1] = s.dt_stride[1];
                        ahead.row[2] = dy + next, ahead.stride[2] = s.dy_stride[2];
                    }
                    double *sums = (double *)member.sums + TokenSums<T>::index(s, b, k, g);
                    T *share = slot + g * share_group;
                    const T *weight = scratch.weight + (k * (g1 - g0) + g - g0) * s.rank * W;
                    backward_states<T, ClampUp, Scalar>(
                        block, Scalar ? scratch.A : scratch.A + (k * (g1 - g0) + g - g0) * N * W,
                        (const T *)s.checkpoint + (((b * K + k) * blocks + j) * G + g) * N * W,
                        scratch.carry + (g - g0) * N * W, N, scratch, share, share_row, sums, ahead);

                    (full ? finish_backward_block<T, true, Scalar> : finish_backward_block<T, false, Scalar>)(
                        s, block, x + c, dx + c, {ddt + c, share + Share<T>::row(N), share_row, weight, rates}, k > 0,
                        skip, lanes, scratch, sums);
                }

                // The last member to arrive merges the groups' shares; the slot is then free for a later block.
                if (__atomic_add_fetch(&state.arrived, 1, __ATOMIC_ACQ_REL) == member.team_size) {
                    merge_block<T>(s, b, k, block, slot, G);
                    __atomic_store_n(&state.arrived, 0, __ATOMIC_RELAXED);
                    __atomic_add_fetch(&state.completed, 1, __ATOMIC_RELEASE);
                }
            }
        }
}

// Over the batch, in order: element n of channel c.
template <class T> double sum_of(const medmamba_scan &s, const double *sums, int64_t k, int64_t c, int64_t n) {
    constexpr int W = Simd<T>::W;
    double total = 0;
    for (int64_t b = 0; b < s.batch; ++b) total += sums[TokenSums<T>::index(s, b, k, c / W) + n * W + c % W];
    return total;
}

template <class T> void finish_typed(const medmamba_scan &s, const double *sums) {
    T *dA = (T *)s.dA, *dD = (T *)s.dD, *ddt_bias = (T *)s.ddt_bias, *dW = (T *)s.ddt_weight;
    const int64_t rates = TokenSums<T>::rates(s), K = s.routes, Ch = s.channels, H = s.heads;
    for (int64_t k = 0; k < K; ++k)
        for (int64_t c = 0; c < Ch; ++c) {
            for (int64_t n = 0; n < rates && !H; ++n) dA[(k * Ch + c) * rates + n] = T(sum_of<T>(s, sums, k, c, n));
            if (dD) dD[k * Ch + c] = T(sum_of<T>(s, sums, k, c, rates));
            if (ddt_bias && !H) ddt_bias[k * Ch + c] = T(sum_of<T>(s, sums, k, c, rates + 1));
            for (int64_t r = 0; r < s.rank; ++r)
                dW[(k * Ch + c) * s.rank + r] = T(sum_of<T>(s, sums, k, c, rates + 2 + r));
        }
    for (int64_t k = 0; k < K; ++k)
        for (int64_t h = 0; h < H; ++h) {
            double rate = 0, bias = 0;
            for (int64_t c = h * (Ch / H); c < (h + 1) * (Ch / H); ++c) rate += sum_of<T>(s, sums, k, c, 0);
            dA[k * H + h] = T(rate);
            const T *ddt = (const T *)s.ddt + k * H + h;
            for (int64_t t = 0; ddt_bias && t < s.batch * s.length; ++t) bias += double(ddt[t * K * H]);
            if (ddt_bias) ddt_bias[k * H + h] = T(bias);
        }
}

// --- entry points of this instruction set ------------------------------------------------------------------------

// dt' A can only be positive without softplus (dt' of any sign) or with a positive A.
template <class T> bool may_grow(const medmamba_scan &s) {
    if (!s.softplus) return true;
    const T *A = (const T *)s.A;
    const int64_t count = s.routes * (s.heads ? s.heads : s.channels * s.states);
    for (int64_t i = 0; i < count; ++i)
        if (A[i] > T(0)) return true;
    return false;
}

template <class T> void forward_typed(const medmamba_scan &s, Member &member) {
    if (s.heads)
        (may_grow<T>(s) ? forward_member<T, true, true> : forward_member<T, false, true>)(s, member);
    else
        (may_grow<T>(s) ? forward_member<T, true, false> : forward_member<T, false, false>)(s, member);
}

template <class T> void backward_typed(const medmamba_scan &s, Member &member) {
    if (s.heads)
        (may_grow<T>(s) ? backward_member<T, true, true> : backward_member<T, false, true>)(s, member);
    else
        (may_grow<T>(s) ? backward_member<T, true, false> : backward_member<T, false, false>)(s, member);
}

int64_t groups(const medmamba_scan &s) { return s.dtype == 0 ? group_count<float>(s) : group_count<double>(s); }

int64_t forward_scratch(const medmamba_scan &s, int64_t groups_per_member) {
    return s.dtype == 0 ? ForwardScratch<float>(nullptr, s, groups_per_member).bytes
                        : ForwardScratch<double>(nullptr, s, groups_per_member).bytes;
}

int64_t backward_scratch(const medmamba_scan &s, int64_t groups_per_member) {
    return s.dtype == 0 ? BackwardScratch<float>(nullptr, s, groups_per_member).bytes
                        : BackwardScratch<double>(nullptr, s, groups_per_member).bytes;
}

int64_t slot_bytes(const medmamba_scan &s) {
    const int64_t row =
        s.dtype == 0 ? Share<float>::row(s) * int64_t(sizeof(float)) : Share<double>::row(s) * int64_t(sizeof(double));
    return groups(s) * kBlock * row;
}

int64_t sums_bytes(const medmamba_scan &s) {
    const int64_t set = s.dtype == 0 ? TokenSums<float>::set(s) : TokenSums<double>::set(s);
    return s.batch * s.routes * groups(s) * set * int64_t(sizeof(double));
}

void forward(const medmamba_scan &s, Member &member) {
    s.dtype == 0 ? forward_typed<float>(s, member) : forward_typed<double>(s, member);
}

void backward(const medmamba_scan &s, Member &member) {
    s.dtype == 0 ? backward_typed<float>(s, member) : backward_typed<double>(s, member);
}

void finish_backward(const medmamba_scan &s, const void *sums) {
    s.dtype == 0 ? finish_typed<float>(s, (const double *)sums) : finish_typed<double>(s, (const double *)sums);
}

} // namespace

#define MEDMAMBA_PASTE2(a, b) a##b
#define MEDMAMBA_PASTE(a, b) MEDMAMBA_PASTE2(a, b)
#define MEDMAMBA_TEXT2(a) #a
#define MEDMAMBA_TEXT(a) MEDMAMBA_TEXT2(a)

const medmamba::Kernels medmamba::MEDMAMBA_PASTE(kernels_, MEDMAMBA_ISA) = {
    MEDMAMBA_TEXT(MEDMAMBA_ISA), groups,  forward_scratch, backward_scratch, slot_bytes,
    sums_bytes,                  forward, backward,        finish_backward,
};
