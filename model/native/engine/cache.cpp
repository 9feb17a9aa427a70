#include "cache.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace rex {

namespace {

constexpr int64_t LINE = 64;  // before each page: its reference count

}  // namespace

Cache::Cache(PageShape shape, int slots, int64_t most_tokens)
    : shape_(shape), most_pages_(most_tokens ? (most_tokens + PAGE - 1) / PAGE : INT64_MAX), tables_(slots) {}

void Cache::Free::operator()(uint8_t* memory) const { std::free(memory); }

int32_t& Cache::users(uint8_t* page) { return *reinterpret_cast<int32_t*>(page - LINE); }

uint8_t* Cache::take() {
    if (used_ == most_pages_) throw std::length_error("the cache of keys and values is full");
    if (free_.empty()) {
        const size_t bytes = (size_t)(LINE + shape_.bytes());
        std::unique_ptr<uint8_t, Free> memory((uint8_t*)std::aligned_alloc(LINE, bytes));
        if (!memory) throw std::bad_alloc();
        // A head's padding is multiplied by 0, and 0 * NaN is NaN.
        std::memset(memory.get(), 0, bytes);
        free_.reserve(memory_.size() + 1);  // so that releasing a page cannot fail
        memory_.push_back(std::move(memory));
        free_.push_back(memory_.back().get() + LINE);
    }
    uint8_t* page = free_.back();
    free_.pop_back();
    users(page) = 1;
    used_++;
    return page;
}

void Cache::leave(uint8_t* page) {
    if (--users(page)) return;
    free_.push_back(page);
    used_--;
}

void Cache::reserve(int slot, int64_t first, int64_t last) {
    auto& table = tables_[slot];
    for (int64_t i = first / PAGE; i * PAGE < last; i++) {
        if (i == (int64_t)table.size()) {
            table.reserve(i + 1);
            table.push_back(take());
        } else if (users(table[i]) > 1) {
            uint8_t* own = take();
            std::memcpy(own, table[i], shape_.bytes());
            leave(table[i]);
            table[i] = own;
        }
    }
}

void Cache::truncate(int slot, int64_t tokens) {
    auto& table = tables_[slot];
    while ((int64_t)table.size() * PAGE >= tokens + PAGE) {
        leave(table.back());
        table.pop_back();
    }
}

void Cache::copy_prefix(int source, int target, int64_t tokens) {
    if (source == target) return truncate(target, tokens);
    truncate(target, 0);
    const int64_t pages = (tokens + PAGE - 1) / PAGE;
    auto& table = tables_[target];
    table.reserve(pages);
    for (int64_t i = 0; i < pages; i++) {
        table.push_back(tables_[source][i]);
        users(table.back())++;
    }
}

}  // namespace rex
