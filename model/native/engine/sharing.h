// Whether a pass is shared among threads.
//
// A small one is faster alone, a large one shared. Between the two it depends on what else runs on the cores, so both ways
// are timed: with two other programs on two cores, a pass over 8 tokens of 2.4 million parameters took 0.65 ms alone and
// 1.0 ms shared, and without them 0.54 and 0.45 ms; over one token, alone 0.40 ms and shared 0.24 ms in float32. The slower way is tried again from time to time, for a few passes in a
// row: the first shared one has to wake the threads, and the first of all reads the weights from memory.
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
        const double other_s = times.mean_s[!times.is_shared], mean_s = times.mean_s[times.is_shared];
        if (times.passes >= TRIAL) {
            const bool is_clear = std::max(mean_s, other_s) > CLEAR_GAIN * std::min(mean_s, other_s);
            const bool is_due = times.passes >= std::min(times.patience, is_clear ? SELDOM : OFTEN);
            if (is_due) times.patience = std::min(2 * times.patience, SELDOM);
            if (is_due || other_s < mean_s) {
                times.is_shared = !times.is_shared;
                times.passes = 0;
            }
        }
        times.passes++;
        return times.is_shared;
    }

    void note(int64_t work, int64_t rows, bool is_shared, double seconds) {
        if (work < from_ || work >= EITHER * from_) return;
        Times& times = of(rows);
        if (is_shared != times.is_shared || times.passes <= WARMING) return;
        double& mean_s = times.mean_s[is_shared];
        if (times.passes <= TRIAL) {
            auto& trial = times.trial_s;
            trial[times.passes - WARMING - 1] = seconds;
            if (times.passes < TRIAL) return;
            std::sort(trial.begin(), trial.end());
            mean_s = trial[trial.size() / 2];
            return;
        }
        // A pass that another program interrupts takes many times as long as the others.
        mean_s += (std::min(seconds, 4 * mean_s) - mean_s) / 8;
    }

private:
    static constexpr int64_t EITHER = 80;
    static constexpr double CLEAR_GAIN = 1.2;
    // Passes from one trial of the slower way to the next; at first a few, as another program may have disturbed a trial.
    static constexpr uint32_t FIRST = 16, OFTEN = 128, SELDOM = 512;
    static constexpr uint32_t WARMING = 1, TRIAL = 4;     // passes of a trial, and of them those that do not count

    struct Times {
        double mean_s[2] = {0, 0};  // alone, shared
        bool is_shared = true;
        uint32_t passes = 0;  // in a row, in this way
        uint32_t patience = FIRST;
        std::array<double, TRIAL - WARMING> trial_s = {};
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
