/* The passes over a chunk's logits in one go, a row at a time in the cache: see worker/distill/fused.py and objectives.py.
 *
 * N rows, V vocabulary; q and p are the softmaxes of the student's and the teacher's logits.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "exponential.h"

enum objective { FORWARD_KL = 0, JENSEN_SHANNON = 1 };

static inline float greatest_of(const float *restrict z, int64_t V) {
    float greatest = z[0];
    for (int64_t v = 1; v < V; v++) greatest = z[v] > greatest ? z[v] : greatest;
    return greatest;
}

static inline float log_sum(const float *restrict z, float greatest, int64_t V) {
    float total = 0.0f;
    for (int64_t v = 0; v < V; v++) total += exp_of(z[v] - greatest);
    return greatest + logf(total);
}

/* Writes over s what its derivative is, but for the targets; gives divergence and KL(p || q). Slope q - p. */
static inline void forward_kl(float *restrict s, const float *restrict t, float log_s, float log_t, int64_t V, float ce_weight,
                              float factor, float *divergence, float *kl) {
    float sum = 0.0f, kept = 1.0f - ce_weight;
    for (int64_t v = 0; v < V; v++) {
        float log_q = s[v] - log_s, log_p = t[v] - log_t;
        float q = exp_of(log_q), p = exp_of(log_p);
        sum += p * (log_p - log_q);
        s[v] = factor * (q - kept * p);
    }
    *divergence = *kl = sum;
}

/* beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Slope (1 - beta) q (log(q / m) - KL(q || m)). */
static inline void jensen_shannon(float *restrict s, const float *restrict t, float log_s, float log_t, int64_t V, float beta,
                                  float ce_weight, float factor, float *restrict all_q, float *restrict ratio,
                                  float *divergence, float *kl) {
    float p_part = 0.0f, q_part = 0.0f, sum = 0.0f;
    for (int64_t v = 0; v < V; v++) {
        float log_q = s[v] - log_s, log_p = t[v] - log_t;
        float q = exp_of(log_q), p = exp_of(log_p), m = q + beta * (p - q);
        float log_m = log_of(m < FLT_MIN ? FLT_MIN : m);
        sum += p * (log_p - log_q);
        p_part += p * (log_p - log_m);
        q_part += q * (log_q - log_m);
        all_q[v] = q;
        ratio[v] = log_q - log_m;
    }
    float slope = factor * (1.0f - ce_weight) * (1.0f - beta), plain = factor * ce_weight;
    for (int64_t v = 0; v < V; v++) s[v] = all_q[v] * (slope * (ratio[v] - q_part) + plain);
    *divergence = beta * p_part + (1.0f - beta) * q_part;
    *kl = sum;
}

/* Of each row the loss, KL(p || q), cross-entropy with the target and whether both find the same token likeliest, as terms [N, 4]; the
 * student's logits [N, V] become `factor` times the loss's derivative in them. */
void distil(float *student, const float *teacher, const int64_t *targets, float *terms, int64_t N, int64_t V, int objective,
            float beta, float ce_weight, float factor) {
#pragma omp parallel
    {
        float *scratch = objective == JENSEN_SHANNON ? malloc(2 * V * sizeof(float)) : NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            float *s = student + n * V, divergence, kl;
            const float *t = teacher + n * V;
            float top_s = greatest_of(s, V), top_t = greatest_of(t, V);
            int64_t likeliest = 0;
            while (likeliest < V - 1 && t[likeliest] != top_t) likeliest++;
            float is_agreed = s[likeliest] == top_s;
            float log_s = log_sum(s, top_s, V), log_t = log_sum(t, top_t, V);
            float ce = log_s - s[targets[n]];
            if (objective == JENSEN_SHANNON)
                jensen_shannon(s, t, log_s, log_t, V, beta, ce_weight, factor, scratch, scratch + V, &divergence, &kl);
            else
                forward_kl(s, t, log_s, log_t, V, ce_weight, factor, &divergence, &kl);
            s[targets[n]] -= factor * ce_weight;
            float *to = terms + 4 * n;
            to[0] = divergence + ce_weight * (ce - divergence);
            to[1] = kl;
            to[2] = ce;
            to[3] = is_agreed;
        }
        free(scratch);
    }
}
