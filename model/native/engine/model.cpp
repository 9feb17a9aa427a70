#include "model.h"

#include <cstring>

namespace rex {

namespace {

Lines<float> copied(const float* from, int64_t count) {
    if (!from) return {};
    Lines<float> to(round_up(count, ROW_UNIT));
    std::memcpy(to.data(), from, (size_t)count * 4);
    return to;
}

Matrix packed(const RexMatrix& from, int64_t n, int64_t k, bool unsigned_weights) {
    Matrix matrix(from.dtype, n, k, unsigned_weights);
    for (int64_t row = 0; row < n; row++) matrix.set(row, 0, from, row, k, 0, k);
    return matrix;
}

// Queries, keys and values in one matrix; each head is padded to whole blocks.
Matrix packed_qkv(const RexLayer& layer, const RexConfig& c, int64_t head_stride, bool unsigned_weights) {
    Matrix matrix(layer.q.dtype, (c.heads + 2 * c.groups) * head_stride, c.hidden_size, unsigned_weights);
    int64_t to = 0;
    for (const RexMatrix* from : {&layer.q, &layer.k, &layer.v})
        for (int64_t head = 0; head < (from == &layer.q ? c.heads : c.groups); head++, to += head_stride)
            for (int64_t i = 0; i < c.head_dim; i++)
                matrix.set(to + i, 0, *from, head * c.head_dim + i, c.hidden_size, 0, c.hidden_size);
    return matrix;
}

Matrix packed_o(const RexMatrix& from, const RexConfig& c, int64_t head_stride, bool unsigned_weights) {
    Matrix matrix(from.dtype, c.hidden_size, c.heads * head_stride, unsigned_weights);
    for (int64_t row = 0; row < c.hidden_size; row++)
        for (int64_t head = 0; head < c.heads; head++)
            matrix.set(row, head * head_stride, from, row, c.heads * c.head_dim, head * c.head_dim, c.head_dim);
    return matrix;
}

// Alternating panels of gate and up, so that one thread computes both sides of an output.
Matrix packed_gate_up(const RexLayer& layer, const RexConfig& c, bool unsigned_weights) {
    Matrix matrix(layer.gate.dtype, 2 * round_up(c.intermediate_size, PANEL), c.hidden_size, unsigned_weights);
    for (int64_t row = 0; row < c.intermediate_size; row++) {
        const int64_t to = row / PANEL * 2 * PANEL + row % PANEL;
        matrix.set(to, 0, layer.gate, row, c.hidden_size, 0, c.hidden_size);
        matrix.set(to + PANEL, 0, layer.up, row, c.hidden_size, 0, c.hidden_size);
    }
    return matrix;
}

}  // namespace

Model::Model(const RexConfig& c, const RexWeights& weights, const Kernels& kernels)
    : config(c), kernels(kernels), is_tied(!weights.head.data) {
    const bool offset = kernels.unsigned_weights;
    strides.hidden = round_up(c.hidden_size, ROW_UNIT);
    strides.head = round_up(c.head_dim, BLOCK);
    strides.qkv = round_up((c.heads + 2 * c.groups) * strides.head, ROW_UNIT);
    strides.mixed = round_up(c.heads * strides.head, ROW_UNIT);
    strides.intermediate = round_up(c.intermediate_size, ROW_UNIT);
    strides.gate_up = 2 * strides.intermediate;
    strides.vocab = round_up(c.vocab_size, ROW_UNIT);
    embedding = packed(weights.embedding, c.vocab_size, c.hidden_size, offset);
    if (!is_tied) own_head = packed(weights.head, c.vocab_size, c.hidden_size, offset);
    for (int32_t i = 0; i < c.layers; i++) {
        const RexLayer& from = weights.layers[i];
        Layer layer;
        layer.qkv = packed_qkv(from, c, strides.head, offset);
        layer.o = packed_o(from.o, c, strides.head, offset);
        layer.gate_up = packed_gate_up(from, c, offset);
        layer.down = packed(from.down, c.hidden_size, c.intermediate_size, offset);
        layer.input_norm = copied(from.input_norm, c.hidden_size);
        layer.post_attention_norm = copied(from.post_attention_norm, c.hidden_size);
        layer.attention_branch_norm = copied(from.attention_branch_norm, c.hidden_size);
        layer.mlp_branch_norm = copied(from.mlp_branch_norm, c.hidden_size);
        layer.query_norm = copied(from.query_norm, c.head_dim);
        layer.key_norm = copied(from.key_norm, c.head_dim);
        for (const Matrix* matrix : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
            has_int4 = has_int4 || matrix->dtype() == REX_INT4;
        layers.push_back(std::move(layer));
    }
    final_norm = copied(weights.final_norm, c.hidden_size);
    cos = copied(weights.cos, (int64_t)c.context_length * (c.rotary_dim / 2));
    sin = copied(weights.sin, (int64_t)c.context_length * (c.rotary_dim / 2));
}

int64_t Model::bytes() const {
    int64_t total = embedding.bytes() + own_head.bytes() + 4 * (final_norm.count() + cos.count() + sin.count());
    for (const Layer& layer : layers)
        total += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
    return total;
}

}  // namespace rex
