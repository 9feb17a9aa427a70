// Whether a pass is shared among threads.
//
// A small one is faster alone, a large one shared. Between the two it depends on what else runs on the cores, so both ways
// are timed: with two other programs on two cores, a pass over 8 tokens of 2.4 million parameters took 0.65 ms alone and
// 1.0 ms shared, and without them 0.54 and 0.45 ms.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

namespace rex {

class Sharing {
public:
    // from: work, weights times rows, that is never shared below; always from EITHER times that on.
    explicit Sharing(int64_t from) : from_(from) {}

    bool choose(int64_t work, int64_t rows) {
        if (work < from_) return false;
        if (work >= EITHER * from_) return true;
        Times& times = of(rows);
        times.passes++;
        const double alone = times.mean_s[0], shared = times.mean_s[1];
        if (!shared) return true;
        if (!alone) return false;
        const bool is_faster = shared <= alone;
        const double gain = is_faster ? alone / shared : shared / alone;
        return times.passes % (gain > CLEAR_GAIN ? SELDOM : OFTEN) ? is_faster : !is_faster;
    }

    void note(int64_t work, int64_t rows, bool is_shared, double seconds) {
        if (work < from_ || work >= EITHER * from_) return;
        double& mean_s = of(rows).mean_s[is_shared];
        // A pass that another program interrupts takes many times as long as the others.
        mean_s = mean_s ? mean_s + (std::min(seconds, 4 * mean_s) - mean_s) / 8 : seconds;
    }

private:
    static constexpr int64_t EITHER = 8;
    static constexpr double CLEAR_GAIN = 1.2;
    static constexpr uint32_t SELDOM = 256, OFTEN = 32;  // passes from one try of the slower way to the next

    struct Times {
        double mean_s[2] = {0, 0};  // alone, shared
        uint32_t passes = 0;
    };

    Times& of(int64_t rows) {
        size_t bits = 0;
        while (rows >> bits > 1) bits++;
        return of_rows_[std::min(bits, of_rows_.size() - 1)];
    }

    int64_t from_;
    std::array<Times, 16> of_rows_;  // by the power of two up to the rows
};

}  // namespace rex
