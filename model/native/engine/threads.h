// Thread pool of a session: divides one job after another into pieces.
//
// Pieces are claimed one by one, so that a preempted thread delays only its current piece. An idle thread spins for a
// short time, because the next job of a pass comes within microseconds, and then sleeps, to leave the core to other
// processes.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace rex {

class Threads {
public:
    explicit Threads(int count);
    ~Threads();

    int count() const { return (int)workers_.size() + 1; }

    // work(piece, thread) for each piece below `pieces`, at most 65,535; returns when all are done. The caller is thread 0
    // and works too.
    template <class Work>
    void share(int64_t pieces, const Work& work) {
        if (workers_.empty() || pieces <= 1) {
            for (int64_t piece = 0; piece < pieces; piece++) work(piece, 0);
            return;
        }
        const Call call = [](const void* shared, int64_t piece, int thread) {
            (*static_cast<const Work*>(shared))(piece, thread);
        };
        run((uint64_t)pieces, call, &work);
    }

private:
    typedef void (*Call)(const void* work, int64_t piece, int thread);

    void run(uint64_t pieces, Call call, const void* work);
    void work_on(uint64_t round, int thread);
    void loop(int thread);

    // Round (32 bits), pieces (16), next piece (16): one word, so that a claim applies to the right round.
    std::atomic<uint64_t> ticket_{0};
    std::atomic<uint64_t> done_{0};
    std::atomic<Call> call_{nullptr};
    std::atomic<const void*> work_{nullptr};
    std::atomic<bool> stopping_{false};
    std::atomic<int> sleeping_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<std::thread> workers_;
};

}  // namespace rex
