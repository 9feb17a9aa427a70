// The library's C interface, which `library.py` calls through ctypes.
//
// A model holds weights, packed once for the CPU's instructions, and is immutable: sessions may share it.
// A session holds a KV cache, buffers and threads, and is used by one thread at a time.
// Functions that can fail return 0 on success; otherwise they write one line to `error` (ERROR_SIZE bytes).
#pragma once
#include <cstdint>

#ifdef _WIN32
#define REX_API extern "C" __declspec(dllexport)
#else
#define REX_API extern "C" __attribute__((visibility("default")))
#endif

enum { REX_ABI = 8, REX_ERROR_SIZE = 256 };
enum RexDtype { REX_FLOAT32 = 0, REX_BFLOAT16 = 1, REX_INT8 = 2, REX_INT4 = 3 };
enum RexInstructions { REX_PORTABLE = 0, REX_AVX2 = 1, REX_AVXVNNI = 2, REX_AVX512 = 3, REX_AMX = 4, REX_DOTPROD = 5 };

struct RexConfig {
    int32_t layers, hidden_size, intermediate_size, heads, groups, head_dim, vocab_size, context_length;
    int32_t rotary_dim;  // numbers of a head that are rotated, the first ones
    int32_t post_norm;
    int32_t activation_levels;  // int8 and int4: activations are integers from -levels to levels, 127 at most
    int32_t instructions;       // one of RexInstructions
    float eps;
};

// A matrix (n, k), row by row; int4 has two inputs per byte, the even one in the low bits, offset by 8. scale: of int8 n
// float32 factors, of int4 (n, k / 32) bfloat16 factors, else null.
struct RexMatrix {
    const void* data;
    const void* scale;
    int32_t dtype;
};

struct RexLayer {
    RexMatrix q, k, v, o, gate, up, down;
    // Float32, hidden_size elements each; the two after the branches are null without post_norm.
    const float *input_norm, *post_attention_norm, *attention_branch_norm, *mlp_branch_norm;
    // Float32, head_dim elements each; null without qk_norm.
    const float *query_norm, *key_norm;
};

struct RexWeights {
    RexMatrix embedding, head;  // head.data null: tied to the embedding
    const RexLayer* layers;
    const float* final_norm;
    const float *cos, *sin;  // (context_length, rotary_dim / 2)
};

// How to choose the token of a row: at temperature 0 the highest logit, else a sample. top_k: 0 keeps all. uniform: the
// random number that draws the sample, in [0, 1).
struct RexDraw {
    double temperature, top_k, top_p, min_p, uniform;
};

struct RexModel;
struct RexSession;

REX_API int32_t rex_abi();
// Whether this CPU supports the instructions and this build has them.
REX_API int32_t rex_supports(int32_t instructions);
// Copies the weights it needs.
REX_API RexModel* rex_model_create(const RexConfig* config, const RexWeights* weights, char* error);
REX_API int64_t rex_model_bytes(const RexModel* model);
REX_API void rex_model_destroy(RexModel* model);

// cache_dtype: float32 or bfloat16. cache_tokens: most positions held over all slots, 0 for no limit. shared_from:
// weights times rows of a pass: below it one thread computes the pass, from 80 times that on all do, and between the two
// whichever is faster at the time.
REX_API RexSession* rex_session_create(const RexModel* model, int32_t slots, int32_t cache_dtype, int64_t cache_tokens,
                                       int32_t threads, int64_t shared_from, char* error);
REX_API void rex_session_destroy(RexSession* session);

// One pass over segments of many slots. Segment i: `length[i]` tokens after the first `start[i]` positions of
// `slot[i]`; the last `wanted[i]` of them (0 to length) get logits. ids: the tokens of all segments, one after the
// other. For each such row, in order: logits (rows, vocab_size) unless null, the token that `draws` chooses (null: the
// first index of the highest logit), and the highest logit, NaN if any is NaN.
REX_API int32_t rex_session_step(RexSession* session, int32_t segments, const int32_t* slot, const int32_t* start,
                                 const int32_t* length, const int32_t* wanted, const int64_t* ids, const RexDraw* draws,
                                 float* logits, int32_t* chosen, float* highest, char* error);
// `steps` passes over one token of each of `texts` slots: the first is the token ids[i] after `start[i]` positions, each
// later one the token that the pass before chose. draws, chosen and highest as above, pass by pass (steps, texts).
REX_API int32_t rex_session_decode(RexSession* session, int32_t texts, int32_t steps, const int32_t* slot,
                                   const int32_t* start, const int64_t* ids, const RexDraw* draws, int32_t* chosen,
                                   float* highest, char* error);
// As rex_session_step, but ends after the final norm. hidden: (rows, hidden_size) of the requested rows.
REX_API int32_t rex_session_hidden(RexSession* session, int32_t segments, const int32_t* slot, const int32_t* start,
                                   const int32_t* length, const int32_t* wanted, const int64_t* ids, float* hidden,
                                   char* error);
// Copy the first `tokens` of `source` to `target`: whole pages are shared, copy-on-write.
REX_API int32_t rex_session_copy_prefix(RexSession* session, int32_t source, int32_t target, int32_t tokens, char* error);
// Drop a slot's positions from `tokens` on.
REX_API int32_t rex_session_truncate(RexSession* session, int32_t slot, int32_t tokens, char* error);
// Bytes of the pages in use.
REX_API int64_t rex_session_cache_bytes(const RexSession* session);
