/* Causal attention for training, forward and backward, and rotary embeddings. See
 * worker/cpu/short_attention.py and worker/cpu/training_ops.py.
 *
 * B rows of T tokens, H query heads, K key heads (H = K * G), D head width, a multiple of 16. W is
 * T, rounded up to a multiple of 16. Queries, keys and values are [B, T, heads, D], weights
 * [B, H, T, W]. Scores of later keys are not computed, except to fill up 16 lanes and four rows.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vector_math.h"

typedef float sixteen __attribute__((vector_size(64), aligned(4)));
/* size of a block of sums that fits in the registers */
#ifdef __AVX512F__
enum { ROWS = 4, GROUPS = 4 };
#else
enum { ROWS = 4, GROUPS = 1 };
#endif

/* c [rows, 16 * groups] = sum over k of a[m, k] b[k, :], added to c with `adds`.
 * a may have any strides. The last dimension of b and c is contiguous. */
static inline __attribute__((always_inline)) void multiply_block(const float *a, int64_t a_step, int64_t a_k_step, const float *b,
                                                                 int64_t b_step, float *c, int64_t c_step, int64_t depth,
                                                                 const int rows, const int groups, int adds) {
    sixteen sums[ROWS][GROUPS];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) sums[m][g] = adds ? *(sixteen *)(c + m * c_step + LANES * g) : (sixteen){0};
    for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            sixteen x = *(const sixteen *)(b + k * b_step + LANES * g);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) sums[m][g] += a[m * a_step + k * a_k_step] * x;
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) *(sixteen *)(c + m * c_step + LANES * g) = sums[m][g];
}

/* The same for up to ROWS rows and N columns, a multiple of 16. */
static void multiply_rows(const float *a, int64_t a_step, int64_t a_k_step, const float *b, int64_t b_step, float *c, int64_t c_step,
                          int64_t depth, int64_t rows, int64_t N, int adds) {
    int64_t n = 0;
    if (rows == ROWS)
        for (; n + GROUPS * LANES <= N; n += GROUPS * LANES)
            multiply_block(a, a_step, a_k_step, b + n, b_step, c + n, c_step, depth, ROWS, GROUPS, adds);
    for (; n < N; n += LANES) {
        if (rows == ROWS) multiply_block(a, a_step, a_k_step, b + n, b_step, c + n, c_step, depth, ROWS, 1, adds);
        else
            for (int64_t m = 0; m < rows; m++)
                multiply_block(a + m * a_step, a_step, a_k_step, b + n, b_step, c + n + m * c_step, c_step, depth, 1, 1, adds);
    }
}

static inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Transposes [T, D], whose rows are `step` apart, to [D, W] and pads it with zeros. */
static void transpose_rows(const float *from, int64_t step, float *to, int64_t T, int64_t D, int64_t W) {
    for (int64_t d = 0; d < D; d++) {
        for (int64_t t = 0; t < T; t++) to[d * W + t] = from[t * step + d];
        memset(to + d * W + T, 0, (W - T) * sizeof(float));
    }
}

/* Softmax of `scaling` times the first `count` scores, in place; the others of W become zero. */
static void softmax_row(float *row, int64_t count, int64_t W, float scaling) {
    float greatest = greatest_of(row, count), total = 0.0f;
    for (int64_t s = 0; s < count; s++) total += row[s] = exp_of((row[s] - greatest) * scaling);
    float share = 1.0f / total;
    for (int64_t s = 0; s < count; s++) row[s] *= share;
    memset(row + count, 0, (W - count) * sizeof(float));
}

/* Writes the attention output [B, T, H, D], and the weights [B, H, T, W] for the backward pass.
 * Returns 0, or 1 if there was no memory. */
int attend_causally(const float *q, const float *k, const float *v, float *out, float *weights, int64_t B, int64_t T, int64_t H,
                    int64_t K, int64_t D, float scaling) {
    int64_t W = padded(T), G = H / K, q_step = H * D, k_step = K * D;
    int has_failed = 0;
#pragma omp parallel
    {
        float *keys = malloc(D * W * sizeof(float));
        if (!keys) {
#pragma omp atomic write
            has_failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < B * K; unit++) {
            if (!keys) continue;
            int64_t b = unit / K, head = unit % K;
            const float *values = v + b * T * k_step + head * D;
            transpose_rows(k + b * T * k_step + head * D, k_step, keys, T, D, W);
            for (int64_t h = head * G; h < (head + 1) * G; h++)
                for (int64_t t = 0; t < T; t += ROWS) {
                    int64_t rows = t + ROWS <= T ? ROWS : T - t, seen = t + rows, at = b * T * q_step + t * q_step + h * D;
                    float *row = weights + ((b * H + h) * T + t) * W;
                    multiply_rows(q + at, q_step, 1, keys, W, row, W, D, rows, padded(seen), 0);
                    for (int64_t m = 0; m < rows; m++) softmax_row(row + m * W, t + m + 1, W, scaling);
                    multiply_rows(row, W, 1, values, k_step, out + at, q_step, seen, rows, D, 0);
                }
        }
        free(keys);
    }
    return has_failed;
}

/* Turns gradients of weights into gradients of scores: scaling * w * (g - sum of w * g). */
static void softmax_gradient(const float *row, float *grad, int64_t count, int64_t W, float scaling) {
    float dot = 0.0f;
    for (int64_t s = 0; s < count; s++) dot += row[s] * grad[s];
    for (int64_t s = 0; s < count; s++) grad[s] = scaling * row[s] * (grad[s] - dot);
    memset(grad + count, 0, (W - count) * sizeof(float));
}

/* Writes the gradients of queries, keys and values. Returns 0, or 1 if there was no memory. */
int attention_gradients(const float *grad, const float *q, const float *k, const float *v, const float *weights, float *grad_q,
                        float *grad_k, float *grad_v, int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, float scaling) {
    int64_t W = padded(T), G = H / K, q_step = H * D, k_step = K * D;
    int has_failed = 0;
#pragma omp parallel
    {
        float *values = malloc((D + T) * W * sizeof(float));
        if (!values) {
#pragma omp atomic write
            has_failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < B * K; unit++) {
            if (!values) continue;
            float *slopes = values + D * W;
            int64_t b = unit / K, head = unit % K, own = b * T * k_step + head * D;
            transpose_rows(v + own, k_step, values, T, D, W);
            for (int64_t h = head * G; h < (head + 1) * G; h++) {
                int64_t at = b * T * q_step + h * D, is_later = h > head * G;
                const float *all = weights + (b * H + h) * T * W;
                for (int64_t t = 0; t < T; t += ROWS) {
                    int64_t rows = t + ROWS <= T ? ROWS : T - t, seen = t + rows;
                    float *slope = slopes + t * W;
                    multiply_rows(grad + at + t * q_step, q_step, 1, values, W, slope, W, D, rows, padded(seen), 0);
                    for (int64_t m = 0; m < rows; m++) softmax_gradient(all + (t + m) * W, slope + m * W, t + m + 1, W, scaling);
                    multiply_rows(slope, W, 1, k + own, k_step, grad_q + at + t * q_step, q_step, seen, rows, D, 0);
                }
                for (int64_t s = 0; s < T; s += ROWS) {
                    int64_t rows = s + ROWS <= T ? ROWS : T - s, to = own + s * k_step, from = at + s * q_step;
                    multiply_rows(all + s * W + s, 1, W, grad + from, q_step, grad_v + to, k_step, T - s, rows, D, is_later);
                    multiply_rows(slopes + s * W + s, 1, W, q + from, q_step, grad_k + to, k_step, T - s, rows, D, is_later);
                }
            }
        }
        free(values);
    }
    return has_failed;
}

/* Rotary embeddings of x [N, heads, D]: x cos + (-second half of x, first half of x) sin. With
 * `is_back` the transposed operation, which gives the gradient. Row n has the angles [D] of place
 * n % num_places. */
void rotate(const float *x, const float *cos, const float *sin, float *out, int64_t N, int64_t num_places, int64_t heads, int64_t D,
            int is_back) {
    int64_t half = D / 2;
#pragma omp parallel for schedule(static) if (N * heads * D > 8192)
    for (int64_t n = 0; n < N; n++) {
        const float *restrict c = cos + n % num_places * D, *restrict s = sin + n % num_places * D;
        for (int64_t h = 0; h < heads; h++) {
            const float *restrict from = x + (n * heads + h) * D;
            float *restrict to = out + (n * heads + h) * D;
            if (is_back)
                for (int64_t d = 0; d < half; d++) {
                    to[d] = from[d] * c[d] + from[d + half] * s[d + half];
                    to[d + half] = from[d + half] * c[d + half] - from[d] * s[d];
                }
            else
                for (int64_t d = 0; d < half; d++) {
                    to[d] = from[d] * c[d] - from[d + half] * s[d];
                    to[d + half] = from[d + half] * c[d + half] + from[d] * s[d + half];
                }
        }
    }
}
