// Vectors of channels and the functions that the scan needs of them: exp2, softplus and its slope, sums over lanes.
//
// Everything sits in an unnamed namespace and uses no C++ library: a template instantiated here with AVX-512 code must
// never be the copy that the linker keeps for the baseline.
#ifndef MEDMAMBA_SIMD_H
#define MEDMAMBA_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// max(a, b), b if either is NaN. One instruction, which compilers do not make of a comparison unless NaN is ruled out.
#if defined(__AVX512F__)
inline auto maximum(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
inline auto minimum(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
inline auto maximum(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
inline auto minimum(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
#elif defined(__SSE2__)
inline auto maximum(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
inline auto minimum(__m128 a, __m128 b) { return _mm_min_ps(a, b); }
#else
template <class V> inline V maximum(V a, V b) { return a > b ? a : b; }
template <class V> inline V minimum(V a, V b) { return a < b ? a : b; }
#endif

template <class T> struct Simd;

template <> struct Simd<float> {
    typedef float V __attribute__((vector_size(kVectorBytes)));
    typedef int32_t I __attribute__((vector_size(kVectorBytes)));
    static constexpr int W = kVectorBytes / sizeof(float);

    // 2^x. Relative error at most 1e-7 + 3e-7 |f|, f = x - round(x): the polynomial is minimax in the *exponent*, so
    // that the product of many decays near 1 stays right; its constant term is exactly 1. Large negative x gives +0,
    // large positive x +inf, NaN stays NaN. Without ClampUp (x <= 0 is known) one instruction may be saved.
    template <bool ClampUp> static inline V exp2(V x) {
#if defined(__AVX512F__)
        const V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_scalef_ps(exp2_fraction(x - n), n);
#else
        x = maximum(V{} - 127.0f, x); // 2^-127 comes out as 0: the exponent field is 0, and so is the mantissa
        if (ClampUp) x = minimum(V{} + 128.0f, x); // 2^128: exponent field 255, infinity
        const V magic = V{} + 12582912.0f;         // 1.5 * 2^23: the low mantissa bits of x + magic are round(x)
        const V shifted = x + magic;
        return (V)((I)exp2_fraction(x - (shifted - magic)) + ((I)shifted << 23));
#endif
    }

    static inline V exp2_fraction(V f) {
        V p = V{} + 0x1.5bc92ap-10f;
        p = p * f + 0x1.3cbb44p-7f;
        p = p * f + 0x1.c6b5e4p-5f;
        p = p * f + 0x1.ebfa58p-3f;
        p = p * f + 0x1.62e42cp-1f;
        return p * f + 1.0f;
    }

    // e^x for x <= 0, relative error below 1.5e-7 (Cody-Waite reduction, degree 6).
    static inline V exp_accurate(V x) {
        const V low = V{} - 87.0f;
        x = maximum(low, x);
        const V magic = V{} + 12582912.0f;
        const V shifted = x * 0x1.715476p+0f + magic;
        const V n = shifted - magic;
        V f = x - n * 0x1.62e400p-1f; // exact: 16 bits times at most 7
        f = f - n * 0x1.7f7d1cp-20f;
        V p = V{} + 0x1.6a244cp-10f;
        p = p * f + 0x1.1239d4p-7f;
        p = p * f + 0x1.5558f2p-5f;
        p = p * f + 0x1.555492p-3f;
        p = p * f + 0x1.fffffcp-2f;
        p = p * (f * f) + f + 1.0f;
        return (V)((I)p + ((I)shifted << 23));
    }

    // log(1 + u) for u in [0, 1], relative error below 1.5e-7 down to u = 0.
    static inline V log1p_unit(V u) {
        V p = V{} - 0x1.b2f56ep-9f;
        p = p * u + 0x1.4b0826p-6f;
        p = p * u - 0x1.d86314p-5f;
        p = p * u + 0x1.b579bap-4f;
        p = p * u - 0x1.3a7a7ep-3f;
        p = p * u + 0x1.935c9ep-3f;
        p = p * u - 0x1.ff26e0p-3f;
        p = p * u + 0x1.554df0p-2f;
        p = p * u - 0x1.ffffd2p-2f;
        return u + u * (p * u);
    }
};

template <> struct Simd<double> {
    typedef double V __attribute__((vector_size(kVectorBytes)));
    typedef int64_t I __attribute__((vector_size(kVectorBytes)));
    static constexpr int W = kVectorBytes / sizeof(double);

    // Double serves the tests (gradcheck through the op); the C library's functions, lane by lane, are accurate.
    template <bool ClampUp> static inline V exp2(V x) {
        for (int i = 0; i < W; ++i) x[i] = ::exp2(x[i]);
        return x;
    }
    static inline V exp_accurate(V x) {
        for (int i = 0; i < W; ++i) x[i] = ::exp(x[i]);
        return x;
    }
    static inline V log1p_unit(V u) {
        for (int i = 0; i < W; ++i) u[i] = ::log1p(u[i]);
        return u;
    }
};

// softplus(x) = max(x, 0) + log(1 + e^-|x|), and x itself above 20, as torch; `slope` receives the derivative.
template <class T> inline typename Simd<T>::V softplus(typename Simd<T>::V x, typename Simd<T>::V &slope) {
    typedef typename Simd<T>::V V;
    const V zero = V{}, one = V{} + T(1), cut = V{} + T(20);
    const V u = Simd<T>::exp_accurate(x < zero ? x : -x);
    const V s = (x < zero ? u : one) / (one + u);
    slope = x > cut ? one : s;
    const V positive = zero > x ? zero : x; // NaN stays NaN
    return x > cut ? x : positive + Simd<T>::log1p_unit(u);
}

template <class T> inline typename Simd<T>::V softplus(typename Simd<T>::V x) {
    typename Simd<T>::V slope;
    return softplus<T>(x, slope); // what only the slope needs is dropped by the compiler
}

template <class T> inline typename Simd<T>::V load(const T *p) {
    typename Simd<T>::V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class T> inline void store(T *p, typename Simd<T>::V v) { memcpy(p, &v, sizeof v); }

// The first `count` lanes, zeros elsewhere. The last group of channels reads and writes nothing beyond them.
template <class T, bool Full> inline typename Simd<T>::V load_lanes(const T *p, int count) {
    if (Full) return load<T>(p);
    typename Simd<T>::V v = {};
    for (int i = 0; i < Simd<T>::W; ++i)
        if (i < count) v[i] = p[i];
    return v;
}

template <class T, bool Full> inline void store_lanes(T *p, typename Simd<T>::V v, int count) {
    if (Full) {
        store<T>(p, v);
    } else {
        for (int i = 0; i < Simd<T>::W; ++i)
            if (i < count) p[i] = v[i];
    }
}

// --- sums over the lanes of many vectors at once ---------------------------------------------------------------
//
// M vectors (M a power of two, M <= W) become one vector that holds every sum, in log2(W) steps of two shuffles and an
// add. A vector consists of segments of `s` lanes, each still to be summed, each owned by one of the M vectors.
// Step: X, Y with segments of s lanes -> one vector with segments of s/2 lanes. Segments of 16 bytes and more are laid
// one vector after the other; smaller ones inside each 16-byte lane: every step is then one shuffle per operand.

template <int... Is> struct Lanes {};
template <int Count, int... Is> struct MakeLanes : MakeLanes<Count - 1, Count - 1, Is...> {};
template <int... Is> struct MakeLanes<0, Is...> { typedef Lanes<Is...> type; };

template <class T> struct Fold {
    static constexpr int W = Simd<T>::W;
    typedef typename Simd<T>::V V;

    // Where lane r of the result takes its low half from: 0..W-1 in X, W..2W-1 in Y. The high half is s/2 further.
    static constexpr int source(int r, int s) {
        const int half = s / 2;
        const int lane_block = half * int(sizeof(T)) >= 16 ? W : 16 / int(sizeof(T));
        const int block = r / lane_block, q = r % lane_block, h = lane_block / 2;
        const int in = q % h;
        return (q >= h ? W : 0) + block * lane_block + (in / half) * s + in % half;
    }

    template <int S, int... Is> static inline V combine(V x, V y, Lanes<Is...>) {
        return __builtin_shufflevector(x, y, source(Is, S)...) +
               __builtin_shufflevector(x, y, (source(Is, S) + S / 2)...);
    }
    template <int S, int... Is> static inline V swap_halves(V x, Lanes<Is...>) {
        return x + __builtin_shufflevector(x, x, (Is ^ (S / 2))...);
    }

    // v[0..M-1] with segments of S lanes -> v[0] with finished sums.
    template <int M, int S> static inline V run(V *v) {
        typedef typename MakeLanes<W>::type All;
        if constexpr (S == 1) {
            return v[0];
        } else if constexpr (M == 1) {
            v[0] = swap_halves<S>(v[0], All{});
            return run<1, S / 2>(v);
        } else {
            for (int i = 0; i < M / 2; ++i) v[i] = combine<S>(v[2 * i], v[2 * i + 1], All{});
            return run<M / 2, S / 2>(v);
        }
    }

    // The lane in which the sum of vector j of M ends up; `Where` makes sure that it is a constant.
    template <int M> struct Where {
        int lane[M] = {};
        constexpr Where() {
            for (int j = 0; j < M; ++j) lane[j] = position(j, M);
        }
    };
    static constexpr int position(int j, int M) {
        int owner[W][W] = {};
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < W; ++r) owner[m][r] = m;
        int s = W;
        for (int m = M; m > 1; m /= 2, s /= 2)
            for (int i = 0; i < m / 2; ++i) {
                int next[W] = {};
                for (int r = 0; r < W; ++r) {
                    const int from = source(r, s);
                    next[r] = from >= W ? owner[2 * i + 1][from - W] : owner[2 * i][from];
                }
                for (int r = 0; r < W; ++r) owner[i][r] = next[r];
            }
        for (int r = 0; r < W; ++r)
            if (owner[0][r] == j) return r;
        return -1;
    }
};

} // namespace

#endif
