// Keys and values in pages: a slot allocates a page when its text reaches it, and slots with a common prefix share
// pages.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace rex {

// Layout of a page: for each layer and head, keys and values of PAGE positions.
struct PageShape {
    int64_t layers, groups, head_stride, element_size;

    int64_t head_bytes() const { return 2 * PAGE * head_stride * element_size; }
    int64_t bytes() const { return layers * groups * head_bytes(); }
    int64_t offset(int64_t layer, int64_t group) const { return (layer * groups + group) * head_bytes(); }
};

class Cache {
public:
    // most_tokens: over all slots, 0 for no limit.
    Cache(PageShape shape, int slots, int64_t most_tokens);

    // Make positions first to last (exclusive) of a slot writable; the slot holds at least `first` positions already.
    // Throws std::bad_alloc, or std::length_error if the limit is reached; the slot is then unchanged.
    void reserve(int slot, int64_t first, int64_t last);
    void truncate(int slot, int64_t tokens);
    void copy_prefix(int source, int target, int64_t tokens);
    int64_t pages_of(int slot) const { return (int64_t)tables_[slot].size(); }
    uint8_t* const* pages(int slot) const { return tables_[slot].data(); }
    int64_t bytes() const { return used_ * shape_.bytes(); }
    int slots() const { return (int)tables_.size(); }
    const PageShape& shape() const { return shape_; }

private:
    struct Free {
        void operator()(uint8_t* memory) const;
    };

    uint8_t* take();
    void leave(uint8_t* page);
    static int32_t& users(uint8_t* page);

    PageShape shape_;
    int64_t most_pages_, used_ = 0;
    std::vector<std::unique_ptr<uint8_t, Free>> memory_;
    std::vector<uint8_t*> free_;
    std::vector<std::vector<uint8_t*>> tables_;
};

}  // namespace rex
