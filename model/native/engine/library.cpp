// The C interface over Model and Session: checks arguments and converts exceptions to messages.
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "model.h"
#include "rex_native.h"
#include "session.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

struct RexModel {
    rex::Model model;
};
struct RexSession {
    rex::Session session;
    const rex::Model& model;
};

namespace rex {

namespace {

#if defined(__x86_64__)
bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

// AMX tiles are 8 KB of state that the kernel grants on request.
bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 24)) || !(d & (1u << 25))) return false;
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;
    static const bool is_granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return is_granted;
#else
    return false;
#endif
}
#endif

}  // namespace

const Kernels* find_kernels(int32_t instructions) {
    switch (instructions) {
        case REX_PORTABLE: return portable_kernels();
#if defined(__x86_64__)
#if defined(HAS_avx2)
        case REX_AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2_kernels() : nullptr;
#endif
#if defined(HAS_avxvnni)
        case REX_AVXVNNI: return find_kernels(REX_AVX2) && has_avxvnni() ? avxvnni_kernels() : nullptr;
#endif
#if defined(HAS_avx512)
        case REX_AVX512:
            return find_kernels(REX_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vnni")
                       ? avx512_kernels() : nullptr;
#endif
#if defined(HAS_amx)
        case REX_AMX: return find_kernels(REX_AVX512) && has_amx() ? amx_kernels() : nullptr;
#endif
#elif defined(__aarch64__) && defined(HAS_dotprod)
        case REX_DOTPROD:
#if defined(__linux__)
            return getauxval(AT_HWCAP) & (1ul << 20) ? dotprod_kernels() : nullptr;
#else
            return dotprod_kernels();
#endif
#endif
    }
    return nullptr;
}

namespace {

void check(bool is_good, const char* what, int64_t found) {
    if (is_good) return;
    char text[REX_ERROR_SIZE];
    std::snprintf(text, sizeof text, what, (long long)found);
    throw std::invalid_argument(text);
}

template <class Work>
int32_t guarded(char* error, const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        std::snprintf(error, REX_ERROR_SIZE, "no memory left");
    } catch (const std::exception& failure) {
        std::snprintf(error, REX_ERROR_SIZE, "%s", failure.what());
    }
    return 1;
}

}  // namespace

}  // namespace rex

using namespace rex;

namespace {

// Checks the segments and reserves their cache positions; returns their tokens. Throws if one does not fit.
std::vector<Row> rows_of(RexSession* session, int32_t segments, const int32_t* slot, const int32_t* start,
                         const int32_t* length, const int32_t* wanted, const int64_t* ids) {
    const RexConfig& config = session->model.config;
    Cache& cache = session->session.cache;
    std::vector<Row> rows;
    for (int32_t i = 0; i < segments; i++) {
        check(slot[i] >= 0 && slot[i] < cache.slots(), "there is no slot %lld", slot[i]);
        check(length[i] > 0, "a segment has %lld tokens", length[i]);
        check(wanted[i] >= 0 && wanted[i] <= length[i], "logits of %lld tokens are more than a segment has", wanted[i]);
        check(start[i] >= 0 && start[i] <= cache.pages_of(slot[i]) * PAGE, "a slot does not reach to position %lld", start[i]);
        const int64_t end = (int64_t)start[i] + length[i];
        check(end <= config.context_length, "position %lld is behind the context", end - 1);
        for (int32_t at = 0; at < length[i]; at++, ids++) {
            check(*ids >= 0 && *ids < config.vocab_size, "the vocabulary has no token %lld", *ids);
            rows.push_back({*ids, slot[i], start[i] + at, at >= length[i] - wanted[i]});
        }
    }
    for (int32_t i = 0; i < segments; i++) cache.reserve(slot[i], start[i], (int64_t)start[i] + length[i]);
    return rows;
}

}  // namespace

int32_t rex_abi() { return REX_ABI; }

int32_t rex_supports(int32_t instructions) { return find_kernels(instructions) != nullptr; }

RexModel* rex_model_create(const RexConfig* config, const RexWeights* weights, char* error) {
    RexModel* model = nullptr;
    guarded(error, [&] {
        const Kernels* kernels = find_kernels(config->instructions);
        check(kernels, "the processor or this build lacks instruction set %lld", config->instructions);
        model = new RexModel{Model(*config, *weights, *kernels)};
    });
    return model;
}

int64_t rex_model_bytes(const RexModel* model) { return model->model.bytes(); }

void rex_model_destroy(RexModel* model) { delete model; }

RexSession* rex_session_create(const RexModel* model, int32_t slots, int32_t cache_dtype, int64_t cache_tokens,
                               int32_t threads, int64_t shared_from, char* error) {
    RexSession* session = nullptr;
    guarded(error, [&] {
        const bool in_bf16 = cache_dtype == REX_BFLOAT16;
        session = new RexSession{Session(model->model, slots, in_bf16, cache_tokens, threads, shared_from), model->model};
    });
    return session;
}

void rex_session_destroy(RexSession* session) { delete session; }

int32_t rex_session_step(RexSession* session, int32_t segments, const int32_t* slot, const int32_t* start,
                         const int32_t* length, const int32_t* wanted, const int64_t* ids, const RexDraw* draws,
                         float* logits, int32_t* chosen, float* highest, char* error) {
    return guarded(error, [&] {
        session->session.step(rows_of(session, segments, slot, start, length, wanted, ids),
                              {draws, logits, chosen, highest, nullptr});
    });
}

int32_t rex_session_decode(RexSession* session, int32_t texts, int32_t steps, const int32_t* slot, const int32_t* start,
                           const int64_t* ids, const RexDraw* draws, int32_t* chosen, float* highest, char* error) {
    return guarded(error, [&] {
        check(steps > 0, "%lld steps", steps);
        const std::vector<int32_t> one(texts, 1);
        std::vector<Row> rows = rows_of(session, texts, slot, start, one.data(), one.data(), ids);
        for (const Row& row : rows) {
            check(row.position + (int64_t)steps <= session->model.config.context_length, "position %lld is behind the context",
                  row.position + (int64_t)steps - 1);
            session->session.cache.reserve(row.slot, row.position, row.position + (int64_t)steps);
        }
        for (int32_t step = 0; step < steps; step++) {
            session->session.step(rows, {draws, nullptr, chosen, highest, nullptr});
            for (int32_t i = 0; i < texts; i++) {
                rows[i].id = chosen[i];
                rows[i].position++;
            }
            if (draws) draws += texts;
            chosen += texts;
            highest += texts;
        }
    });
}

int32_t rex_session_hidden(RexSession* session, int32_t segments, const int32_t* slot, const int32_t* start,
                           const int32_t* length, const int32_t* wanted, const int64_t* ids, float* hidden, char* error) {
    return guarded(error, [&] {
        session->session.step(rows_of(session, segments, slot, start, length, wanted, ids), {nullptr, nullptr, nullptr, nullptr, hidden});
    });
}

int32_t rex_session_copy_prefix(RexSession* session, int32_t source, int32_t target, int32_t tokens, char* error) {
    return guarded(error, [&] {
        Cache& cache = session->session.cache;
        check(source >= 0 && source < cache.slots(), "there is no slot %lld", source);
        check(target >= 0 && target < cache.slots(), "there is no slot %lld", target);
        check(tokens >= 0 && tokens <= cache.pages_of(source) * PAGE, "the slot has fewer than %lld tokens", tokens);
        cache.copy_prefix(source, target, tokens);
    });
}

int32_t rex_session_truncate(RexSession* session, int32_t slot, int32_t tokens, char* error) {
    return guarded(error, [&] {
        check(slot >= 0 && slot < session->session.cache.slots(), "there is no slot %lld", slot);
        check(tokens >= 0, "a slot cannot hold %lld tokens", tokens);
        session->session.cache.truncate(slot, tokens);
    });
}

int64_t rex_session_cache_bytes(const RexSession* session) { return session->session.cache.bytes(); }
