#include "threads.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rex {

namespace {

constexpr auto SPIN = std::chrono::microseconds(60);  // waking a thread takes about as long

void breathe() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Threads::Threads(int count) {
    for (int i = 1; i < count; i++) workers_.emplace_back([this, i] { loop(i); });
}

Threads::~Threads() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    changed_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Threads::run(uint64_t pieces, Call call, const void* work) {
    const uint64_t round = (ticket_.load() >> 32) + 1;
    call_ = call;
    work_ = work;
    done_ = 0;
    ticket_ = round << 32 | pieces << 16;
    if (sleeping_ > 0) {
        { std::lock_guard<std::mutex> lock(mutex_); }  // a thread that has seen the old round is asleep after this
        changed_.notify_all();
    }
    work_on(round & 0xffffffff, 0);
    for (int tries = 0; done_.load() < pieces; tries++)
        if (tries < 2000)
            breathe();
        else
            std::this_thread::yield();
}

void Threads::work_on(uint64_t round, int thread) {
    uint64_t ticket = ticket_.load();
    while (ticket >> 32 == round && (ticket & 0xffff) < (ticket >> 16 & 0xffff)) {
        const Call call = call_.load();
        const void* work = work_.load();
        if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
        call(work, (int64_t)(ticket & 0xffff), thread);
        done_++;
        ticket = ticket_.load();
    }
}

void Threads::loop(int thread) {
    uint64_t seen = 0;
    while (!stopping_) {
        const auto until = std::chrono::steady_clock::now() + SPIN;
        uint64_t round = ticket_.load() >> 32;
        for (int tries = 1; round == seen && !stopping_; tries++) {
            breathe();
            round = ticket_.load() >> 32;
            if (tries % 64 == 0 && std::chrono::steady_clock::now() > until) break;
        }
        if (round == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_++;
            changed_.wait(lock, [&] { return stopping_ || ticket_.load() >> 32 != seen; });
            sleeping_--;
            round = ticket_.load() >> 32;
        }
        seen = round;
        work_on(round, thread);
    }
}

}  // namespace rex
