#include "session.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace rex {

namespace {

constexpr int64_t MAX_ROWS = 512;          // per chunk: a longer pass is divided, which bounds the buffers
constexpr int32_t QUERIES = 8;             // of one text that read its keys and values together
constexpr int64_t SHARED_FROM_BYTES = 96 << 10;  // weight bytes times rows: less runs on one thread
constexpr int64_t SHARED_FROM_POSITIONS = 256;   // attention positions per task: fewer are not shared among threads
constexpr int64_t SHARED_FROM_NUMBERS = 16 << 10;  // of norms, quantization and choice of tokens: fewer are not shared

}  // namespace

Session::Session(const Model& model, int slots, bool cache_in_bf16, int64_t cache_tokens, int threads, int64_t shared_from)
    : cache({model.config.layers, model.config.groups, model.strides.head, cache_in_bf16 ? 2 : 4}, slots, cache_tokens),
      model_(model), kernels_(model.kernels), config_(model.config), strides_(model.strides),
      cache_in_bf16_(cache_in_bf16), threads_(threads), sharing_(shared_from),
      widest_(std::max({strides_.hidden, strides_.mixed, strides_.intermediate})),
      scores_(threads * QUERIES * round_up(model.config.context_length, PAGE)) {}

void Session::grow(int64_t rows) {
    if (rows <= rows_) return;
    rows = round_up(rows, TILE_ROWS);
    hidden_ = Lines<float>(rows * strides_.hidden);
    normed_ = Lines<float>(rows * strides_.hidden);
    qkv_ = Lines<float>(rows * strides_.qkv);
    mixed_ = Lines<float>(rows * strides_.mixed);
    branch_ = Lines<float>(rows * strides_.hidden);
    gate_up_ = Lines<float>(rows * strides_.gate_up);
    inner_ = Lines<float>(rows * strides_.intermediate);
    quantized_ = Lines<int8_t>(rows * widest_);
    quantized_scale_ = Lines<float>(rows);
    quantized_sum_ = Lines<int32_t>(rows);
    quantized_group_sum_ = Lines<int32_t>(rows * widest_ / GROUP);
    rows_ = rows;
}

template <class Work>
void Session::each_row(int64_t rows, int64_t width, const Work& work) {
    if (rows * width < SHARED_FROM_NUMBERS || rows < 2 || team() == 1) {
        for (int64_t row = 0; row < rows; row++) work(row);
        return;
    }
    const int64_t pieces = std::min<int64_t>(rows / 2, 4 * team());
    threads_.share(pieces, [&](int64_t piece, int) {
        for (int64_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; row++) work(row);
    });
}

template <class Work>
void Session::each_panels(const Matrix& matrix, int64_t rows, int64_t unit, const Work& work) {
    const int64_t units = (matrix.panels() + unit - 1) / unit;
    const bool is_small = matrix.bytes() * rows < SHARED_FROM_BYTES;
    const int64_t pieces = is_small || team() == 1 ? 1 : std::min<int64_t>(units, 4 * team());
    threads_.share(pieces, [&](int64_t piece, int) {
        work(units * piece / pieces * unit, std::min(units * (piece + 1) / pieces * unit, matrix.panels()));
    });
}

Product Session::product_of(const Matrix& matrix, const Lines<float>& x, int64_t x_stride, int64_t rows) const {
    Product product = matrix.product();
    product.x = x.data();
    product.x_stride = x_stride;
    product.xq = {quantized_.data(), quantized_scale_.data(), quantized_sum_.data(), quantized_group_sum_.data(), x_stride};
    product.rows = rows;
    return product;
}

ProductKernel Session::kernel_of(const Matrix& matrix) const {
    switch (matrix.dtype()) {
        case REX_INT4: return kernels_.product_int4;
        case REX_INT8: return kernels_.product_int8;
        case REX_BFLOAT16: return kernels_.product_bf16;
        default: return kernels_.product_f32;
    }
}

void Session::multiply(const Matrix& matrix, const Lines<float>& x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride) {
    Product product = product_of(matrix, x, x_stride, rows);
    product.y = y;
    product.y_stride = y_stride;
    const auto kernel = kernel_of(matrix);
    each_panels(matrix, rows, 8, [&](int64_t first, int64_t last) { kernel(product, first, last); });
}

void Session::multiply_swiglu(const Matrix& matrix, int64_t rows) {
    Product product = product_of(matrix, normed_, strides_.hidden, rows);
    product.y = gate_up_.data();
    product.y_stride = strides_.gate_up;
    const auto kernel = kernel_of(matrix);
    each_panels(matrix, rows, 8, [&](int64_t first, int64_t last) {
        kernel(product, first, last);
        for (int64_t row = 0; row < rows; row++)
            kernels_.swiglu(gate_up_.data() + row * strides_.gate_up + first * PANEL, (last - first) / 2,
                            inner_.data() + row * strides_.intermediate + first / 2 * PANEL);
    });
}

void Session::quantize(int64_t row, const float* x, int64_t stride) {
    kernels_.quantize(x, stride, (float)config_.activation_levels, quantized_.data() + row * stride,
                      quantized_scale_.data() + row, quantized_sum_.data() + row);
    if (model_.has_int4)
        kernels_.sum_groups(quantized_.data() + row * stride, stride, quantized_group_sum_.data() + row * (stride / GROUP));
}

void Session::embed(const Row* rows, int64_t count) {
    each_row(count, strides_.hidden, [&](int64_t row) {
        float* x = hidden_.data() + row * strides_.hidden;
        model_.embedding.row(rows[row].id, config_.hidden_size, x);
        // The padding of a row may be NaN, left over from an earlier row.
        std::fill(x + config_.hidden_size, x + strides_.hidden, 0.0f);
    });
}

void Session::write_cache(const Row* rows, int64_t count, int64_t layer) {
    const int64_t half = config_.rotary_dim / 2, heads = config_.heads, groups = config_.groups;
    const auto write = cache_in_bf16_ ? kernels_.store_bf16 : kernels_.store_f32;
    // Weights of attention are powers of two: log2(e) is in the queries.
    const float scaling = 1.44269504f / __builtin_sqrtf((float)config_.head_dim);
    const float *query_norm = model_.layers[layer].query_norm.data(), *key_norm = model_.layers[layer].key_norm.data();
    each_row(count, strides_.qkv, [&](int64_t row) {
        float* head = qkv_.data() + row * strides_.qkv;
        const int32_t position = rows[row].position;
        const float *cos = model_.cos.data() + position * half, *sin = model_.sin.data() + position * half;
        for (int64_t i = 0; i < heads + groups; i++) {
            float* x = head + i * strides_.head;
            if (query_norm) kernels_.head_norm(x, i < heads ? query_norm : key_norm, config_.eps, config_.head_dim, strides_.head);
            kernels_.rotate(x, cos, sin, config_.rotary_dim);
        }
        for (int64_t i = 0; i < heads * strides_.head; i++) head[i] *= scaling;
        uint8_t* page = cache.pages(rows[row].slot)[position / PAGE];
        for (int64_t group = 0; group < groups; group++)
            write(head + (heads + group) * strides_.head, head + (heads + groups + group) * strides_.head,
                  config_.head_dim, strides_.head, page + cache.shape().offset(layer, group), position % PAGE);
    });
}

void Session::attend(const std::vector<Row>& rows, int64_t layer) {
    const int32_t group_heads = config_.heads / config_.groups;
    const int32_t most_tokens = std::max(1, QUERIES / group_heads);
    tasks_.clear();
    int64_t positions = 0;
    for (int64_t row = 0; row < (int64_t)rows.size();) {
        int32_t tokens = 1;
        while (tokens < most_tokens && row + tokens < (int64_t)rows.size() && rows[row + tokens].slot == rows[row].slot) tokens++;
        for (int32_t group = 0; group < config_.groups; group++) tasks_.push_back({row, tokens, group});
        positions += (int64_t)config_.groups * (rows[row].position + tokens);
        row += tokens;
    }
    const auto kernel = cache_in_bf16_ ? kernels_.attend_bf16 : kernels_.attend_f32;
    const int64_t count = (int64_t)tasks_.size();
    const bool is_small = positions < SHARED_FROM_POSITIONS || team() == 1;
    const int64_t pieces = is_small ? 1 : std::min<int64_t>(count, 16 * team());
    threads_.share(pieces, [&](int64_t piece, int thread) {
        // A task's queries are ordered by token; the heads of a group are adjacent.
        std::vector<int32_t> seen(group_heads * most_tokens);
        std::vector<float*> out(group_heads * most_tokens);
        std::vector<const float*> q(group_heads * most_tokens);
        for (int64_t i = count * piece / pieces; i < count * (piece + 1) / pieces; i++) {
            const Task& task = tasks_[i];
            for (int32_t token = 0; token < task.tokens; token++)
                for (int32_t head = 0; head < group_heads; head++) {
                    const int64_t at = token * group_heads + head, row = task.row + token;
                    const int64_t offset = (task.group * group_heads + head) * strides_.head;
                    seen[at] = rows[row].position + 1;
                    q[at] = qkv_.data() + row * strides_.qkv + offset;
                    out[at] = mixed_.data() + row * strides_.mixed + offset;
                }
            Attention attention;
            attention.q = q.data();
            attention.seen = seen.data();
            attention.queries = task.tokens * group_heads;
            attention.head_dim = config_.head_dim;
            attention.pages = cache.pages(rows[task.row].slot);
            attention.offset = cache.shape().offset(layer, task.group);
            attention.scores = scores_.data() + thread * QUERIES * round_up(config_.context_length, PAGE);
            attention.out = out.data();
            kernel(attention);
        }
    });
}

// Final norm of the first `count` rows of hidden_.
void Session::copy_hidden(int64_t count, Outputs& out) {
    each_row(count, strides_.hidden, [&](int64_t row) {
        float* normed = normed_.data() + row * strides_.hidden;
        kernels_.rms_norm(hidden_.data() + row * strides_.hidden, model_.final_norm.data(), config_.eps,
                          config_.hidden_size, strides_.hidden, normed);
        std::memcpy(out.hidden + row * config_.hidden_size, normed, (size_t)config_.hidden_size * 4);
    });
    out.hidden += count * config_.hidden_size;
}

// Logits of the first `count` rows of hidden_.
void Session::choose(int64_t count, Outputs& out) {
    const Matrix& head = model_.head();
    each_row(count, strides_.hidden, [&](int64_t row) {
        float* normed = normed_.data() + row * strides_.hidden;
        kernels_.rms_norm(hidden_.data() + row * strides_.hidden, model_.final_norm.data(), config_.eps,
                          config_.hidden_size, strides_.hidden, normed);
        if (is_quantized(head)) quantize(row, normed, strides_.hidden);
    });
    const bool is_direct = out.logits && config_.vocab_size % PANEL == 0;
    const int64_t stride = is_direct ? config_.vocab_size : strides_.vocab;
    if (!is_direct) logits_.grow(count * stride);
    float* logits = is_direct ? out.logits : logits_.data();
    multiply(head, normed_, strides_.hidden, count, logits, stride);
    each_row(count, config_.vocab_size, [&](int64_t row) {
        const float* own = logits + row * stride;
        out.chosen[row] = kernels_.arg_max(own, config_.vocab_size, out.highest + row);
        if (out.draws && out.draws[row].temperature > 0 && std::isfinite(out.highest[row]))
            out.chosen[row] = kernels_.draw(own, config_.vocab_size, out.highest[row], out.draws[row]);
        if (out.logits && !is_direct)
            std::memcpy(out.logits + row * config_.vocab_size, own, (size_t)config_.vocab_size * 4);
    });
    if (out.logits) out.logits += count * config_.vocab_size;
    if (out.draws) out.draws += count;
    out.chosen += count;
    out.highest += count;
}

void Session::pass(const Row* rows, int64_t count, Outputs& out) {
    grow(count);
    embed(rows, count);
    const int64_t hidden = strides_.hidden;
    std::vector<Row> all(rows, rows + count);
    kept_.clear();
    for (const Row& row : all)
        if (row.is_wanted) kept_.push_back(row);
    // x += norm(branch), then the norm and the quantized input of the next product.
    const auto add_branch = [&](int64_t row, const Lines<float>& weight) {
        const float* branch = branch_.data() + row * hidden;
        float* normed = normed_.data() + row * hidden;
        if (weight.data()) kernels_.rms_norm(branch, weight.data(), config_.eps, config_.hidden_size, hidden, normed);
        kernels_.add(hidden_.data() + row * hidden, weight.data() ? normed : branch, hidden);
    };
    const auto enter_branch = [&](int64_t row, const Lines<float>& weight, const Matrix& next) {
        float* normed = normed_.data() + row * hidden;
        kernels_.rms_norm(hidden_.data() + row * hidden, weight.data(), config_.eps, config_.hidden_size, hidden, normed);
        if (is_quantized(next)) quantize(row, normed, hidden);
    };
    const std::vector<Row>* asking = &all;
    for (int64_t i = 0; i < config_.layers; i++) {
        const Layer& layer = model_.layers[i];
        each_row(count, hidden, [&](int64_t row) {
            if (i) add_branch(row, model_.layers[i - 1].mlp_branch_norm);
            enter_branch(row, layer.input_norm, layer.qkv);
        });
        multiply(layer.qkv, normed_, hidden, count, qkv_.data(), strides_.qkv);
        write_cache(rows, count, i);
        if (i == config_.layers - 1 && (int64_t)kept_.size() < count) {
            // From here on, compute only tokens whose logits are requested.
            int64_t to = 0;
            for (int64_t row = 0; row < count; row++) {
                if (!rows[row].is_wanted) continue;
                if (to < row) {
                    std::memcpy(hidden_.data() + to * hidden, hidden_.data() + row * hidden, (size_t)hidden * 4);
                    std::memcpy(qkv_.data() + to * strides_.qkv, qkv_.data() + row * strides_.qkv, (size_t)strides_.qkv * 4);
                }
                to++;
            }
            asking = &kept_;
            count = to;
            if (!count) return;
        }
        attend(*asking, i);
        if (is_quantized(layer.o))
            each_row(count, strides_.mixed, [&](int64_t row) { quantize(row, mixed_.data() + row * strides_.mixed, strides_.mixed); });
        multiply(layer.o, mixed_, strides_.mixed, count, branch_.data(), hidden);
        each_row(count, hidden, [&](int64_t row) {
            add_branch(row, layer.attention_branch_norm);
            enter_branch(row, layer.post_attention_norm, layer.gate_up);
        });
        multiply_swiglu(layer.gate_up, count);
        if (is_quantized(layer.down))
            each_row(count, strides_.intermediate, [&](int64_t row) {
                quantize(row, inner_.data() + row * strides_.intermediate, strides_.intermediate);
            });
        multiply(layer.down, inner_, strides_.intermediate, count, branch_.data(), hidden);
    }
    each_row(count, hidden, [&](int64_t row) { add_branch(row, model_.layers.back().mlp_branch_norm); });
    if (out.hidden) copy_hidden(count, out);
    else choose(count, out);
}

void Session::step(const std::vector<Row>& rows, Outputs out) {
    for (int64_t first = 0; first < (int64_t)rows.size(); first += MAX_ROWS) {
        const int64_t count = std::min<int64_t>(MAX_ROWS, (int64_t)rows.size() - first), work = model_.weights() * count;
        is_shared_ = threads_.count() > 1 && sharing_.choose(work, count);
        const auto started = std::chrono::steady_clock::now();
        pass(rows.data() + first, count, out);
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
        sharing_.note(work, count, is_shared_, taken.count());
    }
}

}  // namespace rex
