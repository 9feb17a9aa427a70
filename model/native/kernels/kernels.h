// The kernels of one instruction set, as a table of functions.
//
// Rows of activations are float32, zero-padded to a stride that is a multiple of ROW_UNIT, so kernels need no tail
// loops. Each row's summation order does not depend on the other rows of a call, nor on how a product is divided among
// threads.
#pragma once
#include <cstddef>
#include <cstdint>

#include "rex_native.h"

namespace rex {

constexpr int ROW_UNIT = 64;  // rows are padded to a multiple of this
constexpr int PANEL = 16;     // outputs of a matrix that are stored together
constexpr int PAGE = 64;      // positions of a page of the cache
constexpr int BLOCK = 16;     // positions whose keys are stored together
constexpr int GROUP = 32;     // inputs of an int4 matrix that share a scale
constexpr int TILE_ROWS = 32; // activations of matrix kernels are padded to this many rows

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Quantized activations: x = q * scale. sum: of q over the row.
struct QuantizedRows {
    int8_t* q;  // (rows, stride)
    float* scale;
    int32_t* sum;
    int32_t* group_sum;  // (rows, stride / GROUP): of q over each group
    int64_t stride;
};

// Panels of a packed matrix with k inputs: each is (k / g) lines of PANEL outputs by g inputs, a line being 64 bytes:
// g = 1 for float32, 2 for bfloat16, 4 for int8 (offset by 128 if the instructions take unsigned bytes). For int4, g = 8:
// the low bits of a line are the first four inputs, the high bits the other four.
struct Product {
    const uint8_t* panels;
    const float* scale;  // int8: one for each output
    const uint16_t* group_scale;  // int4: bfloat16, (panels, k / GROUP, PANEL)
    int64_t k;           // padded to a multiple of ROW_UNIT
    const float* x;      // float32 and bfloat16: (rows, x_stride)
    int64_t x_stride;
    QuantizedRows xq;  // int8 and int4
    int64_t rows;
    float* y;  // (rows, y_stride)
    int64_t y_stride;
};

// One call of attention: `queries` rows (heads of a group, and neighboring tokens) over the keys of one slot's head.
struct Attention {
    const float* const* q;  // each query, scaled by log2(e) / sqrt(head_dim)
    const int32_t* seen;  // number of positions that each query sees
    int32_t queries, head_dim;
    uint8_t* const* pages;
    int64_t offset;  // offset of this layer and head in a page
    float* scores;   // buffer for four rows of positions, padded to PAGE
    float* const* out;
};

typedef void (*ProductKernel)(const Product&, int64_t first_panel, int64_t last_panel);

struct Kernels {
    const char* name;
    bool unsigned_weights;
    ProductKernel product_f32, product_bf16, product_int8, product_int4;
    void (*attend_f32)(const Attention&);
    void (*attend_bf16)(const Attention&);
    // out = x / rms(x) * weight; n elements.
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, int64_t stride, float* out);
    // x = x / rms(x) * weight for one head; n elements, stride a multiple of BLOCK.
    void (*head_norm)(float* x, const float* weight, float eps, int64_t n, int64_t stride);
    void (*add)(float* x, const float* branch, int64_t stride);
    void (*quantize)(const float* x, int64_t stride, float levels, int8_t* q, float* scale, int32_t* sum);
    void (*sum_groups)(const int8_t* q, int64_t stride, int32_t* group_sum);
    // out[i] = silu(gate[i]) * up[i]; y has alternating panels of gate and up.
    void (*swiglu)(const float* y, int64_t panels, float* out);
    // Turns the first rotary_dim numbers of a head; cos and sin have half as many.
    void (*rotate)(float* x, const float* cos, const float* sin, int32_t rotary_dim);
    void (*store_f32)(const float* key, const float* value, int32_t head_dim, int64_t head_stride, uint8_t* page, int32_t at);
    void (*store_bf16)(const float* key, const float* value, int32_t head_dim, int64_t head_stride, uint8_t* page, int32_t at);
    // The first index of the highest value, and that value; NaN if any is NaN.
    int32_t (*arg_max)(const float* x, int64_t n, float* highest);
    // A sample; highest: the highest value, finite.
    int32_t (*draw)(const float* x, int64_t n, float highest, const RexDraw& how);
};

// Only the instruction sets that the compiler supported are defined; library.cpp checks HAS_... macros.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* dotprod_kernels();

}  // namespace rex
