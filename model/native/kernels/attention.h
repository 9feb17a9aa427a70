// Attention of a few queries over the pages of one slot and head, and writing keys and values into pages.
//
// A page holds, for each layer and head, keys as blocks of BLOCK positions (head_dim lines of one element from each
// position, in bfloat16 two elements) and then values, position by position; a head is padded to a multiple of BLOCK.
#include "kernels.h"
#include "simd.h"

namespace {

using namespace rex;

struct Cache32 {
    typedef float Element;
    static constexpr int pair = 1;  // adjacent elements of a head in a line of keys
    template <int Q, int P>
    static INLINE void keys(const uint8_t* const (&parts)[P], const float* const (&q)[Q], int64_t i, Vf (&sum)[P][Q]) {
#pragma GCC unroll 8
        for (int j = 0; j < Q; j++) {
            const Vf x = splat(q[j][i]);
#pragma GCC unroll 16
            for (int p = 0; p < P; p++) sum[p][j] = fma(x, load<Vf>(parts[p]), sum[p][j]);
        }
    }
    static INLINE Vf value(const Element* from) { return load<Vf>(from); }
    static INLINE Element element(float x) { return x; }
};

struct Cache16 {
    typedef uint16_t Element;
    static constexpr int pair = 2;
    template <int Q, int P>
    static INLINE void keys(const uint8_t* const (&parts)[P], const float* const (&q)[Q], int64_t i, Vf (&sum)[P][Q]) {
        Vi both[P];
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) both[p] = load<Vi>(parts[p]);
#pragma GCC unroll 8
        for (int j = 0; j < Q; j++) {
            const Vf x = splat(q[j][2 * i]);
#pragma GCC unroll 16
            for (int p = 0; p < P; p++) sum[p][j] = fma(x, (Vf)(both[p] << 16), sum[p][j]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < Q; j++) {
            const Vf x = splat(q[j][2 * i + 1]);
#pragma GCC unroll 16
            for (int p = 0; p < P; p++) sum[p][j] = fma(x, (Vf)(both[p] & splat_int((int32_t)0xffff0000)), sum[p][j]);
        }
    }
    static INLINE Vf value(const Element* from) { return from_bf16(from); }
    static INLINE Element element(float x) { return to_bf16(x); }
};

constexpr int BLOCK_PARTS = BLOCK / W;

// Scores of Q queries at the positions of one page. Each line of keys fetches one of the values, `to_values` bytes on, and
// one of the next page's keys, `to_next` bytes on: texts are read too seldom to stay in the caches, and in pieces too short
// for the processor to foresee the next.
template <class C, int Q, int B>
INLINE void score_blocks(const uint8_t* keys, int64_t to_values, int64_t to_next, const float* const (&q)[Q], int64_t lines,
                         float* const (&scores)[Q]) {
    constexpr int P = B * BLOCK_PARTS;
    Vf sum[P][Q] = {};
    for (int64_t i = 0; i < lines; i++) {
        const uint8_t* parts[P];
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) parts[p] = keys + (p / BLOCK_PARTS * lines + i) * 64 + p % BLOCK_PARTS * 4 * W;
#pragma GCC unroll 16
        for (int p = 0; p < P; p += BLOCK_PARTS) {
            __builtin_prefetch(parts[p] + to_values);
            __builtin_prefetch(parts[p] + to_next);
        }
        C::template keys<Q, P>(parts, q, i, sum);
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; p++)
#pragma GCC unroll 8
        for (int j = 0; j < Q; j++) store(scores[j] + p * W, sum[p][j]);
}

template <class C, int Q, int V>
INLINE void mix_values(const Attention& a, int64_t values, int64_t stride, int64_t at, float* const (&weights)[Q],
                       const int32_t (&seen)[Q], int32_t most, Vf (&sum)[Q][V]) {
    typedef typename C::Element Element;
    for (int32_t first = 0; first < most; first += PAGE) {
        const Element* page = (const Element*)(a.pages[first / PAGE] + a.offset + values) + at;
        const int32_t count = most - first < PAGE ? most - first : PAGE;
        for (int32_t s = 0; s < count; s++) {
#pragma GCC unroll 8
            for (int v = 0; v < V * W * (int)sizeof(Element); v += 64)  // the next head's keys follow this one's values
                __builtin_prefetch((const uint8_t*)(page + s * stride) + values + v);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                const Vf value = C::value(page + s * stride + v * W);
#pragma GCC unroll 8
                for (int j = 0; j < Q; j++) sum[j][v] = fma(splat(weights[j][first + s]), value, sum[j][v]);
            }
        }
    }
    (void)seen;
}

template <class C, int Q>
void attend_queries(const Attention& a, int32_t first_query) {
    typedef typename C::Element Element;
    const int64_t stride = round_up(a.head_dim, BLOCK), lines = stride / C::pair;
    const int64_t values = PAGE * stride * (int64_t)sizeof(Element);
    const float* q[Q];
    float* scores[Q];
    int32_t seen[Q], most = 0;
    for (int j = 0; j < Q; j++) {
        seen[j] = a.seen[first_query + j];
        most = seen[j] > most ? seen[j] : most;
    }
    const int64_t width = round_up(most, PAGE);
    for (int j = 0; j < Q; j++) {
        q[j] = a.q[first_query + j];
        scores[j] = a.scores + j * width;
    }
    constexpr int together = W == 16 ? (Q > 4 ? 2 : 4) : W == 8 ? (Q > 2 ? 1 : 2) : 1;  // blocks whose sums fit into registers
    for (int32_t first = 0; first < most; first += PAGE) {
        const uint8_t* keys = a.pages[first / PAGE] + a.offset;
        const int64_t to_next = first + PAGE < most ? a.pages[first / PAGE + 1] - a.pages[first / PAGE] : 0;
        for (int32_t at = 0; at < PAGE && first + at < most; at += together * BLOCK) {
            float* to[Q];
            for (int j = 0; j < Q; j++) to[j] = scores[j] + first + at;
            score_blocks<C, Q, together>(keys + at / BLOCK * lines * 64, values, to_next, q, lines, to);
        }
    }
    float share[Q];
    for (int j = 0; j < Q; j++) {
        Vi position;
        for (int lane = 0; lane < W; lane++) position[lane] = lane;
        const int32_t whole = seen[j] / W * W;  // positions of vectors that are seen whole
        const Vi is_seen = position + splat_int(whole) < splat_int(seen[j]);
        float* at = scores[j];
        Vf top[4];
        for (auto& t : top) t = splat(-__builtin_inff());
        int32_t s = 0;
        for (; s + 4 * W <= whole; s += 4 * W)
            for (int t = 0; t < 4; t++) top[t] = larger(load<Vf>(at + s + t * W), top[t]);
        for (; s < whole; s += W) top[0] = larger(load<Vf>(at + s), top[0]);
        if (s < seen[j]) top[1] = larger(is_seen ? load<Vf>(at + s) : top[1], top[1]);
        const Vf most_j = splat(largest_lane(larger(larger(top[0], top[1]), larger(top[2], top[3]))));
        Vf total = {};
        for (s = 0; s < whole; s += W) {
            const Vf weight = power_of_two(load<Vf>(at + s) - most_j);
            store(at + s, weight);
            total += weight;
        }
        if (s < seen[j]) {
            const Vf weight = is_seen ? power_of_two(load<Vf>(at + s) - most_j) : Vf{};
            store(at + s, weight);
            total += weight;
            s += W;
        }
        // Up to the last position of this call's queries: positions that this query does not see have weight 0.
        for (; s < most; s += W) store(at + s, Vf{});
        share[j] = 1.0f / sum_lanes(total);
    }
    constexpr int V = W == 16 ? (Q > 4 ? 2 : 4) : W == 8 ? (Q > 2 ? 2 : 4) : 2;
    int64_t at = 0;
    for (; at + V * W <= stride; at += V * W) {
        Vf sum[Q][V] = {};
        mix_values<C, Q, V>(a, values, stride, at, scores, seen, most, sum);
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < V; v++) store(a.out[first_query + j] + at + v * W, sum[j][v] * splat(share[j]));
    }
    for (; at < stride; at += W) {
        Vf sum[Q][1] = {};
        mix_values<C, Q, 1>(a, values, stride, at, scores, seen, most, sum);
        for (int j = 0; j < Q; j++) store(a.out[first_query + j] + at, sum[j][0] * splat(share[j]));
    }
}

template <class C>
void attend(const Attention& a) {
    int32_t first = 0;
    if (W == 16) {
        for (; first + 8 <= a.queries; first += 8) attend_queries<C, 8>(a, first);
        for (; first + 6 <= a.queries; first += 6) attend_queries<C, 6>(a, first);
    }
    for (; first + 4 <= a.queries; first += 4) attend_queries<C, 4>(a, first);
    if (a.queries - first == 3) attend_queries<C, 3>(a, first);
    if (a.queries - first == 2) attend_queries<C, 2>(a, first);
    if (a.queries - first == 1) attend_queries<C, 1>(a, first);
}

template <class C>
void store_position(const float* key, const float* value, int32_t head_dim, int64_t stride, uint8_t* page, int32_t at) {
    typedef typename C::Element Element;
    Element* keys = (Element*)page + at / BLOCK * BLOCK * stride;
    Element* values = (Element*)page + PAGE * stride + at * stride;
    for (int32_t i = 0; i < head_dim; i++) {
        keys[i / C::pair * BLOCK * C::pair + at % BLOCK * C::pair + i % C::pair] = C::element(key[i]);
        values[i] = C::element(value[i]);
    }
}

void attend_f32(const Attention& a) { attend<Cache32>(a); }
void attend_bf16(const Attention& a) { attend<Cache16>(a); }
void store_f32(const float* key, const float* value, int32_t head_dim, int64_t stride, uint8_t* page, int32_t at) {
    store_position<Cache32>(key, value, head_dim, stride, page, at);
}
void store_bf16(const float* key, const float* value, int32_t head_dim, int64_t stride, uint8_t* page, int32_t at) {
    store_position<Cache16>(key, value, head_dim, stride, page, at);
}

}  // namespace
