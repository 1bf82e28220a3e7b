/* Operations between the matmuls of a decode step, in few passes. See
 * worker/cpu/kernels/bindings.py.
 *
 * All tensors are contiguous. N rows, H query heads, K key heads (H = K * G) of width D, E hidden
 * size, W columns. A tensor is float32 or bfloat16, as its `kind` says; everything is computed in
 * float32.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vector_math.h"
#include "thread_team.h"

enum { BLOCK = 512 }; /* logits that refine checks at once */

static inline void load(float *restrict to, const void *from, int64_t at, int kind, int64_t count) {
    if (kind == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = widen(((const uint16_t *)from)[at + i]);
    else
        memcpy(to, (const float *)from + at, count * sizeof(float));
}

static inline void store(void *to, int64_t at, int kind, const float *restrict from, int64_t count) {
    if (kind == BFLOAT16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = narrow(from[i]);
    else
        memcpy((float *)to + at, from, count * sizeof(float));
}

void norm_rows(float *hidden, const void *delta, int delta_kind, const float *weight, float eps, void *out, int out_kind,
               int64_t N, int64_t E) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        float *restrict row = hidden + n * E;
        if (delta && delta_kind == BFLOAT16) {
            const uint16_t *restrict more = (const uint16_t *)delta + n * E;
            for (int64_t i = 0; i < E; i++) row[i] += widen(more[i]);
        } else if (delta) {
            const float *restrict more = (const float *)delta + n * E;
            for (int64_t i = 0; i < E; i++) row[i] += more[i];
        }
        float sum = 0.0f;
        for (int64_t i = 0; i < E; i++) sum += row[i] * row[i];
        float scale = 1.0f / sqrtf(sum / (float)E + eps);
        if (out_kind == BFLOAT16) {
            uint16_t *restrict to = (uint16_t *)out + n * E;
            for (int64_t i = 0; i < E; i++) to[i] = narrow(row[i] * scale * weight[i]);
        } else {
            float *restrict to = (float *)out + n * E;
            for (int64_t i = 0; i < E; i++) to[i] = row[i] * scale * weight[i];
        }
    }
}

/* hidden [N, E] += delta (may be null), then out = hidden / sqrt(mean(hidden^2) + eps) * weight. */
void add_norm(float *hidden, const void *delta, int delta_kind, const float *weight, float eps, void *out, int out_kind,
              int64_t N, int64_t E) {
#pragma omp parallel if (N * E > 8192)
    norm_rows(hidden, delta, delta_kind, weight, eps, out, out_kind, N, E);
}

void multiply_all(void *a, const void *b, int kind, int64_t count) {
    if (kind == BFLOAT16) {
        uint16_t *restrict x = a;
        const uint16_t *restrict y = b;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) x[i] = narrow(widen(x[i]) * widen(y[i]));
    } else {
        float *restrict x = a;
        const float *restrict y = b;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) x[i] *= y[i];
    }
}

/* a *= b, element-wise. */
void multiply(void *a, const void *b, int kind, int64_t count) {
#pragma omp parallel if (count > 16384)
    multiply_all(a, b, kind, count);
}

/* out = x * cos + (x with its halves swapped) * sin. The first half of sin is already negated. */
static inline void rotate(float *restrict out, const float *restrict x, const float *restrict cos,
                          const float *restrict sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        out[i] = x[i] * cos[i] + x[i + D / 2] * sin[i];
        out[i + D / 2] = x[i + D / 2] * cos[i + D / 2] + x[i] * sin[i + D / 2];
    }
}

/* LANES floats at any address that is aligned for a float. The compiler splits them into the vector
 * registers of the processor. */
typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16), aligned(sizeof(float))));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));

/* query heads that use a key while it is in registers; prefetch distance in keys */
enum { MOST_HEADS = 4, ROWS_AHEAD = 12 };

/* Prefetches a key or value of width D, one cache line at a time. */
static inline void fetch(const void *from, int64_t at, int kind, int64_t D) {
    const char *row = (const char *)from + at * (kind == BFLOAT16 ? 2 : 4);
    for (int64_t byte = 0; byte < D * (kind == BFLOAT16 ? 2 : 4); byte += 64) __builtin_prefetch(row + byte);
}

/* Loads LANES numbers of a tensor from index `at` on; those after the first `count` are zero. */
static inline lanes lanes_of(const void *from, int64_t at, int kind, int64_t count) {
    if (count >= LANES && kind == BFLOAT16)
        return (lanes)(__builtin_convertvector(*(const halves *)((const uint16_t *)from + at), words) << 16);
    if (count >= LANES) return *(const lanes *)((const float *)from + at);
    float rest[LANES] = {0};
    load(rest, from, at, kind, count);
    return *(const lanes *)rest;
}

/* Adds the 16 lanes up to four partial sums. */
static inline four fold(lanes all) {
    eight half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

/* Attention of `heads` queries [heads, parts * LANES] over W keys and values of width D. The
 * output, `means`, has the shape of the queries. `parts` and `heads` should be constants where this
 * function is inlined, so that sums stay in registers. score has room for 5 W numbers per head. */
static inline __attribute__((always_inline)) void attend_heads(const float *queries, const void *keys, const void *values, int64_t first,
                                                       int kind, int64_t W, int64_t D, float scaling, float *score, float *means,
                                                       const int parts, const int heads) {
    float *folded = score + heads * W;
    for (int64_t w = 0; w < W; w++) {
        lanes key[parts];
        if (w + ROWS_AHEAD < W) fetch(keys, first + (w + ROWS_AHEAD) * D, kind, D);
        fetch(values, first + w * D, kind, D); /* for the sums over values below */
        for (int part = 0; part < parts; part++) key[part] = lanes_of(keys, first + w * D + part * LANES, kind, D - part * LANES);
        for (int h = 0; h < heads; h++) {
            const lanes *query = (const lanes *)(queries + h * parts * LANES);
            lanes sum = query[0] * key[0];
            for (int part = 1; part < parts; part++) sum += query[part] * key[part];
            *(four *)(folded + (h * W + w) * 4) = fold(sum);
        }
    }
    for (int h = 0; h < heads; h++) {
        float *restrict s = score + h * W, total = 0.0f;
        const float *restrict four_each = folded + h * W * 4;
        for (int64_t w = 0; w < W; w++)
            s[w] = (four_each[4 * w] + four_each[4 * w + 1] + four_each[4 * w + 2] + four_each[4 * w + 3]) * scaling;
        float greatest = greatest_of(s, W);
        for (int64_t w = 0; w < W; w++) s[w] = exp_of(s[w] - greatest);
        for (int64_t w = 0; w < W; w++) total += s[w];
        for (int64_t w = 0; w < W; w++) s[w] /= total;
    }
    lanes sums[heads][parts];
    memset(sums, 0, sizeof sums);
    for (int64_t w = 0; w < W; w++)
        for (int part = 0; part < parts; part++) {
            lanes value = lanes_of(values, first + w * D + part * LANES, kind, D - part * LANES);
            for (int h = 0; h < heads; h++) sums[h][part] += score[h * W + w] * value;
        }
    memcpy(means, sums, sizeof sums);
}

static void attend_by_size(const float *queries, const void *keys, const void *values, int64_t first, int kind, int64_t W, int64_t D,
                    float scaling, float *score, float *means, int parts, int heads) {
#define ATTEND(PARTS, HEADS) attend_heads(queries, keys, values, first, kind, W, D, scaling, score, means, PARTS, HEADS)
#define ATTEND_HEADS(PARTS) (heads == 4 ? ATTEND(PARTS, 4) : heads == 3 ? ATTEND(PARTS, 3) : heads == 2 ? ATTEND(PARTS, 2) : ATTEND(PARTS, 1))
    if (parts == 4) ATTEND_HEADS(4);
    else if (parts == 8) ATTEND_HEADS(8);
    else ATTEND(parts, heads);
}

/* Writes the key and the value of one token into the KV cache. raw and turned have room for D
 * numbers each. */
static inline void store_key_value(const void *projected, int kind, const float *cos, const float *sin, void *keys, void *values, int cache_kind,
                        int64_t token, int64_t at, int64_t H, int64_t K, int64_t k, int64_t D, float *raw, float *turned) {
    int64_t row_width = (H + 2 * K) * D;
    load(raw, projected, token * row_width + (H + k) * D, kind, D);
    if (cos) rotate(turned, raw, cos + token * D, sin + token * D, D);
    store(keys, at, cache_kind, cos ? turned : raw, D);
    load(raw, projected, token * row_width + (H + K + k) * D, kind, D);
    store(values, at, cache_kind, raw, D);
}

int attend_rows(const void *projected, int kind, const float *cos, const float *sin, void *keys, void *values, int cache_kind,
                const int64_t *starts, void *out, int64_t N, int64_t Q, int64_t H, int64_t K, int64_t D, int64_t width,
                int64_t column, float scaling) {
    int64_t G = H / K, row_width = (H + 2 * K) * D, parts = (D + LANES - 1) / LANES, room = parts * LANES;
    /* working space of this thread */
    float *queries = malloc((2 * G * room + 2 * D + 5 * MOST_HEADS * (column + Q)) * sizeof(float));
    /* a thread without memory must still enter the loops (barriers), but does nothing in them */
    int has_room = queries != NULL;
    float *means = has_room ? queries + G * room : NULL, *raw = has_room ? means + G * room : NULL;
    float *turned = has_room ? raw + D : NULL, *score = has_room ? turned + D : NULL;
    if (has_room) memset(queries, 0, G * room * sizeof(float));
    if (Q > 1) { /* tokens attend to earlier ones of this call: write all keys and values first */
#pragma omp for schedule(static) collapse(2)
        for (int64_t n = 0; n < N; n++)
            for (int64_t q = 0; q < Q; q++)
                for (int64_t k = 0; k < K; k++)
                    if (has_room && column + q >= starts[n])
                        store_key_value(projected, kind, cos, sin, keys, values, cache_kind, n * Q + q, ((n * K + k) * width + column + q) * D, H,
                             K, k, D, raw, turned);
    }
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++)
            for (int64_t q = 0; q < Q; q++) {
                if (!has_room) continue;
                int64_t start = starts[n], token = n * Q + q, first = (n * K + k) * width * D, W = column + q + 1 - start;
                if (W <= 0) memset(means, 0, G * room * sizeof(float));
                for (int64_t w = start; w < column && w < start + ROWS_AHEAD; w++) fetch(keys, first + w * D, cache_kind, D);
                for (int64_t g = 0; g < G; g++) {
                    load(raw, projected, token * row_width + (k * G + g) * D, kind, D);
                    if (cos) rotate(queries + g * room, raw, cos + token * D, sin + token * D, D);
                    else memcpy(queries + g * room, raw, D * sizeof(float));
                }
                if (Q == 1)
                    store_key_value(projected, kind, cos, sin, keys, values, cache_kind, token, first + column * D, H, K, k, D, raw, turned);
                for (int64_t g = 0; g < G && W > 0; g += MOST_HEADS)
                    attend_by_size(queries + g * room, keys, values, first + start * D, cache_kind, W, D, scaling, score, means + g * room,
                            parts, G - g < MOST_HEADS ? G - g : MOST_HEADS);
                for (int64_t g = 0; g < G; g++) store(out, (token * H + k * G + g) * D, kind, means + g * room, D);
            }
    free(queries);
    return !has_room;
}

/* Attention with a KV cache, for Q new tokens per row.
 *
 * Their keys and values are written into the cache from `column` on. Each token attends to the
 * columns from the start of its row to its own. Its result depends neither on other rows nor on Q.
 * Tokens before the start are padding: their keys and values are not written, and their output is
 * zero.
 *
 * projected [N, Q, (H + 2K) * D] holds queries, keys and values. cos and sin [N, Q, D] may be null:
 * no rotation. keys and values [rows, K, width, D] are the cache; starts [N]; out [N, Q, H * D].
 * Returns 0, or 1 if there was no memory. */
int attend(const void *projected, int kind, const float *cos, const float *sin, void *keys, void *values, int cache_kind,
           const int64_t *starts, void *out, int64_t N, int64_t Q, int64_t H, int64_t K, int64_t D, int64_t width, int64_t column,
           float scaling) {
    int has_failed = 0;
#pragma omp parallel reduction(| : has_failed)
    has_failed |=
        attend_rows(projected, kind, cos, sin, keys, values, cache_kind, starts, out, N, Q, H, K, D, width, column, scaling);
    return has_failed;
}

/* Logits whose highest values are exact: those within `margin` of the highest rounded one are
 * recomputed as hidden . weight[v]. The others keep their rounded value.
 *
 * rounded [N, V] in bfloat16, hidden [N, E], weight [V, E], out [N, V]. If more than `most` logits
 * of a row are within the margin, it is halved until they fit. If it gets too small, only the first
 * `most` are recomputed: in so flat a distribution no token stands out. */
void refine(const uint16_t *rounded, const float *hidden, const float *weight, float *out, int64_t N, int64_t V, int64_t E,
            float margin, int64_t most) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t n = 0; n < N; n++) {
        const uint16_t *restrict from = rounded + n * V;
        const float *restrict x = hidden + n * E;
        float *restrict to = out + n * V, greatest, least;
        for (int64_t v = 0; v < V; v++) to[v] = widen(from[v]);
        greatest = greatest_of(to, V);
        int64_t near = most + 1;
        for (float m = margin; near > most && m > 0.01f; m /= 2) {
            least = greatest - m;
            near = 0;
            for (int64_t v = 0; v < V; v++) near += to[v] >= least;
        }
        near = 0;
        for (int64_t start = 0; start < V; start += BLOCK) {
            int64_t stop = start + BLOCK < V ? start + BLOCK : V;
            /* skips nearly all blocks */
            if (!(greatest_of(to + start, stop - start) >= least)) continue;
            for (int64_t v = start; v < stop && near < most; v++)
                if (to[v] >= least) {
                    const float *restrict row = weight + v * E;
                    float dot = 0.0f;
                    for (int64_t i = 0; i < E; i++) dot += x[i] * row[i];
                    to[v] = dot;
                    near++;
                }
        }
    }
}
