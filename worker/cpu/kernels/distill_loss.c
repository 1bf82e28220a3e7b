/* Distillation loss and its gradient in the logits of a chunk, one row at a time so that it stays
 * in the cache. See worker/distill/losses/fused_loss.py and divergences.py.
 *
 * N rows, V vocabulary; q and p are the softmaxes of the student's and the teacher's logits.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "vector_math.h"

enum { BLOCK = 1024 };
enum objective { FORWARD_KL = 0, JENSEN_SHANNON = 1 };

/* Returns the first index of the largest value. Searching by blocks allows vectorisation. */
static inline int64_t place_of(float greatest, const float *restrict z, int64_t V) {
    int64_t start = 0;
    while (start + BLOCK < V && greatest_of(z + start, BLOCK) != greatest) start += BLOCK;
    while (start < V - 1 && z[start] != greatest) start++;
    return start;
}

/* Writes e^(z - greatest) and returns their sum. */
static inline float exponentials(float *restrict e, const float *restrict z, float greatest, int64_t V) {
    float total = 0.0f;
    for (int64_t v = 0; v < V; v++) total += e[v] = exp_of(z[v] - greatest);
    return total;
}

/* One row of the student or the teacher: its logits, e^(z - top), the factor that turns these into
 * probabilities, and log(sum(e^z)). */
struct side {
    float *z, *e, share, log_total;
};

static inline struct side side_of(float *z, float *e, float top, int64_t V) {
    float total = exponentials(e, z, top, V);
    return (struct side){z, e, 1.0f / total, top + logf(total)};
}

/* Forward KL. Replaces the student's logits by the gradient of the loss, without the term of the
 * target token, and returns divergence and KL(p || q). The gradient of the divergence is q - p. */
static inline void forward_kl(struct side student, struct side teacher, int64_t V, float ce_weight, float factor,
                              float *divergence, float *kl) {
    float *restrict s = student.z;
    const float *restrict t = teacher.z, *restrict e_s = student.e, *restrict e_t = teacher.e;
    float sum = 0.0f, kept = 1.0f - ce_weight, apart = teacher.log_total - student.log_total;
    for (int64_t v = 0; v < V; v++) {
        float q = e_s[v] * student.share, p = e_t[v] * teacher.share;
        sum += p * (t[v] - s[v] - apart);
        s[v] = factor * (q - kept * p);
    }
    *divergence = *kl = sum;
}

/* Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), with
 * m = beta p + (1 - beta) q. Its gradient is (1 - beta) q (log(q / m) - KL(q || m)).
 * Works like forward_kl. */
static inline void jensen_shannon(struct side student, struct side teacher, int64_t V, float beta, float ce_weight,
                                  float factor, float *divergence, float *kl) {
    float *restrict s = student.z, *restrict e_s = student.e, *restrict ratio = teacher.e;
    const float *restrict t = teacher.z;
    float p_part = 0.0f, q_part = 0.0f, sum = 0.0f;
    for (int64_t v = 0; v < V; v++) {
        float log_q = s[v] - student.log_total, log_p = t[v] - teacher.log_total;
        float q = e_s[v] * student.share, p = ratio[v] * teacher.share, m = q + beta * (p - q);
        float log_m = log_of(m < FLT_MIN ? FLT_MIN : m);
        sum += p * (log_p - log_q);
        p_part += p * (log_p - log_m);
        q_part += q * (log_q - log_m);
        e_s[v] = q;
        ratio[v] = log_q - log_m;
    }
    float slope = factor * (1.0f - ce_weight) * (1.0f - beta), plain = factor * ce_weight;
    for (int64_t v = 0; v < V; v++) s[v] = e_s[v] * (slope * (ratio[v] - q_part) + plain);
    *divergence = beta * p_part + (1.0f - beta) * q_part;
    *kl = sum;
}

/* Writes terms [N, 4] per row: the loss, KL(p || q), the cross-entropy with the target, and whether
 * student and teacher agree on the most likely token. The student's logits [N, V] are replaced by
 * `factor` times the gradient of the loss.
 *
 * Returns 0, or 1 if there was no memory. Returns 2 and changes nothing if a target is not in
 * [0, V). */
int distil(float *student, const float *teacher, const int64_t *targets, float *terms, int64_t N, int64_t V, int objective,
           float beta, float ce_weight, float factor) {
    int has_failed = 0;
    for (int64_t n = 0; n < N; n++)
        if (targets[n] < 0 || targets[n] >= V) return 2;
#pragma omp parallel
    {
        float *scratch = malloc(2 * V * sizeof(float));
        if (!scratch) {
#pragma omp atomic write
            has_failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            if (!scratch) continue;
            float *s = student + n * V, *t = (float *)teacher + n * V, divergence, kl;
            float top_s = greatest_of(s, V), top_t = greatest_of(t, V);
            float is_agreed = s[place_of(top_t, t, V)] == top_s;
            struct side q = side_of(s, scratch, top_s, V), p = side_of(t, scratch + V, top_t, V);
            float ce = q.log_total - s[targets[n]];
            if (objective == JENSEN_SHANNON) jensen_shannon(q, p, V, beta, ce_weight, factor, &divergence, &kl);
            else forward_kl(q, p, V, ce_weight, factor, &divergence, &kl);
            s[targets[n]] -= factor * ce_weight;
            float *to = terms + 4 * n;
            to[0] = divergence + ce_weight * (ce - divergence);
            to[1] = kl;
            to[2] = ce;
            to[3] = is_agreed;
        }
        free(scratch);
    }
    return has_failed;
}
