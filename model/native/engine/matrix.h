// A matrix packed into panels for the kernels, and packing of a model's weights.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"
#include "rex_native.h"

namespace rex {

struct FreeMemory {
    void operator()(void* memory) const { std::free(memory); }
};

// A zeroed buffer aligned to a cache line; the padding of a row stays zero.
template <class T>
class Lines {
public:
    Lines() = default;
    explicit Lines(int64_t count) : count_(count) {
        const size_t bytes = (size_t)round_up(count * (int64_t)sizeof(T) + 64, 64);
        memory_.reset((T*)std::aligned_alloc(64, bytes));
        if (!memory_) throw std::bad_alloc();
        __builtin_memset(memory_.get(), 0, bytes);
    }
    T* data() const { return memory_.get(); }
    int64_t count() const { return count_; }
    // Grow to at least `count` elements; new elements are zero.
    void grow(int64_t count) {
        if (count > count_) *this = Lines(count);
    }

private:
    std::unique_ptr<T, FreeMemory> memory_;
    int64_t count_ = 0;
};

class Matrix {
public:
    Matrix() = default;
    // n outputs and k inputs, both zero-padded.
    Matrix(int32_t dtype, int64_t n, int64_t k, bool unsigned_weights);

    // Copy row `row` of `from`, which has `k` elements, to output `output`, starting at input `input`.
    void set(int64_t output, int64_t input, const RexMatrix& from, int64_t row, int64_t from_k, int64_t from_input, int64_t count);
    // Output `output` as float32, `count` elements; not of int4.
    void row(int64_t output, int64_t count, float* to) const;
    Product product() const;
    int64_t panels() const { return panels_; }
    int64_t bytes() const { return data_.count() + scale_.count() * 4 + group_scale_.count() * 2; }
    int64_t line_count() const { return k_ / inputs(); }
    int32_t dtype() const { return dtype_; }
    int64_t k() const { return k_; }

private:
    // Inputs of a line.
    int64_t inputs() const { return dtype_ == REX_INT4 ? 8 : dtype_ == REX_INT8 ? 4 : dtype_ == REX_BFLOAT16 ? 2 : 1; }
    void set_int4(int64_t output, int64_t input, const RexMatrix& from, int64_t at, int64_t count);
    int64_t place(int64_t output, int64_t input) const;

    int32_t dtype_ = REX_FLOAT32;
    bool unsigned_ = false;
    int64_t k_ = 0, panels_ = 0;
    Lines<uint8_t> data_;
    Lines<float> scale_;
    Lines<uint16_t> group_scale_;
};

}  // namespace rex
