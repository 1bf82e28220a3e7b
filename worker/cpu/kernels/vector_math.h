/* Scalar functions without branches, so that the compiler can vectorise loops over them.
 * Polynomial coefficients are from Cephes. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Rounds to the nearest bfloat16, ties to even, as PyTorch does. NaN stays NaN. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* e^x for x <= 0, with an error of up to 2 units in the last place. NaN stays NaN.
 * Computed as 2^(x / ln 2, rounded) times a polynomial of the remainder. */
static inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    float whole = rintf(x * 1.44269504f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    int32_t exponent = ((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &exponent, 4);
    return p * scale;
}

static inline float sigmoid(float x) {
    float e = exp_of(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* ln x for normal x > 0, with an error of up to 2 units in the last place.
 * Computed as the exponent times ln 2, plus a polynomial of the mantissa around 1. */
static inline float log_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    int32_t exponent = (int32_t)(bits >> 23) - 126;
    bits = (bits & 0x007fffffu) | 0x3f000000u; /* in [1/2, 1) */
    float rest;
    memcpy(&rest, &bits, 4);
    int is_small = rest < 0.707106781f;
    float e = (float)(exponent - is_small);
    rest = (is_small ? rest + rest : rest) - 1.0f;
    float square = rest * rest, p = 7.0376836292e-2f;
    p = p * rest - 1.1514610310e-1f;
    p = p * rest + 1.1676998740e-1f;
    p = p * rest - 1.2420140846e-1f;
    p = p * rest + 1.4249322787e-1f;
    p = p * rest - 1.6668057665e-1f;
    p = p * rest + 2.0000714765e-1f;
    p = p * rest - 2.4999993993e-1f;
    p = p * rest + 3.3333331174e-1f;
    p = p * rest * square - 2.12194440e-4f * e - 0.5f * square;
    return rest + p + 0.693359375f * e;
}

enum { LANES = 16 };

/* Returns the largest of V > 0 numbers. With a single running maximum each step waits for the
 * previous one; separate lanes can be vectorised. */
static inline float greatest_of(const float *restrict z, int64_t V) {
    float lane[LANES], greatest = z[0];
    int64_t whole = V - V % LANES;
    for (int i = 0; i < LANES; i++) lane[i] = z[0];
    for (int64_t v = 0; v < whole; v += LANES)
        for (int i = 0; i < LANES; i++) lane[i] = z[v + i] > lane[i] ? z[v + i] : lane[i];
    for (int i = 0; i < LANES; i++) greatest = lane[i] > greatest ? lane[i] : greatest;
    for (int64_t v = whole; v < V; v++) greatest = z[v] > greatest ? z[v] : greatest;
    return greatest;
}
