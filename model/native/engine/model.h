// A model's weights in the layout of the kernels.
#pragma once
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "rex_native.h"

namespace rex {

struct Layer {
    Matrix qkv, o, gate_up, down;
    Lines<float> input_norm, post_attention_norm, attention_branch_norm, mlp_branch_norm, query_norm, key_norm;
};

// Padded row sizes.
struct Strides {
    int64_t hidden, head, qkv, mixed, intermediate, gate_up, vocab;
};

struct Model {
    Model(const RexConfig& config, const RexWeights& weights, const Kernels& kernels);

    int64_t bytes() const;
    // Numbers that a row is multiplied with.
    int64_t weights() const {
        const int64_t layer = strides.hidden * (strides.qkv + strides.mixed + strides.gate_up + strides.intermediate);
        return config.layers * layer + strides.hidden * config.vocab_size;
    }
    const Matrix& head() const { return is_tied ? embedding : own_head; }

    RexConfig config;
    const Kernels& kernels;
    Strides strides;
    bool is_tied, has_int4 = false;
    Matrix embedding, own_head;
    std::vector<Layer> layers;
    Lines<float> final_norm, cos, sin;
};

// The kernels for one of RexInstructions; null if the CPU or this build lacks them.
const Kernels* find_kernels(int32_t instructions);

}  // namespace rex
