// The kernels. Compiled once for each instruction set, with its flags and KERNELS (its name) and UNSIGNED_WEIGHTS
// defined on the command line by build.py.
//
// The order of summation is part of the contract (kernels.h). A product's outputs add their inputs one after the other;
// a query adds positions one after the other, up to the last one it sees.
#include "kernels.h"
#include "products.h"
#include "attention.h"
#include "draw.h"

namespace {

using namespace rex;

void rms_norm(const float* x, const float* weight, float eps, int64_t n, int64_t stride, float* out) {
    Vf sums[4] = {};
    for (int64_t i = 0; i < stride; i += 4 * W)
        for (int j = 0; j < 4; j++) {
            const Vf a = load<Vf>(x + i + j * W);
            sums[j] = fma(a, a, sums[j]);
        }
    const float mean = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)n;
    const Vf scale = splat(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < stride; i += W) store(out + i, load<Vf>(weight + i) * (load<Vf>(x + i) * scale));
}

void head_norm(float* x, const float* weight, float eps, int64_t n, int64_t stride) {
    Vf sums = {};
    for (int64_t i = 0; i < stride; i += W) sums = fma(load<Vf>(x + i), load<Vf>(x + i), sums);
    const Vf scale = splat(1.0f / __builtin_sqrtf(sum_lanes(sums) / (float)n + eps));
    for (int64_t i = 0; i < stride; i += W) store(x + i, load<Vf>(weight + i) * (load<Vf>(x + i) * scale));
}

void add(float* x, const float* branch, int64_t stride) {
    for (int64_t i = 0; i < stride; i += W) store(x + i, load<Vf>(x + i) + load<Vf>(branch + i));
}

void quantize(const float* x, int64_t stride, float levels, int8_t* q, float* scale, int32_t* sum) {
    Vf most[4] = {};
    Vi bad = {};
    for (int64_t i = 0; i < stride; i += 4 * W)
        for (int j = 0; j < 4; j++) {
            const Vf a = absolute(load<Vf>(x + i + j * W));
            bad |= a != a;
            most[j] = larger(a, most[j]);
        }
    float largest = largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3])));
    if (largest < 1.17549435e-38f) largest = 1.17549435e-38f;
    if (any_lane(bad)) largest = __builtin_nanf("");  // integers have no NaN: the row's scale carries it
    const Vf down = splat(levels / largest), highest = splat(levels), lowest = splat(-levels);
    Vi sums = {};
    for (int64_t i = 0; i < stride; i += W) {
        Vf scaled = load<Vf>(x + i) * down;
        scaled = scaled < highest ? scaled : highest;
        scaled = scaled > lowest ? scaled : lowest;
        const Vi whole = to_int(scaled);
        sums += whole;
        store(q + i, __builtin_convertvector(whole, Vb));
    }
    int32_t lanes[W], total = 0;
    store(lanes, sums);
    for (int i = 0; i < W; i++) total += lanes[i];
    *sum = total;
    *scale = largest / levels;
}

void sum_groups(const int8_t* q, int64_t stride, int32_t* group_sum) {
    for (int64_t group = 0; group < stride / GROUP; group++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < GROUP; i++) sum += q[group * GROUP + i];
        group_sum[group] = sum;
    }
}

void swiglu(const float* y, int64_t panels, float* out) {
    const Vf one = splat(1.0f);
    for (int64_t p = 0; p < panels; p++)
        for (int j = 0; j < PANEL; j += W) {
            const Vf gate = load<Vf>(y + p * 2 * PANEL + j), up = load<Vf>(y + p * 2 * PANEL + PANEL + j);
            store(out + p * PANEL + j, gate / (one + exponential(-gate)) * up);
        }
}

void rotate(float* x, const float* cos, const float* sin, int32_t rotary_dim) {
    const int32_t half = rotary_dim / 2;
    for (int32_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

int32_t arg_max(const float* x, int64_t n, float* highest) {
    Vf best[4];
    for (auto& b : best) b = splat(-__builtin_inff());
    Vi bad = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int j = 0; j < 4; j++) {
            const Vf a = load<Vf>(x + i + j * W);
            bad |= a != a;
            best[j] = larger(a, best[j]);
        }
    float most = largest_lane(larger(larger(best[0], best[1]), larger(best[2], best[3])));
    bool is_nan = any_lane(bad);
    for (; i < n; i++) {
        is_nan |= x[i] != x[i];
        most = x[i] > most ? x[i] : most;
    }
    *highest = is_nan ? __builtin_nanf("") : most;
    for (int64_t at = 0; at < n; at++)
        if (x[at] == most) return (int32_t)at;
    return 0;
}

#define TEXT_OF(name) #name
#define NAME_OF(name) TEXT_OF(name)

const Kernels table = {
    NAME_OF(KERNELS), UNSIGNED_WEIGHTS, product_f32, product_bf16, product_int8, product_int4, attend_f32, attend_bf16,
    rms_norm, head_norm, add, quantize, sum_groups, swiglu, rotate, store_f32, store_bf16, arg_max,
    draw,
};

}  // namespace

#define JOINED(a, b) a##b
#define TABLE_OF(name) JOINED(name, _kernels)

const rex::Kernels* rex::TABLE_OF(KERNELS)() { return &table; }
