/* Operations between the matmuls of a layer in training, with one pass forward and one backward.
 * See worker/cpu/training_ops.py.
 *
 * N rows, E hidden size, all float32 and contiguous.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vector_math.h"

/* out = x / sqrt(mean(x^2) + eps) * weight. Stores 1 / sqrt(...) in scales [N] for the backward
 * pass. */
void norm(const float *x, const float *weight, float eps, float *out, float *scales, int64_t N, int64_t E) {
#pragma omp parallel for schedule(static) if (N * E > 8192)
    for (int64_t n = 0; n < N; n++) {
        const float *restrict row = x + n * E;
        float *restrict to = out + n * E;
        float sum = 0.0f;
        for (int64_t i = 0; i < E; i++) sum += row[i] * row[i];
        float scale = scales[n] = 1.0f / sqrtf(sum / (float)E + eps);
        for (int64_t i = 0; i < E; i++) to[i] = weight[i] * (row[i] * scale);
    }
}

/* Gradients of norm, where g is the gradient of out:
 *   grad_x = scale * (g * weight - x * scale^2 * mean(g * weight * x))
 *   grad_weight = sum over rows of g * x * scale (null: not needed)
 * Each thread sums its own rows, and the sums of the threads are added in order.
 * Returns 0, or 1 if there was no memory. */
int norm_gradients(const float *grad, const float *x, const float *weight, const float *scales, float *grad_x, float *grad_weight,
                   int64_t N, int64_t E) {
    int most = omp_get_max_threads();
    float *sums = grad_weight ? calloc((size_t)most * E, sizeof(float)) : NULL;
    if (grad_weight && !sums) return 1;
#pragma omp parallel num_threads(most)
    {
        float *restrict sum = sums ? sums + (int64_t)omp_get_thread_num() * E : NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const float *restrict g = grad + n * E, *restrict row = x + n * E;
            float *restrict to = grad_x + n * E;
            float scale = scales[n], dot = 0.0f;
            for (int64_t i = 0; i < E; i++) dot += g[i] * weight[i] * row[i];
            float share = scale * scale * dot / (float)E;
            for (int64_t i = 0; i < E; i++) to[i] = scale * (g[i] * weight[i] - row[i] * share);
            if (sum)
                for (int64_t i = 0; i < E; i++) sum[i] += g[i] * (row[i] * scale);
        }
    }
    if (!sums) return 0;
    memcpy(grad_weight, sums, E * sizeof(float));
    for (int thread = 1; thread < most; thread++)
        for (int64_t i = 0; i < E; i++) grad_weight[i] += sums[(int64_t)thread * E + i];
    free(sums);
    return 0;
}

/* out = gate * sigmoid(gate) * up. */
void swiglu(const float *gate, const float *up, float *out, int64_t count) {
#pragma omp parallel for simd schedule(static) if (count > 16384)
    for (int64_t i = 0; i < count; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

/* Gradients of gate and up. */
void swiglu_gradients(const float *grad, const float *gate, const float *up, float *grad_gate, float *grad_up, int64_t count) {
#pragma omp parallel for simd schedule(static) if (count > 16384)
    for (int64_t i = 0; i < count; i++) {
        float s = sigmoid(gate[i]), swish = gate[i] * s;
        grad_up[i] = grad[i] * swish;
        grad_gate[i] = grad[i] * up[i] * (s + swish * (1.0f - s));
    }
}
