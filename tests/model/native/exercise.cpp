// Runs every kernel that the processor has on random weights, for builds with sanitizers: no Python, no torch.
//
// Each sequence is computed whole, and in chunks beside others on several threads: the bits must be the same.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "rex_native.h"
#include "sharing.h"

static uint32_t state = 1;

static float random_number() {
    state = state * 1664525u + 1013904223u;
    return (float)(int32_t)state / 2147483648.0f;
}

struct Store {
    std::vector<std::vector<uint8_t>> bytes;
    std::vector<std::vector<float>> floats;

    const float* numbers(size_t count, float size, float middle) {
        std::vector<float> made(count);
        for (float& x : made) x = middle + size * random_number();
        floats.push_back(std::move(made));
        return floats.back().data();
    }
    RexMatrix matrix(int32_t dtype, size_t n, size_t k) {
        const float* from = numbers(n * k, 0.2f, 0);
        if (dtype == REX_FLOAT32) return {from, nullptr, dtype};
        if (dtype == REX_INT4) {
            std::vector<uint8_t> pairs(n * k / 2), scales(n * k / 32 * 2);
            for (size_t i = 0; i < pairs.size(); i++) pairs[i] = (uint8_t)(int)(from[i] * 635.0f + 128.0f);
            const float* factors = numbers(scales.size() / 2, 0.002f, 0.03f);
            for (size_t i = 0; i < scales.size() / 2; i++) std::memcpy(&scales[2 * i], (const char*)(factors + i) + 2, 2);
            bytes.push_back(std::move(pairs));
            bytes.push_back(std::move(scales));
            return {bytes[bytes.size() - 2].data(), bytes.back().data(), dtype};
        }
        std::vector<uint8_t> made(n * k * (dtype == REX_INT8 ? 1 : 2));
        for (size_t i = 0; i < n * k; i++) {
            if (dtype == REX_INT8) made[i] = (uint8_t)(int8_t)(from[i] * 635.0f);
            else std::memcpy(&made[2 * i], (const char*)(from + i) + 2, 2);
        }
        bytes.push_back(std::move(made));
        return {bytes.back().data(), dtype == REX_INT8 ? numbers(n, 0.0001f, 0.0015f) : nullptr, dtype};
    }
};

static void require(bool is_so, const char* what) {
    if (is_so) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

static void exercise(int32_t instructions, int32_t dtype, bool post_norm) {
    char error[REX_ERROR_SIZE] = "";
    const bool is_int4 = dtype == REX_INT4;  // takes whole groups of inputs
    const int32_t hidden = is_int4 ? 96 : 72, inner = is_int4 ? 160 : 104, head_dim = is_int4 ? 16 : 20;
    const int32_t layers = 2, heads = 6, groups = 2, vocab = 1301, context = 200;
    const int32_t rotary_dim = post_norm ? head_dim / 2 : head_dim;
    const RexConfig config = {layers, hidden, inner, heads, groups, head_dim, vocab, context, rotary_dim, post_norm, 127, instructions, 1e-5f};
    Store store;
    std::vector<RexLayer> each;
    for (int i = 0; i < layers; i++) {
        RexLayer layer = {};
        layer.q = store.matrix(dtype, heads * head_dim, hidden);
        layer.k = store.matrix(dtype, groups * head_dim, hidden);
        layer.v = store.matrix(dtype, groups * head_dim, hidden);
        layer.o = store.matrix(dtype, hidden, heads * head_dim);
        layer.gate = store.matrix(dtype, inner, hidden);
        layer.up = store.matrix(dtype, inner, hidden);
        layer.down = store.matrix(dtype, hidden, inner);
        layer.input_norm = store.numbers(hidden, 0.1f, 1);
        layer.post_attention_norm = store.numbers(hidden, 0.1f, 1);
        layer.attention_branch_norm = post_norm ? store.numbers(hidden, 0.1f, 1) : nullptr;
        layer.mlp_branch_norm = post_norm ? store.numbers(hidden, 0.1f, 1) : nullptr;
        layer.query_norm = post_norm ? nullptr : store.numbers(head_dim, 0.1f, 1);
        layer.key_norm = post_norm ? nullptr : store.numbers(head_dim, 0.1f, 1);
        each.push_back(layer);
    }
    RexWeights weights = {};
    weights.embedding = store.matrix(is_int4 ? REX_INT8 : dtype, vocab, hidden);
    if (post_norm) weights.head = store.matrix(is_int4 ? REX_INT8 : dtype, vocab, hidden);
    weights.layers = each.data();
    weights.final_norm = store.numbers(hidden, 0.1f, 1);
    weights.cos = store.numbers(context * rotary_dim / 2, 1, 0);
    weights.sin = store.numbers(context * rotary_dim / 2, 1, 0);

    RexModel* model = rex_model_create(&config, &weights, error);
    require(model, error);
    const int32_t tokens = 150;
    std::vector<int64_t> ids(tokens);
    for (int32_t i = 0; i < tokens; i++) ids[i] = (i * 37 + 5) % vocab;
    std::vector<float> whole(tokens * vocab), highest(3 * tokens);
    std::vector<int32_t> best(3 * tokens);
    const int32_t zero = 0;
    RexSession* session = rex_session_create(model, 1, REX_FLOAT32, 0, 1, 0, error);
    require(session, error);
    require(!rex_session_step(session, 1, &zero, &zero, &tokens, &tokens, ids.data(), nullptr, whole.data(), best.data(), highest.data(), error), error);
    rex_session_destroy(session);

    session = rex_session_create(model, 3, REX_FLOAT32, 0, 3, 0, error);
    require(session, error);
    int32_t done = 0;
    for (int32_t size : {40, 1, 1, 23, 9, 1, 75}) {
        const int32_t slot[] = {2, 0, 1}, start[] = {0, done, 0}, length[] = {7, size, 1}, wanted[] = {1, size, 0};
        std::vector<int64_t> row(ids.begin(), ids.begin() + 7);
        row.insert(row.end(), ids.begin() + done, ids.begin() + done + size);
        row.push_back(3);
        std::vector<float> logits((1 + size) * vocab);
        std::vector<RexDraw> draws(1 + size);
        for (int32_t i = 0; i < 1 + size; i++) {
            const double temperature[] = {0.0, 1e-40, 1.0, 50.0}, top_p[] = {1.0, 1e-9, 0.9};
            draws[i] = {temperature[i % 4], (double)(i % 5), top_p[i % 3], i % 7 / 10.0, i / (1.0 + size)};
        }
        require(!rex_session_step(session, 3, slot, start, length, wanted, row.data(), draws.data(), logits.data(), best.data(), highest.data(), error), error);
        for (int32_t i = 0; i < 1 + size; i++) require(best[i] >= 0 && best[i] < vocab, "a sample outside the vocabulary");
        require(!std::memcmp(logits.data() + vocab, whole.data() + done * vocab, (size_t)size * vocab * 4), "other bits in company");
        done += size;
    }
    require(!rex_session_copy_prefix(session, 0, 1, 130, error), error);
    const int32_t one = 1, at = 130, slot = 1;
    std::vector<float> logits(vocab);
    require(!rex_session_step(session, 1, &slot, &at, &one, &one, ids.data() + at, nullptr, logits.data(), best.data(), highest.data(), error), error);
    require(!std::memcmp(logits.data(), whole.data() + at * vocab, vocab * 4), "other bits after a copied prefix");
    // Several passes in one call choose what one after the other does.
    const int32_t slots[] = {0, 1}, starts[] = {20, 20};
    const int64_t firsts[] = {ids[20], ids[20]};
    int32_t chain[8];
    float chain_highest[8];
    require(!rex_session_decode(session, 2, 4, slots, starts, firsts, nullptr, chain, chain_highest, error), error);
    int64_t id = ids[20];
    for (int32_t step = 0; step < 4; step++) {
        const int32_t position = 20 + step;
        require(!rex_session_step(session, 1, &slot, &position, &one, &one, &id, nullptr, nullptr, best.data(), highest.data(), error), error);
        require(chain[2 * step] == best[0] && chain[2 * step + 1] == best[0], "another token in a chain");
        id = best[0];
    }
    const int32_t last = config.context_length - 1;
    require(rex_session_decode(session, 1, 2, &slot, &last, &id, nullptr, chain, chain_highest, error), "a chain behind the context");
    require(!rex_session_truncate(session, 0, 0, error) && !rex_session_truncate(session, 1, 70, error), error);
    rex_session_destroy(session);
    rex_model_destroy(model);
}

// Passes of 100 whose way is the faster one, where one takes `alone` and the other `shared` seconds, and the first shared
// one after others `waking` more.
static int passes_of(rex::Sharing& sharing, int64_t work, double alone, double shared, double waking = 1e-3) {
    int found = 0;
    bool was_shared = false;
    for (int pass = 0; pass < 100; pass++) {
        const bool is_shared = sharing.choose(work, 8);
        sharing.note(work, 8, is_shared, is_shared ? shared + (was_shared ? 0 : waking) : alone);
        found += is_shared == (shared < alone);
        was_shared = is_shared;
    }
    return found;
}

static void decide() {
    rex::Sharing sharing(1000);
    require(!sharing.choose(999, 8) && sharing.choose(8000, 8), "what is surely faster alone, or shared");
    require(passes_of(sharing, 4000, 3e-3, 2e-3) >= 84, "the faster way is not found");
    for (int hundred = 0; hundred < 20; hundred++) passes_of(sharing, 4000, 3e-3, 2e-3);
    require(passes_of(sharing, 4000, 3e-3, 2e-3) >= 96, "the slower way is tried too often");
    require(passes_of(sharing, 4000, 3e-3, 9e-3) >= 90, "other programs that take the cores are not noticed");
    require(passes_of(sharing, 4000, 3e-3, 9e-3) >= 96, "the slower way is tried too often beside other programs");
    for (int hundred = 0; hundred < 6; hundred++) passes_of(sharing, 4000, 3e-3, 2e-3);
    require(passes_of(sharing, 4000, 3e-3, 2e-3) >= 96, "the end of the other programs is not noticed");

    rex::Sharing disturbed(1000);  // the first shared passes read the weights from memory
    for (int pass = 0; pass < 4; pass++) {
        const bool is_shared = disturbed.choose(4000, 8);
        disturbed.note(4000, 8, is_shared, is_shared ? 9e-3 : 3e-3);
    }
    passes_of(disturbed, 4000, 3e-3, 2e-3);
    require(passes_of(disturbed, 4000, 3e-3, 2e-3) >= 88, "a disturbed first trial is believed for long");
}

int main() {
    decide();
    const char* names[] = {"portable", "avx2", "avxvnni", "avx512", "amx", "dotprod"};
    for (int32_t instructions = 0; instructions < 6; instructions++) {
        if (!rex_supports(instructions)) continue;
        for (int32_t dtype : {REX_FLOAT32, REX_BFLOAT16, REX_INT8, REX_INT4})
            for (bool post_norm : {false, true}) exercise(instructions, dtype, post_norm);
        std::printf("%s: the same bits\n", names[instructions]);
    }
}
