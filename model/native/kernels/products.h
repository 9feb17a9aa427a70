// Matrix products y = x W^T over panels of a packed matrix, for a few rows at a time, and for many.
//
// M rows by P panels are accumulated in registers: each weight read serves M rows, each activation P panels. Results do
// not depend on M and P: an output adds its inputs in their order.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace {

using namespace rex;

constexpr int LINE = 64;            // bytes: PANEL outputs by 1, 2 or 4 inputs
constexpr int PARTS = PANEL / W;    // vectors of a line of float32
constexpr int AHEAD = 32;           // lines by which several rows fetch weights in advance; one row is fast without

// Panels and rows at a time.
struct Blocks {
    static constexpr int solo = W == 16 ? 8 : 4;  // for one row: enough independent sums to hide the latency of additions
    static constexpr int pair = W == 16 ? 4 : 2;  // for two and three rows
    static constexpr int few = W == 16 ? 4 : 1;   // for more
    static constexpr int rows = W == 16 ? 6 : 4;  // rows at a time, if there are more
    static constexpr int most = W == 16 ? 8 : 4;  // rows up to which all are taken at once, by two panels
};

struct Float32 : Blocks {
    static constexpr int rows = W == 16 || W == 8 ? 6 : 4;
    static constexpr int inputs = 1;
    typedef Vf Sum;
    template <int M, int P>
    static INLINE void line(const uint8_t* const (&w)[P], int64_t i, const Product& a, int64_t row, int64_t, Sum (&sum)[M][P * PARTS]) {
        Vf weights[P * PARTS];
#pragma GCC unroll 16
        for (int p = 0; p < P * PARTS; p++) weights[p] = load<Vf>(w[p / PARTS] + i * LINE + p % PARTS * 4 * W);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Vf x = splat(a.x[(row + m) * a.x_stride + i]);
#pragma GCC unroll 16
            for (int p = 0; p < P * PARTS; p++) sum[m][p] = fma(x, weights[p], sum[m][p]);
        }
    }
    static INLINE Vf finish(const Product&, Sum sum, int64_t, int64_t) { return sum; }
};

struct BFloat16 : Blocks {
    static constexpr int inputs = 2;
    typedef Vf Sum;
    template <int M, int P>
    static INLINE void line(const uint8_t* const (&w)[P], int64_t i, const Product& a, int64_t row, int64_t, Sum (&sum)[M][P * PARTS]) {
        Vf even[P * PARTS], odd[P * PARTS];
#pragma GCC unroll 16
        for (int p = 0; p < P * PARTS; p++) {
            const Vi both = load<Vi>(w[p / PARTS] + i * LINE + p % PARTS * 4 * W);
            even[p] = (Vf)(both << 16);
            odd[p] = (Vf)(both & splat_int((int32_t)0xffff0000));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float* from = a.x + (row + m) * a.x_stride + 2 * i;
            const Vf first = splat(from[0]), second = splat(from[1]);
#pragma GCC unroll 16
            for (int p = 0; p < P * PARTS; p++) sum[m][p] = fma(second, odd[p], fma(first, even[p], sum[m][p]));
        }
    }
    static INLINE Vf finish(const Product&, Sum sum, int64_t, int64_t) { return sum; }
};

// sum + four products of bytes in each lane; weights are offset by 128 if UNSIGNED_WEIGHTS.
INLINE Vi dot(Vi sum, Vi weights, int32_t x) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (Vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__)
    return (Vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, _mm256_set1_epi32(x));
#elif defined(__AVX2__)
    // maddubs takes one unsigned operand and saturates at 2^15: |x| times the weight with x's sign; two products sum to
    // at most 2 * 127 * 127.
    const __m256i four = _mm256_set1_epi32(x);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(four), _mm256_sign_epi8((__m256i)weights, four));
    return (Vi)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (Vi)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#else
    // Each lane's four bytes by shifts, which every compiler turns into vector code.
    for (int byte = 0; byte < 4; byte++) {
        const Vi w = (weights << (24 - 8 * byte)) >> 24;
        sum += w * splat_int((int32_t)(int8_t)(x >> (8 * byte)));
    }
    return sum;
#endif
}

struct Int8 : Blocks {
    static constexpr int inputs = 4;
    typedef Vi Sum;
    template <int M, int P>
    static INLINE void line(const uint8_t* const (&w)[P], int64_t i, const Product& a, int64_t row, int64_t, Sum (&sum)[M][P * PARTS]) {
        Vi weights[P * PARTS];
#pragma GCC unroll 16
        for (int p = 0; p < P * PARTS; p++) weights[p] = load<Vi>(w[p / PARTS] + i * LINE + p % PARTS * 4 * W);
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512VNNI__)
        if (M >= 4) {  // |w| once for all rows instead of each |x|
            Vi magnitude[P * PARTS];
#pragma GCC unroll 16
            for (int p = 0; p < P * PARTS; p++) magnitude[p] = (Vi)_mm256_abs_epi8((__m256i)weights[p]);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t x;
                memcpy(&x, a.xq.q + (row + m) * a.xq.stride + 4 * i, 4);
#pragma GCC unroll 16
                for (int p = 0; p < P * PARTS; p++) {
                    const __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(x), (__m256i)weights[p]);
                    const __m256i pairs = _mm256_maddubs_epi16((__m256i)magnitude[p], turned);
                    sum[m][p] += (Vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                }
            }
            return;
        }
#endif
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            int32_t x;
            memcpy(&x, a.xq.q + (row + m) * a.xq.stride + 4 * i, 4);
#pragma GCC unroll 16
            for (int p = 0; p < P * PARTS; p++) sum[m][p] = dot(sum[m][p], weights[p], x);
        }
    }
    static INLINE Vf finish(const Product& a, Sum sum, int64_t row, int64_t output) {
        if (UNSIGNED_WEIGHTS) sum -= splat_int(128 * a.xq.sum[row]);
        return __builtin_convertvector(sum, Vf) * (splat(a.xq.scale[row]) * load<Vf>(a.scale + output));
    }
};

// A line here is a group: integer sums over its inputs, times the group's scales.
struct Int4 {
    static constexpr int rows = W == 16 ? 6 : 4, most = rows;
    static constexpr int solo = W == 16 ? 8 : 2, pair = W == 16 ? 2 : 1, few = W == 16 ? 2 : 1;  // sums of two kinds
    static constexpr int inputs = GROUP;
    typedef Vf Sum;
    template <int M, int P>
    static INLINE void line(const uint8_t* const (&w)[P], int64_t group, const Product& a, int64_t row, int64_t panel, Sum (&sum)[M][P * PARTS]) {
        const Vi low = splat_int(0x0f0f0f0f);
        Vi part[M][P * PARTS] = {};
        for (int64_t i = group * GROUP / 8; i < (group + 1) * GROUP / 8; i++) {
            Vi first[P * PARTS], second[P * PARTS];
#pragma GCC unroll 16
            for (int p = 0; p < P * PARTS; p++) {
                const Vi both = load<Vi>(w[p / PARTS] + i * LINE + p % PARTS * 4 * W);
                first[p] = both & low;
                second[p] = (Vi)((Vu)both >> 4) & low;
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                int32_t x[2];
                memcpy(x, a.xq.q + (row + m) * a.xq.stride + 8 * i, 8);
#pragma GCC unroll 16
                for (int p = 0; p < P * PARTS; p++) part[m][p] = dot(dot(part[m][p], first[p], x[0]), second[p], x[1]);
            }
        }
        const int64_t groups = a.k / GROUP;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Vi zero = splat_int(8 * a.xq.group_sum[(row + m) * (a.xq.stride / GROUP) + group]);
#pragma GCC unroll 16
            for (int p = 0; p < P * PARTS; p++) {
                const Vf scale = from_bf16(a.group_scale + ((panel + p / PARTS) * groups + group) * PANEL + p % PARTS * W);
                sum[m][p] = fma(__builtin_convertvector(part[m][p] - zero, Vf), scale, sum[m][p]);
            }
        }
    }
    static INLINE Vf finish(const Product& a, Sum sum, int64_t row, int64_t) { return sum * splat(a.xq.scale[row]); }
};

template <class Kind, int M, int P>
void block(const Product& a, int64_t row, int64_t panel) {
    const int64_t lines = a.k / Kind::inputs, bytes = lines * LINE * (Kind::inputs == GROUP ? GROUP / 8 : 1);
    const uint8_t* w[P];
    for (int p = 0; p < P; p++) w[p] = a.panels + (panel + p) * bytes;
    typename Kind::Sum sum[M][P * PARTS] = {};
    for (int64_t i = 0; i < lines; i++) {
        if (M > 1 && Kind::inputs != GROUP) {
            const int64_t ahead = i + AHEAD < lines ? (i + AHEAD) * LINE : P * bytes + (i + AHEAD - lines) * LINE;
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) __builtin_prefetch(w[p] + ahead);
        }
        Kind::template line<M, P>(w, i, a, row, panel, sum);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int p = 0; p < P * PARTS; p++) {
            const int64_t output = panel * PANEL + p * W;
            store(a.y + (row + m) * a.y_stride + output, Kind::finish(a, sum[m][p], row + m, output));
        }
}

template <class Kind, int P, int MOST>
void rows_by_panels(const Product& a, int64_t panel) {
    int64_t row = 0;
    for (; row + MOST <= a.rows; row += MOST) block<Kind, MOST, P>(a, row, panel);
    switch (a.rows - row) {
        case 7: return block<Kind, std::min(MOST, 7), P>(a, row, panel);
        case 6: return block<Kind, std::min(MOST, 6), P>(a, row, panel);
        case 5: return block<Kind, std::min(MOST, 5), P>(a, row, panel);
        case 4: return block<Kind, 4, P>(a, row, panel);
        case 3: return block<Kind, 3, P>(a, row, panel);
        case 2: return block<Kind, 2, P>(a, row, panel);
        case 1: return block<Kind, 1, P>(a, row, panel);
    }
}

template <class Kind>
void product(const Product& a, int64_t panel, int64_t last) {
    if (a.rows == 1) {
        for (; panel + Kind::solo <= last; panel += Kind::solo) block<Kind, 1, Kind::solo>(a, 0, panel);
    } else if (a.rows <= 3) {
        for (; panel + Kind::pair <= last; panel += Kind::pair) rows_by_panels<Kind, Kind::pair, Kind::rows>(a, panel);
    } else if (a.rows > Kind::rows && a.rows <= Kind::most) {
        for (; panel + 2 <= last; panel += 2) rows_by_panels<Kind, 2, Kind::most>(a, panel);
    } else {
        for (; panel + Kind::few <= last; panel += Kind::few) rows_by_panels<Kind, Kind::few, Kind::rows>(a, panel);
    }
    for (; panel + 2 <= last; panel += 2) rows_by_panels<Kind, 2, Kind::rows>(a, panel);
    for (; panel < last; panel++) rows_by_panels<Kind, 1, Kind::rows>(a, panel);
}

void product_f32(const Product& a, int64_t panel, int64_t last) { product<Float32>(a, panel, last); }
void product_bf16(const Product& a, int64_t panel, int64_t last) { product<BFloat16>(a, panel, last); }
void product_int4(const Product& a, int64_t panel, int64_t last) { product<Int4>(a, panel, last); }

#if defined(__AMX_INT8__)
#include "tiles.h"
#else
void product_int8(const Product& a, int64_t panel, int64_t last) { product<Int8>(a, panel, last); }
#endif

}  // namespace
