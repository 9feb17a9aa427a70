// Samples a token from a row of logits: weights e^((x - highest) / temperature), cut by top-k, top-p and min-p, and the
// first token whose cumulative weight exceeds a uniform number's share of all. `steps/draw.py` defines the same in Python.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace {

using namespace rex;

constexpr int BINS = 1024;             // of the logarithm of a weight; the last one has all below e^-32
constexpr float BINS_PER_NAT = 32.0f;
constexpr int64_t SUMMED = 64;         // weights that are summed at once
constexpr float LEAST_LOG = -87.0f;    // of a weight above 0, the limit of `exponential`
constexpr float LEAST_TEMPERATURE = 1e-30f;

// Keeps the largest weights, at most `most` and as few as have `share` of all weight, and sets the others to 0; of equal
// ones, the first are kept. To sort all would take ten times as long: whole bins are in or out, and only one is sorted.
// n is a multiple of W.
void keep_largest(const float* log, float* weight, int64_t n, int64_t most, double share) {
    static thread_local std::vector<int32_t> bins, inside;
    bins.resize(n);
    const Vf last_bin = splat((float)(BINS - 1)), scale = splat(-BINS_PER_NAT);
    for (int64_t i = 0; i < n; i += W) {
        const Vf bin = load<Vf>(log + i) * scale;
        store(&bins[i], __builtin_convertvector(bin < last_bin ? bin : last_bin, Vi));
    }
    struct Bin {
        double mass;
        int64_t count;
    } found[BINS] = {};
    for (int64_t i = 0; i < n; i++) {
        Bin& bin = found[bins[i]];
        bin.mass += weight[i];
        bin.count++;
    }
    double total = 0.0, mass = 0.0;
    for (const Bin& bin : found) total += bin.mass;
    const double wanted = share * total;
    int64_t count = 0;
    int32_t last = 0;
    for (; last < BINS - 1 && count + found[last].count < most && mass + found[last].mass < wanted; last++) {
        count += found[last].count;
        mass += found[last].mass;
    }
    const Vi limit = splat_int(last);
    for (int64_t i = 0; i < n; i += W)
        store(weight + i, load<Vi>(&bins[i]) > limit ? splat(0.0f) : load<Vf>(weight + i));
    inside.clear();
    for (int64_t i = 0; i < n; i++)
        if (bins[i] == last) inside.push_back((int32_t)i);
    std::stable_sort(inside.begin(), inside.end(), [&](int32_t a, int32_t b) { return log[a] > log[b]; });
    for (const int32_t i : inside) {
        const float own = weight[i];
        if (count >= most || mass >= wanted) weight[i] = 0.0f;
        count++;
        mass += own;
    }
}

int32_t draw(const float* x, int64_t n, float highest, const RexDraw& how) {
    static thread_local std::vector<float> log, weight;
    static thread_local std::vector<double> sums;
    const int64_t padded = round_up(n, SUMMED);
    log.resize(padded);
    weight.resize(padded);
    std::copy(x, x + n, log.begin());
    std::fill(log.begin() + n, log.end(), -__builtin_inff());
    const float temperature = std::max((float)how.temperature, LEAST_TEMPERATURE);
    const Vf most = splat(highest), inverse = splat(1.0f / temperature), least = splat(LEAST_LOG);
    for (int64_t i = 0; i < padded; i += W) {
        const Vf scaled = (load<Vf>(&log[i]) - most) * inverse;
        store(&log[i], scaled);
        store(&weight[i], scaled > least ? exponential(scaled) : splat(0.0f));
    }
    const int64_t top_k = (int64_t)how.top_k;
    if (top_k > 0 && top_k < n) keep_largest(log.data(), weight.data(), padded, top_k, 2.0);
    if (how.top_p < 1.0) keep_largest(log.data(), weight.data(), padded, padded, how.top_p);
    if (how.min_p > 0.0)
        for (int64_t i = 0; i < n; i++)
            if (weight[i] < (float)how.min_p) weight[i] = 0.0f;

    sums.clear();
    double total = 0.0;
    for (int64_t first = 0; first < padded; first += SUMMED) {
        Vf sum = {};
        for (int64_t i = first; i < first + SUMMED; i += W) sum += load<Vf>(&weight[i]);
        sums.push_back((double)sum_lanes(sum));
        total += sums.back();
    }
    const double target = how.uniform * total;
    double before = 0.0;
    int64_t block = 0;
    while (block + 1 < (int64_t)sums.size() && before + sums[block] <= target) before += sums[block++];
    for (int64_t i = block * SUMMED; i < n; i++) {
        before += weight[i];
        if (before > target && weight[i] > 0.0f) return (int32_t)i;
    }
    // Rounding stepped past the last token with a weight.
    for (int64_t i = n - 1; i > 0; i--)
        if (weight[i] > 0.0f) return (int32_t)i;
    return 0;
}

}  // namespace
