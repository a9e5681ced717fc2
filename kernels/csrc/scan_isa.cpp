// The selective scan, compiled once per instruction set (MEDMAMBA_ISA names the object).
//
//   dt' = softplus(dt + bias);   h <- exp(dt' A) h + dt' x B;   y = <h, C> + D x          (Gu and Dao, Mamba, 2023)
//
// Lanes are channels: no sum crosses lanes in the forward pass, so AVX2 and AVX-512 give the same bits. Tokens are
// gathered kBlock at a time, in the order of the route; masked tokens drop out here, and resets cut the block into
// segments, so that the inner loops know neither. Inside a block, channels go by groups of one vector: dt', dt' x and y
// of the block sit in L1 while the states pass through registers, a few per pass.
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

// A of the member's groups, transposed to [route][group][state][lane] and times log2(e): exp(dt A) = 2^(dt A').
// An A of -inf (exp of a diverged A_log) becomes a very fast decay: dt A' = -inf would have no fraction.
template <class T> void transpose_A(const medmamba_scan &s, int64_t g0, int64_t g1, T *out) {
    constexpr int W = Simd<T>::W;
    const T *A = (const T *)s.A;
    for (int64_t k = 0; k < s.routes; ++k)
        for (int64_t g = g0; g < g1; ++g)
            for (int64_t n = 0; n < s.states; ++n)
                for (int64_t w = 0; w < W; ++w) {
                    const int64_t c = g * W + w;
                    const T log2e = T(1.4426950408889634074);
                    const T a = c < s.channels ? A[(k * s.channels + c) * s.states + n] * log2e : T(0);
                    *out++ = a < T(-1e30) ? T(-1e30) : a;
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

// --- forward -----------------------------------------------------------------------------------------------------

template <class T> struct ForwardScratch {
    typedef typename Simd<T>::V V;
    T *A, *h, *B, *C;
    V *dt, *u, *y;
    Block *blocks;
    int64_t bytes;
    ForwardScratch(void *base, const medmamba_scan &s, int64_t groups) {
        constexpr int W = Simd<T>::W;
        Arena arena(base);
        A = arena.take<T>(s.routes * groups * s.states * W);
        h = arena.take<T>(groups * s.states * W);
        B = arena.take<T>(kBlock * s.states);
        C = arena.take<T>(kBlock * s.states);
        dt = arena.take<V>(kBlock);
        u = arena.take<V>(kBlock);
        y = arena.take<V>(kBlock);
        blocks = arena.take<Block>(2);
        bytes = int64_t(arena.at - (char *)base);
    }
};

// S states through the tokens of a block; y accumulates.
template <class T, int S, bool ClampUp>
__attribute__((noinline)) void forward_pass(const Block &block, const T *A, T *state, const T *B, const T *C, int64_t N,
                                            const typename Simd<T>::V *dt, const typename Simd<T>::V *u,
                                            typename Simd<T>::V *y, const Ahead<T> &ahead) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    V a[S], h[S];
    for (int j = 0; j < S; ++j) {
        a[j] = load<T>(A + j * W);
        h[j] = load<T>(state + j * W);
    }
    for (int segment = 0; segment < block.segments; ++segment) {
        if (segment > 0 || block.reset_first)
            for (int j = 0; j < S; ++j) h[j] = V{};
        const int end = block.begin[segment + 1];
        for (int i = block.begin[segment]; i < end; ++i) {
            ahead.fetch(i);
            const T *b = B + i * N, *c = C + i * N;
            const V d = dt[i], v = u[i];
            V sum = y[i];
#pragma GCC unroll 16
            for (int j = 0; j < S; ++j) {
                h[j] = Simd<T>::template exp2<ClampUp>(d * a[j]) * h[j] + v * b[j];
                sum += h[j] * c[j];
            }
            y[i] = sum;
        }
    }
    for (int j = 0; j < S; ++j) store<T>(state + j * W, block.reset_last ? V{} : h[j]);
}

template <class T, bool ClampUp>
void forward_states(const Block &block, const T *A, T *state, const T *B, const T *C, int64_t N,
                    const typename Simd<T>::V *dt, const typename Simd<T>::V *u, typename Simd<T>::V *y,
                    const Ahead<T> &ahead) {
    constexpr int W = Simd<T>::W;
    const Ahead<T> nothing;
    for (int64_t n = 0; n < N;) {
        const int64_t S = Passes<T>::width(N - n, Passes<T>::forward_max);
        const Ahead<T> &fetch = n == 0 ? ahead : nothing;
        const T *a = A + n * W;
        T *h = state + n * W;
        if (S == 8)
            forward_pass<T, 8, ClampUp>(block, a, h, B + n, C + n, N, dt, u, y, fetch);
        else if (S == 4)
            forward_pass<T, 4, ClampUp>(block, a, h, B + n, C + n, N, dt, u, y, fetch);
        else if (S == 2)
            forward_pass<T, 2, ClampUp>(block, a, h, B + n, C + n, N, dt, u, y, fetch);
        else
            forward_pass<T, 1, ClampUp>(block, a, h, B + n, C + n, N, dt, u, y, fetch);
        n += S;
    }
}

// dt', dt' x and D x of the block's tokens, for one group of channels.
template <class T, bool Full>
void prepare_forward(const medmamba_scan &s, const Block &block, const T *x, const T *dt, typename Simd<T>::V bias,
                     typename Simd<T>::V skip, int lanes, const ForwardScratch<T> &scratch) {
    typedef typename Simd<T>::V V;
    const int64_t x_stride = s.x_stride[1], dt_stride = s.dt_stride[1];
    const bool use_softplus = s.softplus;
    for (int i = 0; i < block.count; ++i) {
        const int64_t t = block.token[i];
        const V v = load_lanes<T, Full>(x + t * x_stride, lanes);
        V d = load_lanes<T, Full>(dt + t * dt_stride, lanes) + bias;
        if (use_softplus) d = softplus<T>(d);
        scratch.dt[i] = d;
        scratch.u[i] = d * v;
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

template <class T, bool ClampUp> void forward_member(const medmamba_scan &s, const Member &member) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    const FlushSubnormals flush;
    const Rows<T> rows(s);
    const int64_t N = s.states, K = s.routes, L = s.length, Ch = s.channels;
    const int64_t g0 = member.group_begin, g1 = member.group_end, G = group_count<T>(s), blocks = block_count(s);
    const ForwardScratch<T> scratch(member.scratch, s, g1 - g0);
    transpose_A<T>(s, g0, g1, scratch.A);

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
                if (more)
                    for (int i = 0; i < following.count; ++i) {
                        __builtin_prefetch(B + following.token[i] * s.B_stride[1]);
                        __builtin_prefetch(C + following.token[i] * s.C_stride[1]);
                    }
                for (int64_t g = g0; g < g1; ++g) {
                    const int lanes = lanes_of_group<T>(s, g);
                    const int64_t c = g * W;
                    const V bias = channel_vector<T>(s.dt_bias, s, k, g), skip = channel_vector<T>(s.D, s, k, g);
                    T *h = scratch.h + (g - g0) * N * W;
                    if (s.checkpoint) {
                        T *keep = (T *)s.checkpoint + (((b * K + k) * blocks + j) * G + g) * N * W;
                        memcpy(keep, h, size_t(N * W) * sizeof(T));
                    }
                    const bool full = lanes == W;
                    (full ? prepare_forward<T, true> : prepare_forward<T, false>)(s, block, x + c, dt + c, bias, skip,
                                                                                  lanes, scratch);
                    Ahead<T> ahead;
                    const bool wrap = g + 1 == g1;
                    if (!wrap || more) {
                        const Block &from = wrap ? following : block;
                        const int64_t next = (wrap ? g0 : g + 1) * W;
                        ahead.count = from.count;
                        ahead.token = from.token;
                        ahead.row[0] = x + next, ahead.stride[0] = s.x_stride[1];
                        ahead.row[1] = dt + next, ahead.stride[1] = s.dt_stride[1];
                        ahead.row[2] = y + next, ahead.stride[2] = Ch;
                    }
                    forward_states<T, ClampUp>(block, scratch.A + (k * (g1 - g0) + g - g0) * N * W, h, scratch.B,
                                               scratch.C, N, scratch.dt, scratch.u, scratch.y, ahead);
                    (full ? finish_forward<T, true> : finish_forward<T, false>)(block, y + c, Ch, add, lanes,
                                                                                scratch.y);
                }
            }
        }
}

// --- backward ----------------------------------------------------------------------------------------------------
//
// With g = dy, e = exp(dt' A), l_t the gradient of h_t:   l_t = g_t C_t + e_{t+1} l_{t+1}
//   dC_t = sum_c g_t h_t      dB_t = sum_c l_t u_t      du_t = sum_n l_t B_t           (u = dt' x)
//   q = e_t l_t h_{t-1}:      dA = sum_t q dt'          ddt' = sum_n q A + du x
//   dx = du dt' + g D         dD = sum_t g x

// Layout of a group's share of dB and dC in a ring slot: [token][pass][vectors of the pass], see Fold.
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
};

template <class T> struct BackwardScratch {
    typedef typename Simd<T>::V V;
    T *A, *carry, *B, *C;
    V *dt, *u, *g, *du, *qA, *h, *e;
    V *slope;
    Block *blocks;
    int64_t bytes;
    BackwardScratch(void *base, const medmamba_scan &s, int64_t groups) {
        constexpr int W = Simd<T>::W;
        Arena arena(base);
        A = arena.take<T>(s.routes * groups * s.states * W);
        carry = arena.take<T>(groups * s.states * W);
        B = arena.take<T>(kBlock * s.states);
        C = arena.take<T>(kBlock * s.states);
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

// Sums over tokens, one set per batch item: [batch][route][group]{ dA [state][lane], dD [lane], ddt_bias [lane] }.
template <class T> struct TokenSums {
    static constexpr int W = Simd<T>::W;
    static int64_t set(const medmamba_scan &s) { return (s.states + 2) * W; }
    static int64_t index(const medmamba_scan &s, int64_t b, int64_t k, int64_t g) {
        return ((b * s.routes + k) * group_count<T>(s) + g) * set(s);
    }
};

template <class T> MEDMAMBA_INLINE void add_to(double *sums, typename Simd<T>::V v) {
    for (int w = 0; w < Simd<T>::W; ++w) sums[w] += double(v[w]);
}

template <class T, int S, bool ClampUp>
__attribute__((noinline)) void backward_pass(const Block &block, const T *A, const T *checkpoint, T *carry, const T *B,
                                             const T *C, int64_t N, const BackwardScratch<T> &scratch, T *share,
                                             int64_t share_row, double *dA, const Ahead<T> &ahead) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    V a[S], h[S];
    for (int j = 0; j < S; ++j) {
        a[j] = load<T>(A + j * W);
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
            V *e = scratch.e + i * S;
#pragma GCC unroll 16
            for (int j = 0; j < S; ++j) {
                e[j] = Simd<T>::template exp2<ClampUp>(d * a[j]);
                h[j] = e[j] * h[j] + u * b[j];
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
            const V *e = e_all + i * S;
            V du = scratch.du[i], qA = scratch.qA[i];
            V sums[2 * S];
#pragma GCC unroll 16
            for (int j = 0; j < S; ++j) {
                const V l = g * c[j] + back[j];
                sums[j] = l * u;
                sums[S + j] = g * h[j];
                du += l * b[j];
                back[j] = l * e[j];
                h[j] = states[j];
                const V q = back[j] * h[j];
                qA += q * a[j];
                sum_A[j] += q * d;
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
        add_to<T>(dA + j * W, sum_A[j]);
    }
}

template <class T, bool ClampUp>
void backward_states(const Block &block, const T *A, const T *checkpoint, T *carry, int64_t N,
                     const BackwardScratch<T> &scratch, T *share, double *dA, const Ahead<T> &ahead) {
    constexpr int W = Simd<T>::W;
    const Ahead<T> nothing;
    const int64_t row = Share<T>::row(N);
    for (int64_t n = 0; n < N;) {
        const int64_t S = Passes<T>::width(N - n, Passes<T>::backward_max);
        const Ahead<T> &fetch = n == 0 ? ahead : nothing;
        const T *a = A + n * W, *B = scratch.B + n, *C = scratch.C + n, *start = checkpoint + n * W;
        T *c = carry + n * W;
        double *sum = dA + n * W;
        if (S == 4)
            backward_pass<T, 4, ClampUp>(block, a, start, c, B, C, N, scratch, share, row, sum, fetch);
        else if (S == 2)
            backward_pass<T, 2, ClampUp>(block, a, start, c, B, C, N, scratch, share, row, sum, fetch);
        else
            backward_pass<T, 1, ClampUp>(block, a, start, c, B, C, N, scratch, share, row, sum, fetch);
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

template <class T>
void merge_block(const medmamba_scan &s, int64_t b, int64_t k, const Block &block, const T *slot, int64_t G) {
    const int64_t N = s.states, K = s.routes, L = s.length, row = Share<T>::row(N), group_stride = kBlock * row;
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
}

// Before writing block number `sequence` of the team into its slot: the block that used the slot before must be merged.
inline void enter_slot(const RingSlot &slot, int64_t round) {
    for (int attempt = 0; __atomic_load_n(&slot.completed, __ATOMIC_ACQUIRE) < round; ++attempt)
        medmamba::wait_for_team(attempt);
}

// dt', its slope, dt' x and dy of the block's tokens, for one group of channels.
template <class T, bool Full>
void prepare_backward(const medmamba_scan &s, const Block &block, const T *x, const T *dt, const T *dy,
                      typename Simd<T>::V bias, int lanes, const BackwardScratch<T> &scratch) {
    typedef typename Simd<T>::V V;
    const int64_t x_stride = s.x_stride[1], dt_stride = s.dt_stride[1], dy_stride = s.dy_stride[2];
    const bool use_softplus = s.softplus;
    for (int i = 0; i < block.count; ++i) {
        const int64_t t = block.token[i];
        V d = load_lanes<T, Full>(dt + t * dt_stride, lanes) + bias;
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

// dx and ddt of the block's tokens; `sums` receives the block's share of dD and ddt_bias.
template <class T, bool Full>
void finish_backward_block(const medmamba_scan &s, const Block &block, const T *x, T *dx, T *ddt, bool add,
                           typename Simd<T>::V skip, int lanes, const BackwardScratch<T> &scratch, double *sums) {
    typedef typename Simd<T>::V V;
    const T ln2 = T(0.69314718055994530942);
    const int64_t Ch = s.channels, ddt_stride = s.routes * s.channels, x_stride = s.x_stride[1];
    V sum_D = {}, sum_bias = {};
    for (int i = 0; i < block.count; ++i) {
        const int64_t t = block.token[i];
        const V v = load_lanes<T, Full>(x + t * x_stride, lanes), g = scratch.g[i];
        const V raw = (scratch.du[i] * v + scratch.qA[i] * ln2) * scratch.slope[i];
        store_lanes<T, Full>(ddt + t * ddt_stride, raw, lanes);
        sum_bias += raw;
        sum_D += g * v;
        T *to = dx + t * Ch;
        V total = scratch.du[i] * scratch.dt[i] + g * skip;
        if (add) total += load_lanes<T, Full>(to, lanes);
        store_lanes<T, Full>(to, total, lanes);
    }
    add_to<T>(sums, sum_D);
    add_to<T>(sums + Simd<T>::W, sum_bias);
    for (int i = 0; i < block.masked; ++i) {
        const int64_t t = block.dropped[i];
        store_lanes<T, Full>(ddt + t * ddt_stride, V{}, lanes);
        if (!add) store_lanes<T, Full>(dx + t * Ch, V{}, lanes);
    }
}

template <class T, bool ClampUp> void backward_member(const medmamba_scan &s, const Member &member) {
    typedef typename Simd<T>::V V;
    constexpr int W = Simd<T>::W;
    const FlushSubnormals flush;
    const Rows<T> rows(s);
    const int64_t N = s.states, K = s.routes, L = s.length, Ch = s.channels;
    const int64_t g0 = member.group_begin, g1 = member.group_end, G = group_count<T>(s), blocks = block_count(s);
    const BackwardScratch<T> scratch(member.scratch, s, g1 - g0);
    const int64_t share_group = kBlock * Share<T>::row(N);
    transpose_A<T>(s, g0, g1, scratch.A);

    int64_t sequence = 0;
    for (int64_t b = member.batch_begin; b < member.batch_end; ++b)
        for (int64_t k = 0; k < K; ++k) {
            const T *x = rows.x(b), *dt = rows.dt(b, k), *B = rows.B(b, k), *C = rows.C(b, k), *dy = rows.dy(b, k);
            T *dx = (T *)s.dx + b * L * Ch, *ddt = (T *)s.ddt + (b * L * K + k) * Ch;
            memset(scratch.carry, 0, size_t((g1 - g0) * N * W) * sizeof(T));
            read_block(s, b, k, (blocks - 1) * kBlock, scratch.blocks[(blocks - 1) & 1]);
            for (int64_t j = blocks - 1; j >= 0; --j, ++sequence) {
                const Block &block = scratch.blocks[j & 1];
                Block &following = scratch.blocks[(j + 1) & 1];
                const bool more = j > 0;
                if (more) read_block(s, b, k, (j - 1) * kBlock, following);
                gather_states<T>(B, s.B_stride[1], block, N, scratch.B);
                gather_states<T>(C, s.C_stride[1], block, N, scratch.C);
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
                    const V bias = channel_vector<T>(s.dt_bias, s, k, g), skip = channel_vector<T>(s.D, s, k, g);
                    const bool full = lanes == W;
                    (full ? prepare_backward<T, true> : prepare_backward<T, false>)(s, block, x + c, dt + c, dy + c,
                                                                                    bias, lanes, scratch);
                    Ahead<T> ahead;
                    const bool wrap = g + 1 == g1;
                    if (!wrap || more) {
                        const Block &from = wrap ? following : block;
                        const int64_t next = (wrap ? g0 : g + 1) * W;
                        ahead.count = from.count;
                        ahead.token = from.token;
                        ahead.row[0] = x + next, ahead.stride[0] = s.x_stride[1];
                        ahead.row[1] = dt + next, ahead.stride[1] = s.dt_stride[1];
                        ahead.row[2] = dy + next, ahead.stride[2] = s.dy_stride[2];
                    }
                    double *sums = (double *)member.sums + TokenSums<T>::index(s, b, k, g);
                    backward_states<T, ClampUp>(
                        block, scratch.A + (k * (g1 - g0) + g - g0) * N * W,
                        (const T *)s.checkpoint + (((b * K + k) * blocks + j) * G + g) * N * W,
                        scratch.carry + (g - g0) * N * W, N, scratch, slot + g * share_group, sums, ahead);

                    (full ? finish_backward_block<T, true> : finish_backward_block<T, false>)(
                        s, block, x + c, dx + c, ddt + c, k > 0, skip, lanes, scratch, sums + N * W);
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

template <class T> void finish_typed(const medmamba_scan &s, const double *sums) {
    constexpr int W = Simd<T>::W;
    T *dA = (T *)s.dA, *dD = (T *)s.dD, *ddt_bias = (T *)s.ddt_bias;
    for (int64_t k = 0; k < s.routes; ++k)
        for (int64_t c = 0; c < s.channels; ++c)
            for (int64_t n = 0; n < s.states + 2; ++n) {
                double total = 0;
                for (int64_t b = 0; b < s.batch; ++b)
                    total += sums[TokenSums<T>::index(s, b, k, c / W) + n * W + c % W];
                if (n < s.states)
                    dA[(k * s.channels + c) * s.states + n] = T(total);
                else if (n == s.states && dD)
                    dD[k * s.channels + c] = T(total);
                else if (n == s.states + 1 && ddt_bias)
                    ddt_bias[k * s.channels + c] = T(total);
            }
}

// --- entry points of this instruction set ------------------------------------------------------------------------

// dt' A can only be positive without softplus (dt' of any sign) or with a positive A.
template <class T> bool may_grow(const medmamba_scan &s) {
    if (!s.softplus) return true;
    const T *A = (const T *)s.A;
    for (int64_t i = 0; i < s.routes * s.channels * s.states; ++i)
        if (A[i] > T(0)) return true;
    return false;
}

template <class T> void forward_typed(const medmamba_scan &s, const Member &member) {
    if (may_grow<T>(s))
        forward_member<T, true>(s, member);
    else
        forward_member<T, false>(s, member);
}

template <class T> void backward_typed(const medmamba_scan &s, const Member &member) {
    if (may_grow<T>(s))
        backward_member<T, true>(s, member);
    else
        backward_member<T, false>(s, member);
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
    const int64_t row = s.dtype == 0 ? Share<float>::row(s.states) * int64_t(sizeof(float))
                                     : Share<double>::row(s.states) * int64_t(sizeof(double));
    return groups(s) * kBlock * row;
}

int64_t sums_bytes(const medmamba_scan &s) {
    const int64_t set = s.dtype == 0 ? TokenSums<float>::set(s) : TokenSums<double>::set(s);
    return s.batch * s.routes * groups(s) * set * int64_t(sizeof(double));
}

void forward(const medmamba_scan &s, const Member &member) {
    s.dtype == 0 ? forward_typed<float>(s, member) : forward_typed<double>(s, member);
}

void backward(const medmamba_scan &s, const Member &member) {
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
