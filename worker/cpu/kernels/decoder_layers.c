/* Fused decoder: all layers in one call and one team of threads.
 *
 * In a small model, starting a team for each operation would take as long as the operations.
 *
 * N rows of Q tokens each, M = N * Q; E hidden size, H query heads, K key heads of width D, I width
 * of the MLP. Weights are tiled bfloat16 (tiled_matmul.c) or int8 (int8_matmul.c). Activations
 * between matmuls are bfloat16, hidden states float32. The results are the same as with one call
 * per operation.
 */
#include "thread_team.h"

struct layer {
    const float *attention_norm, *mlp_norm;
    const void *qkv, *output, *gate, *up, *down; /* packed, all in one format */
    const float *qkv_bias, *output_bias, *gate_bias, *up_bias, *down_bias; /* null: no bias */
    void *keys, *values; /* [rows, K, width, D] in bfloat16; the first N rows are used */
    float attention_eps, mlp_eps, scaling;
    int32_t is_rotated;
};

struct sizes {
    int64_t N, Q, E, H, K, D, I, width, column, is_int8;
};

static void multiply_weights(int64_t is_int8, const uint16_t *x, const void *weights, const float *bias, uint16_t *out, int64_t M,
                             int64_t N, int64_t K, int activation) {
    if (is_int8) multiply_int8_panels(x, weights, bias, out, M, N, K, activation);
    else multiply_groups(x, weights, bias, out, M, N, K, activation);
}

/* Runs `hidden` [M, E] through all layers, in place, and writes its final norm to out [M, E].
 * scratch has room for 2 E + (2 H + 2 K) D + 2 I numbers per token.
 * Returns 0, or 1 if there was no memory. */
int forward(const struct layer *layers, int64_t num_layers, struct sizes of, float *hidden, const float *cos, const float *sin,
            const int64_t *starts, const float *last_norm, float last_eps, uint16_t *scratch, float *out) {
    int64_t M = of.N * of.Q, E = of.E, heads = of.H * of.D, all_heads = (of.H + 2 * of.K) * of.D;
    uint16_t *normed = scratch, *more = normed + M * E, *projected = more + M * E, *attended = projected + M * all_heads;
    uint16_t *gate = attended + M * heads, *up = gate + M * of.I;
    int has_failed = 0;
#pragma omp parallel reduction(| : has_failed)
    {
        struct configuration before = configure_tiles(M);
        for (int64_t l = 0; l < num_layers; l++) {
            const struct layer *is = layers + l;
            norm_rows(hidden, l ? more : 0, BFLOAT16, is->attention_norm, is->attention_eps, normed, BFLOAT16, M, E);
            multiply_weights(of.is_int8, normed, is->qkv, is->qkv_bias, projected, M, all_heads, E, NONE);
            has_failed |=
                attend_rows(projected, BFLOAT16, is->is_rotated ? cos : 0, is->is_rotated ? sin : 0, is->keys, is->values, BFLOAT16,
                            starts, attended, of.N, of.Q, of.H, of.K, of.D, of.width, of.column, is->scaling);
            multiply_weights(of.is_int8, attended, is->output, is->output_bias, more, M, E, heads, NONE);
            norm_rows(hidden, more, BFLOAT16, is->mlp_norm, is->mlp_eps, normed, BFLOAT16, M, E);
            multiply_weights(of.is_int8, normed, is->gate, is->gate_bias, gate, M, of.I, E, SWISH);
            multiply_weights(of.is_int8, normed, is->up, is->up_bias, up, M, of.I, E, NONE);
            multiply_all(gate, up, BFLOAT16, M * of.I);
            multiply_weights(of.is_int8, gate, is->down, is->down_bias, more, M, E, of.I, NONE);
        }
        norm_rows(hidden, more, BFLOAT16, last_norm, last_eps, out, FLOAT32, M, E);
        restore_tiles(before);
    }
    return has_failed;
}
