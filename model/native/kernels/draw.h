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
constexpr int64_t STRIDE = 1024;
constexpr float LEAST_LOG = -87.0f;    // of a weight above 0, the limit of `exponential`
constexpr float LEAST_TEMPERATURE = 1e-30f;

struct Bin {
    double mass;
    int64_t count;
};

// Bins of the logarithms, and the last one that is needed for `most` entries or for `wanted` of weight; count, mass: of
// the bins before it.
int32_t find_bins(
    const float* log,
    const float* weight,
    int64_t n,
    int64_t most,
    double wanted,
    std::vector<int32_t>& bins,
    int64_t& count,
    double& mass
) {
    bins.resize(n);
    const Vf last_bin = splat((float)(BINS - 1)), scale = splat(-BINS_PER_NAT);
    for (int64_t i = 0; i < n; i += W) {
        const Vf bin = load<Vf>(log + i) * scale;
        store(&bins[i], __builtin_convertvector(bin < last_bin ? bin : last_bin, Vi));
    }
    Bin found[BINS] = {};
    for (int64_t i = 0; i < n; i++) {
        Bin& bin = found[bins[i]];
        bin.mass += weight[i];
        bin.count++;
    }
    count = 0;
    mass = 0.0;
    int32_t last = 0;
    for (; last < BINS - 1 && count + found[last].count < most && mass + found[last].mass < wanted; last++) {
        count += found[last].count;
        mass += found[last].mass;
    }
    return last;
}

// Keeps the largest weights, at most `most` and as few as have `wanted` of weight, and sets the others to 0; of equal
// ones, the first are kept. To sort all would take ten times as long: whole bins are in or out, and only one is sorted.
// n is a multiple of W.
void keep_largest(const float* log, float* weight, int64_t n, int64_t most, double wanted) {
    static thread_local std::vector<int32_t> bins, inside;
    int64_t count;
    double mass;
    const int32_t last = find_bins(log, weight, n, most, wanted, bins, count, mass);
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

INLINE Vf weights(Vf log) { return log > splat(LEAST_LOG) ? exponential(log) : splat(0.0f); }

// Entries of a row, in their order, and their numbers.
struct Entries {
    std::vector<float> log, weight;
    std::vector<int32_t> ids;

    // Takes those among which `keep_largest` finds all that it keeps: where the highest of every STRIDE-th entry alone are
    // enough, nothing below them is kept. False if they are not: any may be kept then. n is a multiple of SUMMED.
    bool take(const float* from, const float* weight_of, int64_t n, int64_t most, double wanted) {
        static thread_local std::vector<int32_t> bins;
        float highest[STRIDE], own[STRIDE];
        const int64_t stride = std::min(n, STRIDE);
        std::copy(from, from + stride, highest);
        for (int64_t first = stride; first < n; first += stride)
            for (int64_t i = 0; i < std::min(stride, n - first); i += W)
                store(highest + i, larger(load<Vf>(from + first + i), load<Vf>(highest + i)));
        for (int64_t i = 0; i < stride; i += W) store(own + i, weights(load<Vf>(highest + i)));
        int64_t count;
        double mass;
        const int32_t last = find_bins(highest, own, stride, most, wanted, bins, count, mass);
        if (last == BINS - 1) return false;
        log.clear();
        weight.clear();
        ids.clear();
        const float end = (float)(last + 1);
        for (int64_t i = 0; i < n; i += W) {
            if (!any_lane(load<Vf>(from + i) * splat(-BINS_PER_NAT) < splat(end))) continue;
            for (int64_t j = i; j < i + W; j++) {
                if (!(from[j] * -BINS_PER_NAT < end)) continue;
                log.push_back(from[j]);
                weight.push_back(weight_of[j]);
                ids.push_back((int32_t)j);
            }
        }
        log.resize(round_up((int64_t)ids.size(), SUMMED), -__builtin_inff());
        weight.resize(log.size(), 0.0f);
        return true;
    }
};

// Weight of each SUMMED entries, and of all.
double sum_up(const float* weight, int64_t n, std::vector<double>& sums) {
    sums.clear();
    double total = 0.0;
    for (int64_t first = 0; first < n; first += SUMMED) {
        Vf sum = {};
        for (int64_t i = first; i < first + SUMMED; i += W) sum += load<Vf>(weight + i);
        sums.push_back((double)sum_lanes(sum));
        total += sums.back();
    }
    return total;
}

// The first entry whose cumulative weight is above `uniform` of all.
int64_t draw_one(const float* weight, int64_t n, double uniform) {
    static thread_local std::vector<double> sums;
    const double target = uniform * sum_up(weight, n, sums);
    double before = 0.0;
    int64_t block = 0;
    while (block + 1 < (int64_t)sums.size() && before + sums[block] <= target) before += sums[block++];
    for (int64_t i = block * SUMMED; i < n; i++) {
        before += weight[i];
        if (before > target && weight[i] > 0.0f) return i;
    }
    // Rounding stepped past the last one with a weight.
    for (int64_t i = n - 1; i > 0; i--)
        if (weight[i] > 0.0f) return i;
    return 0;
}

int32_t draw(const float* x, int64_t n, float highest, const RexDraw& how) {
    static thread_local Entries all, few;
    static thread_local std::vector<double> sums;
    int64_t size = round_up(n, SUMMED);
    all.log.resize(size);
    all.weight.resize(size);
    std::copy(x, x + n, all.log.begin());
    std::fill(all.log.begin() + n, all.log.end(), -__builtin_inff());
    const float temperature = std::max((float)how.temperature, LEAST_TEMPERATURE);
    const Vf most = splat(highest), inverse = splat(1.0f / temperature);
    for (int64_t i = 0; i < size; i += W) {
        const Vf scaled = (load<Vf>(&all.log[i]) - most) * inverse;
        store(&all.log[i], scaled);
        store(&all.weight[i], weights(scaled));
    }
    Entries* left = &all;
    const bool has_top_k = how.top_k > 0 && how.top_k < n;
    if (has_top_k || how.top_p < 1.0) {
        int64_t top_k = has_top_k ? (int64_t)how.top_k : size;
        double wanted = has_top_k ? __builtin_inf() : how.top_p * sum_up(all.weight.data(), size, sums);
        if (few.take(all.log.data(), all.weight.data(), size, top_k, wanted)) {
            left = &few;
            size = (int64_t)few.log.size();
        }
        keep_largest(left->log.data(), left->weight.data(), size, top_k, wanted);
        if (has_top_k && how.top_p < 1.0) {
            wanted = how.top_p * sum_up(left->weight.data(), size, sums);
            keep_largest(left->log.data(), left->weight.data(), size, size, wanted);
        }
    }
    if (how.min_p > 0.0)
        for (float& weight : left->weight)
            if (weight < (float)how.min_p) weight = 0.0f;
    const int64_t drawn = draw_one(left->weight.data(), size, how.uniform);
    return left == &few ? few.ids[drawn] : (int32_t)drawn;
}

}  // namespace
