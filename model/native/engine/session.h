// Forward pass over segments of many slots: embedding, layers, logits.
#pragma once
#include <vector>

#include "cache.h"
#include "model.h"
#include "sharing.h"
#include "threads.h"

namespace rex {

// A token of the pass.
struct Row {
    int64_t id;
    int32_t slot, position;
    bool is_wanted;  // whether its logits, or its hidden state, are requested
};

// Outputs of the requested rows; logits may be null. draws: how to choose each row's token; null: the highest logit.
// hidden, if not null: their hidden states, instead of the other outputs.
struct Outputs {
    const RexDraw* draws;
    float* logits;
    int32_t* chosen;
    float* highest;
    float* hidden;
};

class Session {
public:
    Session(const Model& model, int slots, bool cache_in_bf16, int64_t cache_tokens, int threads,
            int64_t shared_from);

    // Rows of a slot are neighbors, in the order of their positions.
    void step(const std::vector<Row>& rows, Outputs out);
    Cache cache;

private:
    // Neighboring tokens of a slot and one key/value head: these queries share the reads of keys and values.
    struct Task {
        int64_t row;
        int32_t tokens, group;
    };

    void pass(const Row* rows, int64_t count, Outputs& out);
    void grow(int64_t rows);
    void embed(const Row* rows, int64_t count);
    void write_cache(const Row* rows, int64_t count, int64_t layer);
    void attend(const std::vector<Row>& rows, int64_t layer);
    void choose(int64_t count, Outputs& out);
    void copy_hidden(int64_t count, Outputs& out);
    // y = x W^T, for int8 and int4 from the last quantization of x.
    void multiply(const Matrix& matrix, const Lines<float>& x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride);
    void multiply_swiglu(const Matrix& matrix, int64_t rows);
    template <class Work>
    void each_row(int64_t rows, int64_t width, const Work& work);
    template <class Work>
    void each_panels(const Matrix& matrix, int64_t rows, int64_t unit, const Work& work);
    Product product_of(const Matrix& matrix, const Lines<float>& x, int64_t x_stride, int64_t rows) const;
    void quantize(int64_t row, const float* x, int64_t stride);
    // Whether the matrix multiplies quantized activations.
    static bool is_quantized(const Matrix& matrix) { return matrix.dtype() == REX_INT8 || matrix.dtype() == REX_INT4; }
    ProductKernel kernel_of(const Matrix& matrix) const;
    // Threads that the pass may use.
    int64_t team() const { return is_shared_ ? threads_.count() : 1; }

    const Model& model_;
    const Kernels& kernels_;
    const RexConfig& config_;
    const Strides& strides_;
    bool cache_in_bf16_;
    Threads threads_;
    Sharing sharing_;
    bool is_shared_ = false;
    int64_t rows_ = 0, widest_ = 0;
    Lines<float> hidden_, normed_, qkv_, mixed_, branch_, gate_up_, inner_, logits_, scores_;
    Lines<int8_t> quantized_;
    Lines<float> quantized_scale_;
    Lines<int32_t> quantized_sum_, quantized_group_sum_;
    std::vector<Task> tasks_;
    std::vector<Row> kept_;
};

}  // namespace rex
