/* Matmul of bfloat16 inputs with int8 weights, on CPUs with AVX-512 BF16 and VBMI.
 *
 * M rows of x, N output features, K inputs, a multiple of 32. Weights are stored in panels of 32
 * output features, each in the order in which it is read (worker/cpu/int8.py packs them). A panel
 * is a sequence of blocks of 64 inputs; the last block may have 32. A block holds one bfloat16
 * scale per feature (64 bytes), then one byte per weight: a sign bit and a magnitude of 7 bits.
 *
 * A table look-up converts weights to bfloat16 without rounding, so inputs keep the precision that
 * they have with bfloat16 weights. The scale is applied to the sum of a block. The order of the
 * float32 additions does not depend on M, so a row's result does not depend on the rest of the
 * batch.
 */
#include <string.h>

#include "thread_team.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>

#include "vector_math.h"

enum {
    HALVES = 2,          /* vectors of 16 features in a panel */
    PANEL = HALVES * SIDE,
    INPUTS = 64,         /* inputs of a block */
    LINE = 64,           /* bytes of a vector */
    SCALE_BYTES = 2 * PANEL,
    AHEAD_BYTES = 2048,  /* prefetch distance */
    MOST_ROWS = 8,       /* rows whose sums are kept in registers */
    CHUNK = 48           /* rows that share a converted block; their sums fit in L1 */
};

/* Tables from a magnitude to the lower and the upper byte of its bfloat16 value. */
static uint8_t lower_bytes[2 * LINE] __attribute__((aligned(LINE)));
static uint8_t upper_bytes[2 * LINE] __attribute__((aligned(LINE)));

__attribute__((constructor)) static void fill_tables(void) {
    for (int magnitude = 0; magnitude < 2 * LINE; magnitude++) {
        uint16_t half = narrow((float)magnitude);
        lower_bytes[magnitude] = (uint8_t)half;
        upper_bytes[magnitude] = (uint8_t)(half >> 8);
    }
}

struct tables {
    __m512i lower[2], upper[2], sign;
};

static inline struct tables load_tables(void) {
    return (struct tables){
        {_mm512_load_si512(lower_bytes), _mm512_load_si512(lower_bytes + LINE)},
        {_mm512_load_si512(upper_bytes), _mm512_load_si512(upper_bytes + LINE)},
        _mm512_set1_epi8((char)0x80),
    };
}

/* Converts a line of 64 weights to bfloat16: 16 features by one pair of inputs, and by the next
 * pair. */
static inline void convert(struct tables tables, const uint8_t *line, __m512i *first, __m512i *second) {
    __builtin_prefetch(line + AHEAD_BYTES, 0, 3);
    __m512i bytes = _mm512_load_si512(line);
    __m512i low = _mm512_permutex2var_epi8(tables.lower[0], bytes, tables.lower[1]);
    __m512i high = _mm512_permutex2var_epi8(tables.upper[0], bytes, tables.upper[1]);
    high = _mm512_ternarylogic_epi32(high, bytes, tables.sign, 0xf8); /* high | (bytes & sign) */
    *first = _mm512_unpacklo_epi8(low, high);
    *second = _mm512_unpackhi_epi8(low, high);
}

static inline int64_t panel_bytes(int64_t K) {
    return K * PANEL + (K + INPUTS - 1) / INPUTS * SCALE_BYTES;
}

static inline __m512 scale_of(const uint8_t *block, int half) {
    __m256i scales = _mm256_load_si256((const __m256i *)block + half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(scales), 16));
}

static inline __m512bh broadcast_pair(const uint16_t *x) {
    int32_t bits;
    memcpy(&bits, x, 4);
    return (__m512bh)_mm512_set1_epi32(bits);
}

#define FOR_ROWS(r) _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
#define FOR_HALVES(h) _Pragma("GCC unroll 2") for (int h = 0; h < HALVES; h++)

/* Computes sums [rows, PANEL] of up to MOST_ROWS rows. `rows` must be a compile-time constant.
 * Weights are converted in registers. */
static inline __attribute__((always_inline)) void
multiply_few(const int rows, const uint16_t *x, int64_t K, const uint8_t *panel, float *sums) {
    struct tables tables = load_tables();
    __m512 sum[MOST_ROWS][HALVES];
    FOR_ROWS(r) FOR_HALVES(h) _mm512_store_ps(sums + r * PANEL + h * SIDE, _mm512_setzero_ps());
    for (int64_t start = 0; start < K; start += INPUTS) {
        const uint8_t *block = panel, *line = panel + SCALE_BYTES;
        int64_t inputs = K - start < INPUTS ? K - start : INPUTS;
        FOR_ROWS(r) FOR_HALVES(h) sum[r][h] = _mm512_setzero_ps();
        for (int64_t k = start; k < start + inputs; k += 4)
            FOR_HALVES(h) {
                __m512i first, second;
                convert(tables, line, &first, &second);
                line += LINE;
                FOR_ROWS(r) {
                    const uint16_t *from = x + r * K + k;
                    sum[r][h] = _mm512_dpbf16_ps(sum[r][h], (__m512bh)first, broadcast_pair(from));
                    sum[r][h] = _mm512_dpbf16_ps(sum[r][h], (__m512bh)second, broadcast_pair(from + 2));
                }
            }
        FOR_HALVES(h) {
            __m512 scale = scale_of(block, h);
            FOR_ROWS(r) {
                float *to = sums + r * PANEL + h * SIDE;
                _mm512_store_ps(to, _mm512_fmadd_ps(sum[r][h], scale, _mm512_load_ps(to)));
            }
        }
        panel = line;
    }
}

/* A block of weights converted to bfloat16: pairs of inputs by features. */
typedef uint16_t converted[INPUTS * PANEL];

static inline void convert_step(struct tables tables, const uint8_t *weights, int64_t k, uint16_t *to) {
    FOR_HALVES(h) {
        __m512i first, second;
        convert(tables, weights + k * PANEL + h * LINE, &first, &second);
        _mm512_store_si512(to + k * PANEL + h * DEPTH, first);
        _mm512_store_si512(to + k * PANEL + (HALVES + h) * DEPTH, second);
    }
}

/* One block of weights, and the next one, which is converted while this one is multiplied. */
struct block {
    const uint16_t *weights;
    const uint8_t *scales;
    int64_t inputs;
    const uint8_t *next;
    int64_t next_inputs; /* 0: nothing to convert */
    uint16_t *to;
};

/* Adds a block to sums [rows, PANEL]. */
static inline __attribute__((always_inline)) void
add_rows(const int rows, const uint16_t *x, int64_t K, struct block of, float *sums) {
    struct tables tables = load_tables();
    __m512 sum[MOST_ROWS][HALVES];
    FOR_ROWS(r) FOR_HALVES(h) sum[r][h] = _mm512_setzero_ps();
    for (int64_t k = 0; k < of.inputs; k += 4) {
        if (k < of.next_inputs) convert_step(tables, of.next, k, of.to);
#pragma GCC unroll 2
        for (int64_t pair = k; pair < k + 4; pair += 2) {
            __m512bh both[HALVES];
            FOR_HALVES(h)
                both[h] = (__m512bh)_mm512_load_si512(of.weights + pair * PANEL + h * DEPTH);
            FOR_ROWS(r) FOR_HALVES(h)
                sum[r][h] = _mm512_dpbf16_ps(sum[r][h], both[h], broadcast_pair(x + r * K + pair));
        }
    }
    FOR_HALVES(h) {
        __m512 scale = scale_of(of.scales, h);
        FOR_ROWS(r) {
            float *at = sums + r * PANEL + h * SIDE;
            _mm512_store_ps(at, _mm512_fmadd_ps(sum[r][h], scale, _mm512_load_ps(at)));
        }
    }
}

#define FOR_EACH_COUNT(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)

static void multiply_few_rows(int64_t rows, const uint16_t *x, int64_t K, const uint8_t *panel,
                              float *sums) {
#define CASE(count) case count: multiply_few(count, x, K, panel, sums); break;
    switch (rows) { FOR_EACH_COUNT(CASE) }
#undef CASE
}

static void add_block(int64_t rows, const uint16_t *x, int64_t K, struct block of, float *sums) {
#define CASE(count) case count: add_rows(count, x, K, of, sums); break;
    switch (rows) { FOR_EACH_COUNT(CASE) }
#undef CASE
}

/* Computes sums [rows, PANEL] of up to CHUNK rows. Each block of weights is converted once for all
 * of them. */
static void multiply_many_rows(int64_t rows, const uint16_t *x, int64_t K, const uint8_t *panel,
                               float *sums) {
    int64_t parts = (rows + MOST_ROWS - 1) / MOST_ROWS, height = (rows + parts - 1) / parts;
    int64_t inputs = K < INPUTS ? K : INPUTS;
    converted weights[2] __attribute__((aligned(LINE)));
    memset(sums, 0, rows * PANEL * sizeof(float));
    for (int64_t k = 0; k < inputs; k += 4)
        convert_step(load_tables(), panel + SCALE_BYTES, k, weights[0]);
    for (int64_t start = 0, b = 0; start < K; b++) {
        const uint8_t *next = panel + SCALE_BYTES + inputs * PANEL;
        int64_t rest = K - start - inputs, next_inputs = rest < INPUTS ? rest : INPUTS;
        struct block block = {weights[b % 2],      panel,       inputs,
                              next + SCALE_BYTES, next_inputs, weights[(b + 1) % 2]};
        for (int64_t r = 0; r < rows; r += height) {
            int64_t here = rows - r < height ? rows - r : height;
            add_block(here, x + r * K + start, K, block, sums + r * PANEL);
            block.next_inputs = 0;
        }
        panel = next;
        start += inputs;
        inputs = next_inputs;
    }
}

/* Adds the bias (may be null) to sums [rows, PANEL], applies the activation, and writes the result
 * to out [rows, N] from a column on. */
static void store_rows(const float *sums, int64_t rows, uint16_t *out, int64_t N, int64_t column,
                       const float *bias, int activation) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t at = column; at < column + PANEL && at < N; at += SIDE) {
            float values[SIDE] __attribute__((aligned(LINE)));
            __mmask16 there = (__mmask16)((1u << (N - at < SIDE ? N - at : SIDE)) - 1);
            __m512 sum = _mm512_load_ps(sums + m * PANEL + at - column);
            if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, bias + at));
            if (activation == SWISH) {
                _mm512_store_ps(values, sum);
                for (int i = 0; i < SIDE; i++) values[i] *= sigmoid(values[i]);
                sum = _mm512_load_ps(values);
            }
            _mm256_mask_storeu_epi16(out + m * N + at, there, (__m256i)_mm512_cvtneps_pbh(sum));
        }
}

int has_int8(void) { return 1; }

void multiply_int8_panels(const uint16_t *x, const uint8_t *weights, const float *bias, uint16_t *out,
                          int64_t M, int64_t N, int64_t K, int activation) {
    int64_t chunks = (M + CHUNK - 1) / CHUNK, height = chunks ? (M + chunks - 1) / chunks : 0;
    float sums[CHUNK * PANEL] __attribute__((aligned(LINE)));
#pragma omp for schedule(guided)
    for (int64_t p = 0; p < (N + PANEL - 1) / PANEL; p++)
        for (int64_t m = 0; m < M; m += height) {
            int64_t rows = M - m < height ? M - m : height;
            const uint8_t *panel = weights + p * panel_bytes(K);
            if (rows <= MOST_ROWS) multiply_few_rows(rows, x + m * K, K, panel, sums);
            else multiply_many_rows(rows, x + m * K, K, panel, sums);
            store_rows(sums, rows, out + m * N, N, p * PANEL, bias, activation);
        }
}

/* out [M, N] = activation(x [M, K] W^T + bias). */
void multiply_int8(const uint16_t *x, const uint8_t *weights, const float *bias, uint16_t *out,
                   int64_t M, int64_t N, int64_t K, int activation) {
#pragma omp parallel
    multiply_int8_panels(x, weights, bias, out, M, N, K, activation);
}
#else
int has_int8(void) { return 0; }
void multiply_int8_panels(const uint16_t *x, const uint8_t *weights, const float *bias, uint16_t *out,
                          int64_t M, int64_t N, int64_t K, int activation) {}
void multiply_int8(const uint16_t *x, const uint8_t *weights, const float *bias, uint16_t *out,
                   int64_t M, int64_t N, int64_t K, int activation) {}
#endif
