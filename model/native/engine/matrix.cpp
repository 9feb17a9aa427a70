#include "matrix.h"

#include <cstring>

namespace rex {

Matrix::Matrix(int32_t dtype, int64_t n, int64_t k, bool unsigned_weights)
    : dtype_(dtype), unsigned_(dtype == REX_INT8 && unsigned_weights), k_(round_up(k, ROW_UNIT)),
      panels_((n + PANEL - 1) / PANEL), data_(panels_ * k_ * PANEL * 4 / inputs()) {
    if (dtype == REX_INT8) {
        scale_ = Lines<float>(panels_ * PANEL);
        if (unsigned_) std::memset(data_.data(), 128, (size_t)data_.count());
    }
    if (dtype == REX_INT4) group_scale_ = Lines<uint16_t>(panels_ * (k_ / GROUP) * PANEL);
}

// Offset of an element, in elements.
int64_t Matrix::place(int64_t output, int64_t input) const {
    const int64_t g = inputs();
    return (output / PANEL * (k_ / g) + input / g) * PANEL * g + output % PANEL * g + input % g;
}

void Matrix::set(int64_t output, int64_t input, const RexMatrix& from, int64_t row, int64_t from_k, int64_t from_input, int64_t count) {
    if (dtype_ == REX_INT4) return set_int4(output, input, from, row * from_k + from_input, count);
    for (int64_t i = 0; i < count; i++) {
        const int64_t to = place(output, input + i), at = row * from_k + from_input + i;
        if (dtype_ == REX_FLOAT32)
            ((float*)data_.data())[to] = ((const float*)from.data)[at];
        else if (dtype_ == REX_BFLOAT16)
            ((uint16_t*)data_.data())[to] = ((const uint16_t*)from.data)[at];
        else
            data_.data()[to] = (uint8_t)(((const int8_t*)from.data)[at] + (unsigned_ ? 128 : 0));
    }
    if (dtype_ == REX_INT8) scale_.data()[output] = ((const float*)from.scale)[row];
}

// `at`: the first element's offset in `from`; like `input` and `count`, a multiple of 16.
void Matrix::set_int4(int64_t output, int64_t input, const RexMatrix& from, int64_t at, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t to = input + i, line = output / PANEL * (k_ / 8) + to / 8;
        const int value = ((const uint8_t*)from.data)[(at + i) / 2] >> ((at + i) % 2 * 4) & 15;
        data_.data()[(line * PANEL + output % PANEL) * 4 + to % 4] |= (uint8_t)(value << (to % 8 / 4 * 4));
        group_scale_.data()[(output / PANEL * (k_ / GROUP) + to / GROUP) * PANEL + output % PANEL] =
            ((const uint16_t*)from.scale)[(at + i) / GROUP];
    }
}

void Matrix::row(int64_t output, int64_t count, float* to) const {
    const float scale = dtype_ == REX_INT8 ? scale_.data()[output] : 1.0f;
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = place(output, i);
        if (dtype_ == REX_FLOAT32) {
            to[i] = ((const float*)data_.data())[at];
        } else if (dtype_ == REX_BFLOAT16) {
            const uint32_t bits = (uint32_t)((const uint16_t*)data_.data())[at] << 16;
            std::memcpy(to + i, &bits, 4);
        } else {
            to[i] = (float)((int)data_.data()[at] - (unsigned_ ? 128 : (data_.data()[at] >= 128 ? 256 : 0))) * scale;
        }
    }
}

Product Matrix::product() const {
    Product product = {};
    product.panels = data_.data();
    product.scale = scale_.data();
    product.group_scale = group_scale_.data();
    product.k = k_;
    return product;
}

}  // namespace rex
